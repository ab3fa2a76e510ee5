"""Files that are whole or not there: written beside their final name, then moved onto it."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from anomri.errors import AnomriError

LOCK, PARTIAL = ".lock", ".partial-"
MOMENT_S = 30.0
ABANDONED_S = 24 * 3600.0
"""Where several runs write to one folder, only what is half-written for longer than this was left by a dead one."""
OWN_FOLDERS = ("logs", "previews", ".scores")
"""Folders in an output folder that the run which has it writes to."""
FACTS = {"run.json": "anomri", "metrics.json": "protocol"}
"""What a run writes of itself, and a key in it."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write to; on success it becomes ``path`` in one step, on failure it is removed.

    Raises `AnomriError` naming the file if the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{path.name}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise AnomriError(
            f"{path}: cannot write ({error.strerror or error}); free some room or name another folder."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def output_folder(path: Path) -> Path:
    """Make the folder ``path`` and see that it can be written, before hours of work; raises `AnomriError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise AnomriError(
            f"{path}: cannot write to this folder ({error.strerror or error}); name another."
        ) from error
    return path


def check_tables(folder: Path, names: Sequence[str], own: Sequence[str]) -> None:
    """Raise `AnomriError` if a run would replace a table or page in ``folder`` that no run wrote.

    One did where what only runs leave is there: one of their ``own`` folders, or facts in JSON.
    """
    if any((folder / name).exists() for name in own) or any(
        says(folder / name, key) for name, key in FACTS.items()
    ):
        return
    for path in (folder / name for name in names):
        if path.exists():
            raise AnomriError(
                f"{path}: is no result of anomri, and this run would replace it; name another folder with -o, or move it away."
            )


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; raises `AnomriError` if that is no object."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise AnomriError(f"{path}: cannot be read as a JSON object ({error}); mend it.") from error


def says(path: Path, key: str) -> bool:
    """Whether a file holds a JSON object with this key."""
    try:
        return key in read_json(path)
    except AnomriError:
        return False


@contextmanager
def sole_use(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Keep other runs out of ``folder`` while the block runs; the lock ends with the process, however that ends.

    Runs that share a folder, each with a lock of another ``name``, keep those out that have it alone, and these them.
    What runs that were killed left half-written is removed. Raises `AnomriError` if another run has the folder.
    """
    lock = _locked(folder, output_folder(folder) / name)
    try:
        if name == LOCK:
            for other in folder.glob(f"{LOCK}-*"):
                _locked(folder, other).release()
            for place in (folder, *(folder / below for below in OWN_FOLDERS)):
                remove_partial(place)
        else:
            # Others that begin now look at it as well, each for a moment.
            _locked(folder, folder / LOCK, MOMENT_S).release()
        yield
    finally:
        lock.release()


def _locked(folder: Path, path: Path, timeout_s: float = 0.0) -> FileLock:
    lock = FileLock(str(path), timeout=timeout_s)
    try:
        lock.acquire()
    except Timeout as error:
        raise AnomriError(
            f"{folder}: another run is writing to this folder; wait for it, stop it, or name another folder with -o."
        ) from error
    except (OSError, NotImplementedError) as error:
        raise AnomriError(
            f"{folder}: cannot lock this folder ({error}); name one on another file system."
        ) from error
    return lock


def remove_abandoned(folder: Path) -> None:
    """`remove_partial` in a folder that other runs may be writing to."""
    remove_partial(folder, ABANDONED_S)


def remove_partial(folder: Path, older_than_s: float = 0.0) -> None:
    """Remove what `whole_file` could not, since its process was killed; only files that old, in seconds."""
    for path in folder.glob(f"{PARTIAL}*"):
        with suppress(OSError):
            if path.stat().st_mtime <= time.time() - older_than_s:
                path.unlink()
