"""A scan and its files, and which side of a training it is on; nothing is opened here but tables."""

from __future__ import annotations

import csv
import itertools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

from anomri.errors import AnomriError
from anomri.files import write_text
from anomri.scans.names import (
    ANNOTATIONS,
    LABEL_NAMES,
    MASK_NAMES,
    SUFFIXES,
    bare_name,
    channel_name,
    folder_name,
    split_name,
)

SPLITS = ("train", "val", "test")
PATIENT = re.compile(
    r"sub-[A-Za-z0-9]+|BraTS-[A-Za-z]+-\d+(?=-\d+$)|UPENN-GBM-\d+(?=_\d+$)|(?:training|test)\d\d(?=_\d\d$)"
    r"|.*\d.*(?=_(?i:[vt][-_]?\d|(?:ses|session|visit|tp|timepoint|fu|follow-?up)[-_]?\d+|baseline|bl|follow-?up)$)"
)
"""The patient in the names of BIDS and, before a visit, of BraTS since 2023, UPENN-GBM, ISBI 2015, and of ``P01_v2``."""


@dataclass(frozen=True)
class Case:
    """One scan of one patient: a file per channel, and a brain mask and a lesion label where there are."""

    name: str
    channels: dict[str, Path]
    label: Path | None = None
    mask: Path | None = None
    split: str | None = None
    subject: str | None = None
    notes: tuple[str, ...] = ()
    """What its owner should know of how it was found."""

    @property
    def patient(self) -> str:
        """Whose scan it is: ``subject``, the `PATIENT` of its name, else the case itself."""
        named = PATIENT.match(self.name)
        return self.subject or (named.group() if named else self.name)

    def files(self, channels: Sequence[str]) -> list[Path]:
        """Files of ``channels`` in that order; raises `AnomriError` naming the missing ones and those found."""
        missing = [channel for channel in channels if channel not in self.channels]
        if missing:
            where = next(iter(self.channels.values()), self.label or Path(self.name)).parent
            found = ", ".join(self.channels) or "none"
            raise AnomriError(
                f"{self.name}: no file for channel {', '.join(missing)} in {where} (channels found: {found}). "
                f"Files are named <case>_<channel>.nii.gz; rename them, or name the channels in a TSV."
            )
        return [self.channels[channel] for channel in channels]


def case_of_files(files: Mapping[str, str | Path], name: str | None = None) -> Case:
    """One case of a file per channel; ``mask`` and ``label`` may be among them.

    It is called ``name``, else what the file of the first channel is called without ``_<channel>``. Raises
    `AnomriError` naming a file that is not there or is no NIfTI file by its name.
    """
    paths = {channel_name(channel): Path(path) for channel, path in files.items()}
    if len(paths) < len(files):
        raise AnomriError(
            f"two of the channels {', '.join(files)} are the same; name one file for each."
        )
    for channel, path in paths.items():
        if not re.fullmatch(r"[a-z0-9]+", channel):
            raise AnomriError(f"channel {channel!r}: name it in letters and digits, such as flair.")
        if not path.name.lower().endswith(SUFFIXES):
            raise AnomriError(f"{path}: channel {channel} has to be a .nii or .nii.gz file.")
        if not path.is_file():
            raise AnomriError(f"{path}: no such file (channel {channel}).")
    images = [channel for channel in paths if channel not in ANNOTATIONS]
    if not images:
        raise AnomriError("no channel is given; name a file for each, such as flair.")
    first = paths[images[0]]
    whole = bare_name(first)
    stem, kind = split_name(first)
    if kind == images[0]:
        # Names such as FLAIR.nii.gz say nothing of the case; its folder may.
        whole = stem or folder_name(first.parent)
    return case_with(name or whole, paths)


def channels_of(cases: Sequence[Case]) -> tuple[str, ...]:
    """Names of the channels that most cases have, in alphabetical order (that of the paper: FLAIR, T1, T1ce, T2)."""
    sets = [tuple(sorted(case.channels)) for case in cases if case.channels]
    if not sets:
        raise AnomriError(
            "no case of the cohort has an image; files are named <case>_<channel>.nii.gz."
        )
    return max(sorted(set(sets)), key=sets.count)


def check_once(channels: Sequence[str]) -> None:
    """Raise `AnomriError` if a channel is named twice."""
    if len({*channels}) < len(channels):
        raise AnomriError(
            f"two of the channels {', '.join(channels)} are the same; name each once."
        )


def shown_channel(channels: Sequence[str], missing: Sequence[str] = ()) -> int:
    """The place of the channel that pictures show: FLAIR, on which most lesions are seen best, else the first there is."""
    there = [name for name in channels if name not in missing]
    return channels.index("flair" if "flair" in there else there[0])


def split_cases(cases: Sequence[Case], splits: dict[str, str], seed: int) -> list[Case]:
    """Give each case its split; raises `AnomriError` if a patient would be trained on and held out.

    ``splits`` (case -> split) overrules the cases' own. Where no case is for validation, a tenth of the training
    patients, at least one, is drawn; where no case has a split at all, every case is a training case first.
    """
    cases = assign_splits(cases, splits)
    if not any(case.split for case in cases):
        cases = [replace(case, split="train") for case in cases]
    if not any(case.split == "val" for case in cases):
        drawn = drawn_patients({case.patient for case in cases if case.split == "train"}, seed)
        cases = [
            replace(case, split="val") if case.split == "train" and case.patient in drawn else case
            for case in cases
        ]
    sides = {
        side: {case.patient for case in cases if case.split == side}
        for side in ("train", "val", "test")
    }
    if not sides["train"]:
        raise AnomriError(
            "no case is left to train on; at least one patient for training and one for validation is needed."
        )
    for one, other in itertools.combinations(sides, 2):
        both = sorted(sides[one] & sides[other])
        if both:
            raise AnomriError(
                f"patient {both[0]} is in the splits {one} and {other}; give all of a patient's scans one split."
            )
    return cases


def drawn_patients(patients: set[str], seed: int) -> set[str]:
    """A tenth of them, at least one, to validate on."""
    return set(
        random.Random(seed).sample(sorted(patients), max(1, round(len(patients) / 10)))
        if patients
        else ()
    )


def read_splits(path: Path) -> dict[str, str]:
    """Read a table (.csv or .tsv) with the columns ``case`` and ``split`` (train, val or test)."""
    splits: dict[str, str] = {}
    for line, row in enumerate(_split_rows(path), start=2):
        if splits.setdefault(row["case"], row["split"]) != row["split"]:
            raise AnomriError(
                f"{path}, line {line}: case {row['case']} is in two splits; each case has one."
            )
    return splits


def splits_of(cases: Sequence[Case]) -> dict[str, str]:
    """The split of each case that has one, by its name and by its patient's; of several of a patient that which is seen most."""
    seen_most_last = sorted(
        (case for case in cases if case.split), key=lambda case: -SPLITS.index(str(case.split))
    )
    by_patient = {case.patient: str(case.split) for case in seen_most_last}
    return by_patient | {
        case.name: str(case.split) for case in seen_most_last if case.name != case.patient
    }


def model_cases(path: Path) -> list[Case]:
    """The cases that `write_splits` noted, without their files."""
    return [
        Case(row["case"], {}, split=row["split"], subject=row.get("subject") or None)
        for row in _split_rows(path)
    ]


def _split_rows(path: Path) -> list[dict[str, str]]:
    rows = table_rows(path, ("case", "split"))
    for line, row in enumerate(rows, start=2):
        if row["split"] not in SPLITS:
            raise AnomriError(
                f"{path}, line {line}: split {row['split']!r} is none of {', '.join(SPLITS)}."
            )
    return rows


def assign_splits(cases: Sequence[Case], splits: dict[str, str]) -> list[Case]:
    """The cases with their split from a table; those that the table does not name keep theirs.

    Raises `AnomriError` if the table names none of the cases: it is another cohort's.
    """
    if splits and not any(case.name in splits for case in cases):
        raise AnomriError(
            f"the splits name {', '.join(sorted(splits)[:3])}, ... but no case of the cohort, which has "
            f"{', '.join(case.name for case in cases[:3])}, ...; write the cases' names as their files have them."
        )
    return [replace(case, split=splits.get(case.name, case.split)) for case in cases]


def write_splits(path: Path, cases: Sequence[Case]) -> None:
    """Write the table that `read_splits` reads; with a column ``subject`` if patients are not known by their cases' names."""
    text = StringIO()
    columns = ("case", "split", "subject")[: 3 if any(case.subject for case in cases) else 2]
    rows = [
        (case.name, case.split, case.subject or "")[: len(columns)] for case in cases if case.split
    ]
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(path, text.getvalue())


def case_with(name: str, files: dict[str, Path]) -> Case:
    """A case of files by what they show: channels, and a lesion label and a brain mask by their names."""
    labels, masks = (
        [files[kind] for kind in kinds if kind in files] for kinds in (LABEL_NAMES, MASK_NAMES)
    )
    notes = (*several(name, "label", labels), *several(name, "brain mask", masks))
    channels = {kind: path for kind, path in sorted(files.items()) if kind not in ANNOTATIONS}
    return Case(name, channels, next(iter(labels), None), next(iter(masks), None), notes=notes)


def several(name: str, what: str, paths: Sequence[Path]) -> list[str]:
    """A note that of several files for the same the first is taken; none where there is no other."""
    alike = len({path.name for path in paths}) < len(paths)
    first, *others = [str(path) if alike else path.name for path in paths] or [""]
    return [f"{name}: {first} is taken for its {what}, not {', '.join(others)}."] if others else []


def table_rows(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a .csv or .tsv; raises `AnomriError` if it cannot be read or lacks one of the columns ``required``."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(
                file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", restval=""
            )
            rows = [
                {key: value.strip() for key, value in row.items() if key is not None}
                for row in reader
            ]
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AnomriError(f"{path}: cannot read the table: {error}") from error
    missing = [column for column in required if column not in columns]
    if missing:
        raise AnomriError(
            f"{path}: no column {', '.join(missing)} (columns found: {', '.join(columns) or 'none'})."
        )
    return rows
