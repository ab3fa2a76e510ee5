"""Which scan a result is of: told by the content of the scan's files, not by their names or
places."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from anomri.scans.case import Case

CHUNK = 2**20
"""Bytes that are read at once."""


@dataclass(frozen=True)
class FileIdentity:
    """A file as it was found: its name, a hash of its place, its size in bytes, its times in ns and
    its inode.

    ``content`` is a hash of its bytes, which is computed when a result is recorded. The size of a
    missing file is -1. ``path`` is where it lies now and is not stored.
    """

    name: str
    place: str
    size: int = -1
    modified: int = 0
    changed: int = 0
    inode: int = 0
    content: str | None = None
    path: Path | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_path(cls, path: Path) -> FileIdentity:
        """The identity of a file as it is now, without its content."""
        # Links are not followed for the place: some tools store contents by their hash, behind
        # links.
        place = _hash(os.fsencode(path.absolute()))
        try:
            stat = path.stat()
        except OSError:
            return cls(path.name, place, path=path)
        return cls(
            path.name,
            place,
            size=stat.st_size,
            modified=stat.st_mtime_ns,
            changed=stat.st_ctime_ns,
            inode=stat.st_ino,
            path=path,
        )

    def with_content(self) -> FileIdentity:
        """The same with the hash of its bytes, unless the file has changed or gone meanwhile."""
        if self.content or self.path is None or self != FileIdentity.from_path(self.path):
            return self
        try:
            return replace(self, content=hash_file(self.path))
        except OSError:
            return self

    def is_same(self, now: FileIdentity) -> bool:
        """Whether ``now``, found later, has the same name and bytes.

        The bytes are read only if a time or the inode differs: a copy or a touched file is the
        same, another file of equal size and modification time is not.
        """
        if (self.name, self.size) != (now.name, now.size):
            return False
        if (self.modified, self.changed, self.inode) == (now.modified, now.changed, now.inode):
            return True
        return self.content is not None and self.content == now.with_content().content

    def to_json(self) -> dict[str, Any]:
        """What is stored of it."""
        stored = asdict(replace(self, path=None))
        del stored["path"]
        return stored


@dataclass(frozen=True)
class ScanIdentity:
    """Whose scan it is and its files: by channel, ``mask`` and ``label``."""

    patient: str
    files: dict[str, FileIdentity]
    ignored: tuple[int, ...] = ()
    """Values of the label that are left out."""

    @classmethod
    def from_case(cls, case: Case, channels: Sequence[str]) -> ScanIdentity:
        """The identity of a case's ``channels``, brain mask and label, as they are now."""
        paths = {name: case.channels[name] for name in channels if name in case.channels}
        if case.mask is not None:
            paths["mask"] = case.mask
        if case.label is not None:
            paths["label"] = case.label
        files = {name: FileIdentity.from_path(path) for name, path in paths.items()}
        return cls(case.patient, files, case.ignored)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> ScanIdentity:
        """What `to_json` gave; raises ``KeyError`` or ``TypeError`` for anything else."""
        files = {name: FileIdentity(**facts) for name, facts in stored["files"].items()}
        return cls(stored["patient"], files, tuple(stored.get("ignored", ())))

    def with_content(self) -> ScanIdentity:
        """The same with the hash of every file's bytes."""
        return replace(self, files={name: file.with_content() for name, file in self.files.items()})

    def is_same(self, now: ScanIdentity) -> bool:
        """Whether ``now``, found later, is of the same patient and has the same files."""
        if self.patient != now.patient or self.files.keys() != now.files.keys():
            return False
        if self.ignored != now.ignored:
            return False
        return all(file.is_same(now.files[name]) for name, file in self.files.items())

    def without_content(self) -> ScanIdentity:
        """The same without the hashes of bytes."""
        files = {name: replace(file, content=None) for name, file in self.files.items()}
        return replace(self, files=files)

    def is_in_place_of(self, now: ScanIdentity) -> bool:
        """Whether an image lies where one of ``now`` lies, or has the same bytes: a scan moved or
        made anew."""
        images = [
            name for name in self.files if name not in ("mask", "label") and name in now.files
        ]
        # Most lie where they lay, and are not read for this.
        if any(self.files[name].place == now.files[name].place for name in images):
            return True
        return any(
            self.files[name].content is not None
            and self.files[name].content == now.files[name].with_content().content
            for name in images
        )

    def to_json(self) -> dict[str, Any]:
        """What is stored of it."""
        files = {name: file.to_json() for name, file in self.files.items()}
        stored: dict[str, Any] = {"patient": self.patient, "files": files}
        return stored | ({"ignored": list(self.ignored)} if self.ignored else {})


def identify(cases: Sequence[Case], channels: Sequence[str]) -> dict[str, ScanIdentity]:
    """The identity of every case by its name, without contents."""
    return {case.name: ScanIdentity.from_case(case, channels) for case in cases}


def store_scans(scans: Mapping[str, ScanIdentity]) -> dict[str, Any]:
    """The identities of scans with their contents, as JSON holds them; `are_same` reads them."""
    return {name: scan.with_content().to_json() for name, scan in scans.items()}


def are_same(stored: object, now: Mapping[str, ScanIdentity]) -> bool:
    """Whether what `store_scans` gave names the same scans as ``now``, in the same order; False for
    anything else."""
    if not isinstance(stored, dict) or list(stored) != list(now):
        return False
    try:
        return all(ScanIdentity.from_json(stored[name]).is_same(now[name]) for name in now)
    except (KeyError, TypeError, AttributeError):
        return False


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def hash_file(path: Path) -> str:
    """A hash of a file's bytes; raises ``OSError``."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()[:24]
