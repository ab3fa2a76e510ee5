"""Files that are written whole or not at all: beside their final name first, then moved onto it."""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError

PARTIAL = ".partial-"
"""How the name of a file begins while it is being written."""
ABANDONED_S = 24 * 3600.0
"""A partial file of this age, in seconds, was left by a process that was killed."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; it becomes ``path`` in one step, or is removed if the
    block fails.

    Raises `AnomriError` naming the file if the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{path.name}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise AnomriError(
            f"{path}: cannot write ({error.strerror or error}); free disk space or choose another "
            f"folder."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    r"""Write ``text`` (UTF-8) to ``path``, whole or not at all.

    Bytes of file names that are not UTF-8 are written as ``\udce4``: a name must not cost a run its
    tables.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def output_folder(path: Path) -> Path:
    """Make the folder ``path`` and check, before hours of work, that it can be written to.

    Raises `AnomriError`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise AnomriError(
            f"{path}: cannot write to this folder ({error.strerror or error}); choose another."
        ) from error
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; raises `AnomriError` if it holds anything else."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise AnomriError(f"{path}: cannot be read as a JSON object ({error}); mend it.") from error


def has_key(path: Path, key: str) -> bool:
    """Whether a file holds a JSON object with this key."""
    try:
        return key in read_json(path)
    except AnomriError:
        return False


def remove_abandoned(folder: Path) -> None:
    """Remove old partial files from a folder that other runs may be writing to."""
    remove_partial(folder, ABANDONED_S)


def remove_partial(folder: Path, older_than_s: float = 0.0) -> None:
    """Remove partial files of at least this age (seconds), which killed processes left."""
    for path in folder.glob(f"{PARTIAL}*"):
        with suppress(OSError):
            if path.stat().st_mtime <= time.time() - older_than_s:
                path.unlink()
