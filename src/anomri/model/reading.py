"""Reading a scan for a model: the files of its channels, and what to note where some are
missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from anomri.errors import AnomriError
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.names import OTHER_IMAGES, SUFFIXES, bare_name
from anomri.scans.prepare import Preparation, prepare
from anomri.scans.volume import Volume
from anomri.spec import ModelSpec


def find_cases_for(cohort: str | Path, channels: Sequence[str], takes_subsets: bool) -> list[Case]:
    """`find.find_cases`, but one file whose name says no channel becomes the only one of
    ``channels``, or FLAIR.

    It becomes FLAIR for a model that takes a subset of its channels, unless its name says that it
    is something else (`OTHER_IMAGES`).
    """
    cases = find_cases(cohort)
    if not Path(cohort).name.lower().endswith(SUFFIXES):
        return cases
    ((channel, path),) = cases[0].channels.items()
    has_one_channel = len(channels) == 1
    taken_for = channels[0] if has_one_channel else "flair"
    if channel in (*channels, *OTHER_IMAGES) or taken_for not in channels:
        return cases
    if not has_one_channel and not takes_subsets:
        return cases
    note = f"{path.name} is read as {taken_for}, because its name has no channel of the model."
    name = cases[0].name if has_one_channel else bare_name(path)
    return [Case(name, {taken_for: path}, notes=(note,))]


def read_case(
    case: Case,
    spec: ModelSpec,
    channels: Sequence[str],
    takes_subsets: bool,
    preparation: Preparation = Preparation(),
) -> Volume:
    """Read the channels of a case that a model looks at, prepared; its other channels are empty in
    the volume.

    ``channels`` are those of the model's that are looked at. Raises `AnomriError` naming the
    channels that are missing for a model that needs them all.
    """
    present = [channel for channel in channels if channel in case.channels]
    if present and takes_subsets and len(present) < len(spec.channels):
        notes = missing_channel_notes(case, spec, channels)
        volume = prepare(case, present, spec.grid, preparation)
        return volume.completed(spec.channels, (*case.notes, *notes))
    missing = [channel for channel in spec.channels if channel not in case.channels]
    if missing:
        raise AnomriError(
            f"{case.name}: this model was trained on {', '.join(spec.channels)}, but the scan has "
            f"{', '.join(case.channels) or 'no channel'}; {', '.join(missing)} is missing. Name the "
            f"files <case>_<channel>.nii.gz, or train a model on the channels that you have."
        )
    volume = prepare(case, spec.channels, spec.grid, preparation)
    return replace(volume, notes=(*case.notes, *volume.notes))


def missing_channel_notes(case: Case, spec: ModelSpec, channels: Sequence[str]) -> list[str]:
    """What to know of a case that lacks some of the ``channels`` that are looked at; empty if it
    has them all."""
    missing = [name for name in channels if name not in case.channels]
    if not missing:
        return []
    has_threshold = spec.thresholds_for([name for name in channels if name in case.channels])
    known = (
        ", and has a threshold for that"
        if has_threshold
        else "; it has no threshold for that, so there is no mask"
    )
    notes = [f"the scan has no {', '.join(missing)}; the model was trained to do without{known}."]
    others = [name for name in case.channels if name not in spec.channels]
    if others:
        notes.append(f"{', '.join(others)} is not a channel of the model and is not used.")
    scored = [name for name in spec.score.channels if name in channels]
    if scored and set(scored) <= set(missing):
        notes.append(
            f"the score is computed on {' and '.join(scored)}; without, far fewer lesions are found."
        )
    return notes
