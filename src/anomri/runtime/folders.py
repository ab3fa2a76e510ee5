"""Output folders: one run at a time writes to a folder, and it overwrites only what anomri
wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from anomri.errors import AnomriError
from anomri.files import has_key, output_folder, remove_partial

LOCK = ".lock"
"""The lock file of a run that has its folder alone; shards add their number to the name."""
MOMENT_S = 30.0
"""How long, in seconds, a shard waits while other shards look whether a run has the folder
alone."""
RUN_FOLDERS = ("logs", "previews", ".scores")
"""Folders in an output folder that runs write to."""
RUN_FILES = ("logs/plan", "logs/evaluation", ".scores/plan")
"""Files that only a run of anomri leaves in its output folder."""
RUN_FACTS = {
    "run.json": "anomri",
    "metrics.json": "protocol",
    "comparison.json": "version of anomri",
}
"""JSON files in which a run describes itself, and a key that others' files of that name lack."""


def refuse_foreign(files: Iterable[Path], is_own: Callable[[Path], bool]) -> None:
    """Raise `AnomriError` for the first of ``files`` that exists and that anomri did not write.

    ``files`` are what a run is about to write; ``is_own`` says of one that exists whether it is
    anomri's.
    """
    for path in files:
        if path.exists() and not is_own(path):
            raise AnomriError(
                f"{path}: was not written by anomri and would be overwritten; choose another folder "
                f"with -o, or move it away."
            )


def refuse_foreign_tables(folder: Path, names: Iterable[str]) -> None:
    """Raise `AnomriError` if a table or page in ``folder`` would be overwritten and no run wrote
    it."""
    refuse_foreign((folder / name for name in names), lambda path: holds_run(folder))


def holds_run(folder: Path) -> bool:
    """Whether a run of anomri wrote to ``folder`` before."""
    if any((folder / name).exists() for name in RUN_FILES):
        return True
    return any(has_key(folder / name, key) for name, key in RUN_FACTS.items())


@contextmanager
def sole_use(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Keep other runs out of ``folder`` while the block runs; the lock ends with the process.

    Runs that share a folder use locks of different ``name``. They keep out a run that has the
    folder alone, and such a run keeps them out. Partial files of killed runs are removed. Raises
    `AnomriError` if another run has the folder.
    """
    lock = _acquire(folder, output_folder(folder) / name)
    try:
        if name == LOCK:
            for other in folder.glob(f"{LOCK}-*"):
                _acquire(folder, other).release()
            for place in (folder, *(folder / below for below in RUN_FOLDERS)):
                remove_partial(place)
        else:
            # Other shards that begin now hold this lock as well, each for a moment.
            _acquire(folder, folder / LOCK, MOMENT_S).release()
        yield
    finally:
        lock.release()


def _acquire(folder: Path, path: Path, timeout_s: float = 0.0) -> FileLock:
    lock = FileLock(str(path), timeout=timeout_s)
    try:
        lock.acquire()
    except Timeout as error:
        raise AnomriError(
            f"{folder}: another run is writing to this folder; wait for it, stop it, or choose another "
            f"folder with -o."
        ) from error
    except (OSError, NotImplementedError) as error:
        raise AnomriError(
            f"{folder}: cannot lock this folder ({error}); choose one on another file system."
        ) from error
    return lock
