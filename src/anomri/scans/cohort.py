"""What was understood of a cohort: its cases, and the files that are left out and why."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from anomri.errors import AnomriError
from anomri.files import write_text
from anomri.scans.case import Case
from anomri.scans.names import ANNOTATIONS, IMAGES, may_name_files


class LeftOut(NamedTuple):
    """A file that belongs to no case."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Cohort:
    """Cases, sorted by name, and what was left out of them."""

    layout: str
    """The layout they were found in, for people to read."""
    cases: list[Case]
    left_out: list[LeftOut]

    @property
    def channels(self) -> list[str]:
        """The channels of all cases, those that are known by name first."""
        found = {channel for case in self.cases for channel in case.channels}
        known = [channel for channel in IMAGES if channel in found]
        return known + sorted(found.difference(IMAGES))

    @property
    def unknown_channels(self) -> list[str]:
        """Channels that are not known by name; they are read under the name in their files."""
        return [channel for channel in self.channels if channel not in IMAGES]

    def write(self, path: str | Path) -> None:
        """Write the cases as a .tsv, to edit and to hand in as a cohort.

        Files below the table's folder are written relative to it. Raises `AnomriError` if the path
        does not end in .tsv, if it exists with other content, or if a name does not fit in a table.
        """
        write_cases(Path(path), self.cases)


def case_table(cases: Sequence[Case], folder: Path | None = None) -> str:
    """The text of the .tsv that lists ``cases``, with paths relative to ``folder`` if below it.

    Raises `AnomriError` if a name does not fit in a table.
    """
    channels = Cohort("", list(cases), []).channels
    _check_names([case.name for case in cases], channels)
    columns = ["case", *channels]
    columns += [name for name in ("label", "mask", "split", "subject") if _has(cases, name)]
    columns += ["ignored_label"] if _has(cases, "ignored") else []
    text = StringIO()
    table = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n", restval="")
    table.writeheader()
    for case in cases:
        files = {**case.channels, "label": case.label, "mask": case.mask}
        row = {name: _path_text(path, folder) for name, path in files.items() if path}
        named = {"case": case.name, "split": case.split, "subject": case.subject}
        named["ignored_label"] = ",".join(map(str, case.ignored))
        table.writerow(row | {name: value for name, value in named.items() if value})
    return text.getvalue()


def split_for_table(cases: Sequence[Case]) -> tuple[list[Case], list[str]]:
    """The cases that a table can hold, and a note on each that it cannot because of its names."""
    kept: list[Case] = []
    notes: list[str] = []
    for case in cases:
        if not may_name_files(case.name):
            notes.append(f"case {case.name!r} does not fit in a table; rename its files.")
            continue
        try:
            for path in (*case.channels.values(), case.label, case.mask):
                if path:
                    _path_text(path, None)
        except AnomriError as error:
            notes.append(f"case {case.name}: {error}")
        else:
            kept.append(case)
    return kept, notes


def write_cases(path: Path, cases: Sequence[Case]) -> None:
    """Write the .tsv that lists ``cases``; see `Cohort.write`."""
    if path.suffix.lower() != ".tsv":
        raise AnomriError(f"{path}: a table of cases ends in .tsv; name it so.")
    text = case_table(cases, path.parent)
    # Also a table that anomri wrote is not overwritten: it may have been edited.
    if path.exists() and not (path.is_file() and path.read_bytes() == text.encode()):
        raise AnomriError(
            f"{path}: exists and would be overwritten; choose another file with -o, or delete it."
        )
    write_text(path, text)


def _has(cases: Sequence[Case], attribute: str) -> bool:
    return any(getattr(case, attribute) for case in cases)


def _path_text(path: Path, folder: Path | None) -> str:
    """A path for the table: relative to the table's folder if it lies below, else absolute."""
    absolute = os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links
    if not _is_unicode(absolute):
        raise AnomriError(f"{absolute!r}: is not valid UTF-8; rename that file or folder.")
    if folder is None:
        return absolute
    start = os.path.abspath(folder)  # noqa: PTH100
    below = absolute.startswith(os.path.join(start, ""))  # noqa: PTH118
    relative = os.path.relpath(absolute, start)
    # Spaces at the ends of a field are not read back.
    return relative if below and relative == relative.strip() else absolute


def _check_names(cases: Sequence[str], channels: Sequence[str]) -> None:
    """Raise `AnomriError` for a name that `find_cases` would refuse or take for another column."""
    seen: set[str] = set()
    for name in cases:
        if not may_name_files(name) or name != name.strip():
            raise AnomriError(f"case {name!r} does not fit in a table; rename its files.")
        if name in seen:
            raise AnomriError(f"case {name!r} is there twice; rename the files of one of them.")
        seen.add(name)
    for channel in channels:
        if channel in {
            "case",
            "split",
            "subject",
            "ignored_label",
            *ANNOTATIONS,
        } or not _is_unicode(channel):
            raise AnomriError(
                f"a channel called {channel!r} does not fit in a table; rename its files."
            )


def _is_unicode(text: str) -> bool:
    """Whether a name can be written as UTF-8; the bytes of a file's name can be anything."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
