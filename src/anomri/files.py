"""Files that are whole or not there: written beside their final name, then moved onto it."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anomri.spec import AnomriError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write to; on success it becomes ``path`` in one step, on failure it is removed.

    Raises `AnomriError` naming the file if the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f".partial-{secrets.token_hex(4)}-{path.name}")
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
        raise AnomriError(f"{path}: cannot write to this folder ({error.strerror or error}); name another.") from error
    return path
