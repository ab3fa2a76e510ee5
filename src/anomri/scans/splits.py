"""Which cases a model is trained, validated and tested on; a patient's scans stay together."""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

from anomri.errors import AnomriError
from anomri.files import write_text
from anomri.scans.case import Case
from anomri.scans.tables import read_table

SPLITS = ("train", "val", "test")
"""The sides of a training, first the one whose scans the model sees most."""


def split_cases(cases: Sequence[Case], splits: dict[str, str], seed: int) -> list[Case]:
    """Give each case its split; raises `AnomriError` if a patient would be trained on and held out.

    ``splits`` (case -> split) overrules the cases' own. If no case has a split, every case is a
    training case first. If no case is for validation, a tenth of the training patients, at least
    one, is drawn.
    """
    cases = assign_splits(cases, splits)
    if not any(case.split for case in cases):
        cases = [replace(case, split="train") for case in cases]
    if not any(case.split == "val" for case in cases):
        drawn = draw_patients({case.patient for case in cases if case.split == "train"}, seed)
        cases = [
            replace(case, split="val") if case.split == "train" and case.patient in drawn else case
            for case in cases
        ]
    patients = {side: {case.patient for case in cases if case.split == side} for side in SPLITS}
    if not patients["train"]:
        raise AnomriError(
            "no case is left to train on; at least one patient for training and one for validation "
            "is needed."
        )
    for one, other in itertools.combinations(SPLITS, 2):
        both = sorted(patients[one] & patients[other])
        if both:
            raise AnomriError(
                f"patient {both[0]} is in the splits {one} and {other}; give all of a patient's "
                "scans one split."
            )
    return cases


def draw_patients(patients: set[str], seed: int) -> set[str]:
    """A tenth of the patients, at least one, to validate on."""
    if not patients:
        return set()
    count = max(1, round(len(patients) / 10))
    return set(random.Random(seed).sample(sorted(patients), count))


def assign_splits(cases: Sequence[Case], splits: dict[str, str]) -> list[Case]:
    """The cases with their split from a table; those that the table does not name keep theirs.

    Raises `AnomriError` if the table names none of the cases: it belongs to another cohort.
    """
    if splits and not any(case.name in splits for case in cases):
        raise AnomriError(
            f"the splits name {', '.join(sorted(splits)[:3])}, ... but no case of the cohort, "
            "which has "
            f"{', '.join(case.name for case in cases[:3])}, ...; write the cases' names as their "
            "files have them."
        )
    return [replace(case, split=splits.get(case.name, case.split)) for case in cases]


def splits_by_name(cases: Sequence[Case]) -> dict[str, str]:
    """The split of each case that has one, under its own name and under its patient's.

    A patient whose scans are on several sides is on the side that is seen most: train before val
    before test.
    """
    seen_most_last = sorted(
        (case for case in cases if case.split), key=lambda case: -SPLITS.index(str(case.split))
    )
    by_patient = {case.patient: str(case.split) for case in seen_most_last}
    by_case = {case.name: str(case.split) for case in seen_most_last if case.name != case.patient}
    return by_patient | by_case


def read_splits(path: Path) -> dict[str, str]:
    """Read a table (.csv or .tsv) with the columns ``case`` and ``split`` (train, val or test)."""
    splits: dict[str, str] = {}
    for line, row in enumerate(_read_rows(path), start=2):
        if splits.setdefault(row["case"], row["split"]) != row["split"]:
            raise AnomriError(
                f"{path}, line {line}: case {row['case']} is in two splits; each case has one."
            )
    return splits


def read_split_cases(path: Path) -> list[Case]:
    """The cases that `write_splits` wrote, without their files."""
    return [
        Case(row["case"], {}, split=row["split"], subject=row.get("subject") or None)
        for row in _read_rows(path)
    ]


def write_splits(path: Path, cases: Sequence[Case]) -> None:
    """Write the table that `read_splits` reads.

    It has a column ``subject`` if there is a patient who is not known by the names of the cases.
    """
    columns = ["case", "split"]
    if any(case.subject for case in cases):
        columns.append("subject")
    rows = [
        (case.name, case.split, case.subject or "")[: len(columns)] for case in cases if case.split
    ]
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(path, text.getvalue())


def _read_rows(path: Path) -> list[dict[str, str]]:
    rows = read_table(path, ("case", "split"))
    for line, row in enumerate(rows, start=2):
        if row["split"] not in SPLITS:
            raise AnomriError(
                f"{path}, line {line}: split {row['split']!r} is not one of {', '.join(SPLITS)}."
            )
    return rows
