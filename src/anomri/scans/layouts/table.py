"""A table of cases, .tsv: a column ``case``, one per channel, perhaps mask, label, split, subject.

``ignored_label`` holds the label's values that mean "not assessed", such as ``2`` or ``2,3``. Paths
are relative to the table's folder. `anomri list -o` writes one.
"""

from __future__ import annotations

from dataclasses import replace

from anomri.errors import AnomriError
from anomri.scans.case import Case, case_from_kinds
from anomri.scans.cohort import Cohort
from anomri.scans.names import IMAGES, channel_name, described_channel, may_name_files
from anomri.scans.places import Place
from anomri.scans.splits import SPLITS
from anomri.scans.tables import read_table

NAME = "a table"
EXAMPLE = "a .tsv with the columns case, <channel>, ..., mask, label"


def matches(place: Place) -> bool:
    """Whether this is a .tsv file."""
    return place.path.name.lower().endswith(".tsv") and place.path.is_file()


def read(place: Place) -> Cohort:
    """The case of each row; raises `AnomriError` naming the line and the column that do not fit."""
    cases: dict[str, Case] = {}
    for line, row in enumerate(read_table(place.path, ("case",)), start=2):
        where = f"{place.path}, line {line}"
        name = row.pop("case")
        if name in cases or not may_name_files(name):
            raise AnomriError(f"{where}: case {name!r} is empty, named twice or holds a '/'.")
        cases[name] = _read_case(place, where, name, row)
    return Cohort(NAME, list(cases.values()), [])


def _read_case(place: Place, where: str, name: str, row: dict[str, str]) -> Case:
    split = row.pop("split", None) or None
    subject = row.pop("subject", None) or None
    if split not in (*SPLITS, None):
        raise AnomriError(f"{where}: split {split!r} is not one of {', '.join(SPLITS)}.")
    ignored = _whole_numbers(where, row.pop("ignored_label", ""))
    given = {column: place.path.parent / value for column, value in row.items() if value}
    files = {_kind(column): file for column, file in given.items()}
    if len(files) < len(given):
        raise AnomriError(f"{where}: two of the columns {', '.join(given)} are the same channel.")
    for column, file in given.items():
        if not file.is_file():
            raise AnomriError(f"{where}, column {_kind(column)}: no such file: {file}")
    return replace(case_from_kinds(name, files), split=split, subject=subject, ignored=ignored)


def _kind(column: str) -> str:
    """The channel that a column is for, or what kind of label or mask."""
    described = described_channel(column)
    return described if described in IMAGES else channel_name(column)


def _whole_numbers(where: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in text.split(",") if value.strip())
    except ValueError:
        raise AnomriError(
            f"{where}, column ignored_label: {text!r} is not a list of whole numbers such as 2,3."
        ) from None
