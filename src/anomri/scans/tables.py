"""Reading tables (.csv, .tsv) whose columns are known by their names."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from anomri.errors import AnomriError


def read_table(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a .csv or .tsv as text without spaces around it; short rows end in ``""``.

    Raises `AnomriError` if the file cannot be read or lacks one of the columns ``required``.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter=delimiter, restval="")
            rows = [
                {column: value.strip() for column, value in row.items() if column is not None}
                for row in reader
            ]
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AnomriError(f"{path}: cannot read the table: {error}") from error
    missing = [column for column in required if column not in columns]
    if missing:
        found = ", ".join(columns) or "none"
        raise AnomriError(f"{path}: no column {', '.join(missing)} (columns found: {found}).")
    return rows
