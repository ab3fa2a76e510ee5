"""A folder of a cohort, listed once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from anomri.scans.names import SUFFIXES, folder_name


class Place:
    """A file or folder that may be a cohort, or a folder in it; listed when first asked.

    Hidden files and folders are not seen.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The name as the user wrote it."""
        return folder_name(self.path)

    @property
    def images(self) -> list[Path]:
        """NIfTI files in the folder, sorted."""
        return self._listing[0]

    @property
    def folders(self) -> list[Place]:
        """Folders in the folder, sorted."""
        return self._listing[1]

    @cached_property
    def _listing(self) -> tuple[list[Path], list[Place]]:
        if not self.path.is_dir():
            return [], []
        # os.scandir knows which entries are folders; Path.is_dir would ask the disk for each file.
        with os.scandir(self.path) as entries:
            visible = sorted(
                (entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "."
            )
        images = [self.path / name for name, _ in visible if name.lower().endswith(SUFFIXES)]
        return images, [Place(self.path / name) for name, is_folder in visible if is_folder]


def walk_once(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder in ``folder``, itself included, with the sorted names of its files.

    Links to folders are followed, and every folder is entered once, so that links in a circle end.
    Hidden folders are left out.
    """
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        facts = Path(place).stat()
        if (facts.st_dev, facts.st_ino) in seen:
            folders.clear()
            continue
        seen.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(place), sorted(names)
