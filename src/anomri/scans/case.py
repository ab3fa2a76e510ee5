"""A case: one scan of one patient, with a file per channel."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anomri.errors import AnomriError
from anomri.scans.dicom.signature import is_dicom
from anomri.scans.names import (
    ANNOTATIONS,
    LABEL_NAMES,
    MASK_NAMES,
    SUFFIXES,
    bare_name,
    channel_name,
    folder_name,
    parse_name,
)

PATIENT = re.compile(
    r"sub-[A-Za-z0-9]+"  # BIDS
    r"|BraTS-[A-Za-z]+-\d+(?=-\d+$)"  # BraTS since 2023
    r"|UPENN-GBM-\d+(?=_\d+$)"
    r"|(?:training|test)\d\d(?=_\d\d$)"  # ISBI 2015
    r"|.*\d.*(?=_(?i:[vt][-_]?\d"  # P01_v2
    r"|(?:ses|session|visit|tp|timepoint|fu|follow-?up)[-_]?\d+|baseline|bl|follow-?up)$)"
)
"""The patient in the name of a case, where a visit stands behind it."""


@dataclass(frozen=True)
class Case:
    """One scan of one patient: a file per channel, perhaps a lesion label and a brain mask."""

    name: str
    channels: dict[str, Path]
    label: Path | None = None
    mask: Path | None = None
    split: str | None = None
    subject: str | None = None
    """The patient, if a folder or a table names one."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the files were found."""
    ignored: tuple[int, ...] = ()
    """Values of the label that mean "not assessed": neither lesion nor healthy."""
    problem: str = ""
    """Why the files cannot be read together, if they cannot: `files` raises it."""

    @property
    def patient(self) -> str:
        """The patient: ``subject``, else the `PATIENT` in the case's name, else that name."""
        named = PATIENT.match(self.name)
        return self.subject or (named.group() if named else self.name)

    def files(self, channels: Sequence[str]) -> list[Path]:
        """The files of ``channels`` in that order; raises `AnomriError` if one is missing.

        It also raises if the files do not belong together.
        """
        if self.problem:
            raise AnomriError(self.problem)
        missing = [channel for channel in channels if channel not in self.channels]
        if missing:
            where = next(iter(self.channels.values()), self.label or Path(self.name)).parent
            found = ", ".join(self.channels) or "none"
            raise AnomriError(
                f"{self.name}: no file for channel {', '.join(missing)} in {where} (channels "
                f"found: {found}). "
                "Files are named <case>_<channel>.nii.gz; rename them, or name the channels in a "
                "TSV."
            )
        return [self.channels[channel] for channel in channels]


def case_from_files(files: Mapping[str, str | Path], name: str | None = None) -> Case:
    """One case with a file per channel; ``mask`` and ``label`` may be among them.

    Its name is ``name``, else that of the first channel's file without ``_<channel>``. Raises
    `AnomriError` naming a file that does not exist or is not called ``.nii`` or ``.nii.gz``.
    """
    paths = {channel_name(channel): Path(path) for channel, path in files.items()}
    if len(paths) < len(files):
        raise AnomriError(
            f"two of the channels {', '.join(files)} are the same; name one file for each."
        )
    for channel, path in paths.items():
        if not re.fullmatch(r"[a-z0-9]+", channel):
            raise AnomriError(f"channel {channel!r}: name it in letters and digits, such as flair.")
        if is_dicom(path):
            raise AnomriError(f"{path}: is a DICOM file; give the folder that holds its series.")
        if not path.name.lower().endswith(SUFFIXES):
            raise AnomriError(f"{path}: channel {channel} has to be a .nii or .nii.gz file.")
        if not path.is_file():
            raise AnomriError(f"{path}: no such file (channel {channel}).")
    images = [channel for channel in paths if channel not in ANNOTATIONS]
    if not images:
        raise AnomriError("no channel is given; name a file for each, such as flair.")
    return case_from_kinds(name or _name_from_file(paths[images[0]], images[0]), paths)


def _name_from_file(path: Path, channel: str) -> str:
    stem, kind = parse_name(path)
    if kind != channel:
        return bare_name(path)
    # A name such as FLAIR.nii.gz says nothing about the case; its folder may.
    return stem or folder_name(path.parent)


def case_from_kinds(name: str, files: Mapping[str, Path]) -> Case:
    """A case from one file per kind: a channel, or one of the names of labels and of masks.

    If there are several labels or masks, the surest name is taken, with a note.
    """
    labels = [files[kind] for kind in LABEL_NAMES if kind in files]
    masks = [files[kind] for kind in MASK_NAMES if kind in files]
    return Case(
        name,
        {kind: path for kind, path in sorted(files.items()) if kind not in ANNOTATIONS},
        label=labels[0] if labels else None,
        mask=masks[0] if masks else None,
        notes=(*note_choice(name, "label", labels), *note_choice(name, "brain mask", masks)),
    )


def note_choice(name: str, what: str, paths: Sequence[Path]) -> list[str]:
    """A note that the first of several files is taken; nothing if there is only one."""
    if len(paths) < 2:
        return []
    same_names = len({path.name for path in paths}) < len(paths)
    first, *others = [str(path) if same_names else path.name for path in paths]
    return [f"{name}: {first} is taken for its {what}, not {', '.join(others)}."]


def common_channels(cases: Sequence[Case]) -> tuple[str, ...]:
    """The channels that most cases have, in alphabetical order (FLAIR, T1, T1ce, T2)."""
    sets = [tuple(sorted(case.channels)) for case in cases if case.channels]
    if not sets:
        raise AnomriError(
            "no case of the cohort has an image; files are named <case>_<channel>.nii.gz."
        )
    return max(sorted(set(sets)), key=sets.count)


def check_unique(channels: Sequence[str]) -> None:
    """Raise `AnomriError` if a channel is named twice."""
    if len({*channels}) < len(channels):
        raise AnomriError(
            f"two of the channels {', '.join(channels)} are the same; name each once."
        )


def shown_channel(channels: Sequence[str], missing: Sequence[str] = ()) -> int:
    """The index of the channel that pictures show: FLAIR, where lesions show best, or the first."""
    present = [name for name in channels if name not in missing]
    return channels.index("flair" if "flair" in present else present[0])
