"""A folder of a cohort, listed once."""

from __future__ import annotations

import os
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
