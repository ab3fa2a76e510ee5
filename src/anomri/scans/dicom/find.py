"""The MR series of a folder, and which channel each one is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from anomri.errors import AnomriError
from anomri.scans.dicom.channels import Guess, Series, explain_guess, guess_channel
from anomri.scans.dicom.files import (
    REASONS,
    UNREADABLE,
    Header,
    files_below,
    import_dicom,
    quiet,
    read_header,
    read_number,
)
from anomri.scans.dicom.multiframe import ENHANCED_MR, frame_headers
from anomri.scans.dicom.weighting import other_contrast
from anomri.scans.names import ANNOTATIONS

MIN_SLICES = 10
"""Series with fewer slices are taken for localizers."""
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"

Members = list[tuple[Path, Header]]
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
            skipped += _note_unreadable(series, members)
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


@quiet()
def _group_by_series(folder: Path) -> tuple[dict[tuple[str, str], Members], list[str]]:
    """The files of a folder by SOP class and series, and what was left out."""
    groups: dict[tuple[str, str], dict[str, tuple[Path, Header]]] = {}
    others: list[str] = []
    unreadable: list[str] = []
    copies = 0
    for path in files_below(folder):
        if not path.is_file():
            unreadable.append(path.name)
            continue
        header = read_header(path)
        if header is None:
            others.append(path.name)
            continue
        key = header.get("SeriesInstanceUID", ""), header.get("SOPClassUID", "")
        instance = header.get("SOPInstanceUID") or str(path)
        members = groups.setdefault(key, {})
        # The same instance in another folder is a copy, not a second slice.
        copies += instance in members
        members.setdefault(instance, (path, header))
    skipped = []
    if copies:
        skipped.append(f"{copies} files that are copies of others (the same SOPInstanceUID)")
    if unreadable:
        skipped.append(
            f"{len(unreadable)} broken links or other entries that are not files "
            f"({', '.join(unreadable[:3])})"
        )
    if others:
        skipped.append(f"{len(others)} files that are not DICOM ({', '.join(others[:3])})")
    sorted_groups = {
        (sop_class, uid): list(members.values())
        for (uid, sop_class), members in sorted(groups.items())
    }
    return sorted_groups, skipped


def _make_series(members: Members) -> Series:
    path, header = members[0]
    frames: list[Header] = []
    if len(members) == 1 and header.get("SOPClassUID") == ENHANCED_MR:
        frames = frame_headers(path)
        header = {**header, **frames[0]} if frames else header
    sequence = set(header.get("ScanningSequence", "").split())
    return Series(
        uid=header.get("SeriesInstanceUID", ""),
        study=header.get("StudyInstanceUID", ""),
        description=header.get("SeriesDescription", ""),
        protocol=header.get("ProtocolName", ""),
        frame=header.get("FrameOfReferenceUID", ""),
        modality=header.get("Modality", ""),
        files=tuple(sorted(path for path, _ in members)),
        frames=len(frames),
        agent=header.get("ContrastBolusAgent"),
        echo_time=read_number(header, "EchoTime"),
        inversion_time=read_number(header, "InversionTime"),
        repetition_time=read_number(header, "RepetitionTime"),
        gradient_echo="GR" in sequence,
        spin_echo=bool({"SE", "IR"} & sequence),
        other_contrast=other_contrast(frames or [one for _, one in members]),
    )


def _note_unreadable(series: Series, members: Members) -> list[str]:
    """A note on headers that hold no number where one belongs, without what they hold."""
    named = {name for _, header in members for name, text in header.items() if text == UNREADABLE}
    if not named:
        return []
    return [f"{series}: holds no number in {', '.join(sorted(named))}; this is not used"]


def _reason_to_skip(sop_class: str, series: Series, header: Header) -> str | None:
    if sop_class in REASONS and not series.frames:
        return REASONS[sop_class]
    # Anonymisers remove one of the two, and old scanners wrote no class.
    is_mr = sop_class in (MR_IMAGE, ENHANCED_MR) and series.modality in ("MR", "")
    if not is_mr and (sop_class, series.modality) != ("", "MR"):
        return f"{series.slices} files of {_describe_class(sop_class, series)}, not MR images"
    missing = [
        keyword for keyword in ("SeriesInstanceUID", "StudyInstanceUID") if not header.get(keyword)
    ]
    if missing:
        return (
            f"{series.slices} files without {' or '.join(missing)}, which say what belongs together;"
            f" convert them to NIfTI (dcm2niix)"
        )
    if series.slices < MIN_SLICES or "LOCALIZER" in header.get("ImageType", "").split():
        return f"{series.slices} slices; a localizer, or fewer than the {MIN_SLICES} of a scan"
    return None


def _describe_class(sop_class: str, series: Series) -> str:
    name = "no SOP class"
    if sop_class:
        with quiet():
            name = import_dicom("pydicom").uid.UID(sop_class).name
    return f"{name} (modality {series.modality or 'not given'})"


def _guess_channels(found: Sequence[Series], notes: list[str]) -> dict[str, list[Series]]:
    """The series of each channel by name; where no name says it, by their times.

    ``notes`` get what is left out, and what was guessed from what.
    """
    by_name: dict[str, list[Series]] = {}
    by_times: dict[str, list[tuple[Series, Guess]]] = {}
    for series in found:
        guess = explain_guess(series)
        if guess.channel is None:
            notes.append(f"{series}: its channel is not known{_in_brackets(guess.note)}")
        elif guess.by_name:
            by_name.setdefault(guess.channel, []).append(replace(series, doubt=guess.note))
            notes += [f"{series}: {guess.note}"] if guess.note else []
        else:
            by_times.setdefault(guess.channel, []).append((series, guess))
    for channel, guessed in by_times.items():
        notes += _note_guesses(channel, guessed, channel in by_name)
        if len(guessed) == 1 and channel not in by_name:
            ((series, guess),) = guessed
            by_name[channel] = [replace(series, doubt=guess.note)]
    return by_name


def _note_guesses(
    channel: str, guessed: Sequence[tuple[Series, Guess]], is_named: bool
) -> list[str]:
    """What to say about series that are taken for ``channel`` by their times, or are not."""
    if is_named:
        why = f"another series is {channel} by its name"
    else:
        why = f"{len(guessed)} series look like {channel}"
    if is_named or len(guessed) > 1:
        return [
            f"{series}: its channel is not known ({guess.note}, but {why}; say which one it is: "
            f"{_example(channel, series)})"
            for series, guess in guessed
        ]
    ((series, guess),) = guessed
    return [
        f"{series}: its name does not say its channel; it is taken for {channel}, {guess.note}. If "
        f"that is wrong, name the series of each channel: {_example(channel, series)}"
    ]


def _example(channel: str, series: Series) -> str:
    return f"--series {channel}={series.description or series.uid!r}"


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


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
