"""The MR series of a folder, and which channel each one is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.scans.dicom.channels import Series, guess_channel
from anomri.scans.dicom.files import (
    REASONS,
    import_dicom,
    read_header,
    read_number,
    read_text,
    regular_files,
)
from anomri.scans.names import ANNOTATIONS

MIN_SLICES = 10
"""Series with fewer slices are taken for localizers."""
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"

Members = list[tuple[Path, Any]]
"""The files of one series, each with its header."""


def find_series(
    folder: str | Path, on_skipped: Callable[[str], None] | None = None
) -> list[Series]:
    """The MR series in ``folder`` and below it, sorted by description; pixels are not read.

    File names do not matter. Localizers, objects other than MR images and files other than DICOM
    are left out; ``on_skipped`` is called with a sentence for each kind. Raises `AnomriError` if
    there is no MR series, naming what the folder holds instead, or if a file is damaged.
    """
    groups, skipped = _group_by_series(Path(folder))
    found = []
    for (sop_class, _), members in groups.items():
        series = _make_series(members)
        reason = _reason_to_skip(sop_class, series, members[0][1])
        if reason:
            skipped.append(f"{series.description or series.files[0].name!r}: {reason}")
        else:
            found.append(series)
    _report(skipped, on_skipped)
    if not found:
        raise AnomriError(
            f"{folder}: no MR image series found. It holds: "
            f"{'; '.join(skipped) or 'no file at all'}. Name a folder that holds MR series."
        )
    return sorted(found, key=lambda series: (series.description, series.uid))


def choose_series(
    folder: str | Path,
    channels: Mapping[str, str] | None = None,
    on_skipped: Callable[[str], None] | None = None,
) -> dict[str, Series]:
    """The series of each channel, as ``channels`` says (channel -> SeriesDescription or UID).

    Without ``channels`` they are guessed, and ``on_skipped`` is called for those without a guess.
    Raises `AnomriError` listing the series if two are the same channel, if none is known, or if
    they are not all of one study.
    """
    skipped: list[str] = []
    found = find_series(folder, skipped.append)
    if channels is None:
        candidates = _guess_channels(found, skipped)
    else:
        candidates = {name: _named(found, name, wanted) for name, wanted in channels.items()}
    problem = _find_problem(candidates)
    if problem:
        listing = "".join(
            f"\n  {series}: {guess_channel(series) or 'channel not known'}" for series in found
        )
        example = found[0].description or found[0].uid
        raise AnomriError(
            f"{folder}: {problem}. Say which series is which channel by its description or UID, as "
            f"in flair={example!r}. MR series found:{listing}"
        )
    _report(skipped, on_skipped)
    return {channel: same[0] for channel, same in sorted(candidates.items())}


def _report(texts: Sequence[str], callback: Callable[[str], None] | None) -> None:
    if callback is not None:
        for text in texts:
            callback(text)


def _group_by_series(folder: Path) -> tuple[dict[tuple[str, str], Members], list[str]]:
    """The files of a folder by SOP class and series, and what was left out."""
    groups: dict[tuple[str, str], dict[str, tuple[Path, Any]]] = {}
    others: list[str] = []
    copies = 0
    for path in regular_files(folder):
        header = read_header(path)
        if header is None:
            others.append(path.name)
            continue
        key = read_text(header, "SeriesInstanceUID"), read_text(header, "SOPClassUID")
        instance = read_text(header, "SOPInstanceUID") or str(path)
        members = groups.setdefault(key, {})
        # The same instance in another folder is a copy, not a second slice.
        copies += instance in members
        members.setdefault(instance, (path, header))
    skipped = []
    if copies:
        skipped.append(f"{copies} files that are copies of others (the same SOPInstanceUID)")
    if others:
        skipped.append(f"{len(others)} files that are not DICOM ({', '.join(others[:3])})")
    sorted_groups = {
        (sop_class, uid): list(members.values())
        for (uid, sop_class), members in sorted(groups.items())
    }
    return sorted_groups, skipped


def _make_series(members: Members) -> Series:
    header = members[0][1]
    return Series(
        uid=read_text(header, "SeriesInstanceUID"),
        study=read_text(header, "StudyInstanceUID"),
        description=read_text(header, "SeriesDescription"),
        protocol=read_text(header, "ProtocolName"),
        frame=read_text(header, "FrameOfReferenceUID"),
        modality=read_text(header, "Modality"),
        files=tuple(sorted(path for path, _ in members)),
        agent=read_text(header, "ContrastBolusAgent") if "ContrastBolusAgent" in header else None,
        echo_time=read_number(header, "EchoTime"),
        inversion_time=read_number(header, "InversionTime"),
        gradient_echo="GR" in read_text(header, "ScanningSequence").split(),
    )


def _reason_to_skip(sop_class: str, series: Series, header: Any) -> str | None:
    if sop_class in REASONS:
        return REASONS[sop_class]
    if sop_class != MR_IMAGE or series.modality != "MR":
        name = import_dicom("pydicom").uid.UID(sop_class).name
        modality = series.modality or "not given"
        return f"{series.slices} files of {name} (modality {modality}), not MR images"
    if not series.uid or not series.study:
        return f"{series.slices} files without SeriesInstanceUID or StudyInstanceUID"
    if series.slices < MIN_SLICES or "LOCALIZER" in read_text(header, "ImageType").split():
        return f"{series.slices} slices; a localizer, or fewer than the {MIN_SLICES} of a scan"
    return None


def _guess_channels(found: Sequence[Series], skipped: list[str]) -> dict[str, list[Series]]:
    guessed: dict[str, list[Series]] = {}
    for series in found:
        channel = guess_channel(series)
        if channel is None:
            skipped.append(f"{series}: its channel is not known")
        else:
            guessed.setdefault(channel, []).append(series)
    return guessed


def _named(found: Sequence[Series], channel: str, wanted: str) -> list[Series]:
    """The series that the user calls ``wanted``, by description or UID."""
    if not re.fullmatch(r"[a-z0-9]+", channel) or channel in ANNOTATIONS:
        raise AnomriError(
            f"channel {channel!r}: name it in lower-case letters and digits, such as flair."
        )
    description = wanted.strip().lower()
    return [
        series
        for series in found
        if wanted == series.uid or description == series.description.lower()
    ]


def _find_problem(candidates: Mapping[str, Sequence[Series]]) -> str | None:
    """Why the channels are not clear, if they are not."""
    if not candidates:
        return "no series is known by its description to be flair, t1, t1ce or t2"
    unclear = [
        f"{channel} is {len(same)} series" for channel, same in candidates.items() if len(same) != 1
    ]
    if unclear:
        return ", ".join(unclear)
    if len({same[0].study for same in candidates.values()}) > 1:
        return "the series belong to several studies; name a folder, or series, of one"
    return None
