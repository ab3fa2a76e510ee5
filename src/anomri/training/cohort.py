"""The cases that a training uses, packed: shared among processes, on their two sides, and in a model's words."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.methods.base import Method
from anomri.model.files import cases_of_model
from anomri.runtime.folders import refuse_foreign
from anomri.runtime.processes import ProcessGroup
from anomri.scans.case import Case
from anomri.scans.splits import read_split_cases, splits_by_name
from anomri.scans.tables import read_table
from anomri.slices import Box, join_boxes
from anomri.spec import Cohort, Grid, ModelSpec, Training
from anomri.training.packing import PackedCase, cohort_fingerprint, pack_cohort
from anomri.training.state import Log, TrainingState

Packed = dict[str, list[PackedCase]]
"""By side, ``train`` and ``val``."""
MAY_CHANGE = ("learning_rate", "precision")
"""Settings that a training may be resumed with others of: the way out when its loss stops being a number."""


FOUND = {"healthy_mean", "healthy_spread", "healthy_maps", "chosen_by"}
"""Fields of a score that a training fills in."""
CHOSEN = {"kind", "channels", "median", "smoothing_mm"}
"""Those that it chooses, of the score ``auto``."""


def check_grid(network: Method, grid: Grid) -> None:
    """Raise `AnomriError` if a method cannot work on slices of this size."""
    if network.fixed_size and grid.size != (
        network.side_multiple,
        network.side_multiple,
    ):
        raise AnomriError(
            f"the method sees slices of {network.side_multiple} x {network.side_multiple} alone, not of {grid.size[0]} x "
            f"{grid.size[1]}; leave out --grid."
        )
    if any(side % network.side_multiple for side in grid.size):
        raise AnomriError(
            f"a grid of {grid.size[0]} x {grid.size[1]} does not fit the method, which needs sides that are multiples "
            f"of {network.side_multiple}; choose another --grid."
        )


def finished(folder: Path, spec: ModelSpec, cases: Sequence[Case], resume: bool) -> bool:
    """Whether ``folder`` holds the finished model of this very training; raises `AnomriError` if it holds another."""
    if (folder / "model.json").exists():
        if resume and _is_of(folder, spec, cases):
            # The last moment at which a training may have been killed.
            (folder / TrainingState.NAME).unlink(missing_ok=True)
            return True
        another = "another" if resume else "a"
        raise AnomriError(
            f"{folder}: already holds {another} finished model; name another folder with -o."
        )
    if (folder / TrainingState.NAME).exists() and not resume:
        raise AnomriError(
            f"{folder}: holds a training that did not finish; use --resume or name another folder."
        )
    if not (folder / TrainingState.NAME).exists():
        _check_room(folder, cases)
    return False


def _check_room(folder: Path, cases: Sequence[Case]) -> None:
    """Raise `AnomriError` for tables in ``folder`` that a training would overwrite and did not write."""
    refuse_foreign([folder / "splits.csv"], lambda path: _splits_alike(path, cases))
    refuse_foreign([folder / "log.csv"], Log.is_one)


def _splits_alike(path: Path, cases: Sequence[Case]) -> bool:
    """Whether a table says of the cases what `case.write_splits` would, and nothing else."""
    try:
        columns = {name for row in read_table(path, ("case", "split")) for name in row}
        return columns <= {"case", "split", "subject"} and splits_by_name(
            read_split_cases(path)
        ) == splits_by_name(cases)
    except AnomriError:
        return False


def _is_of(folder: Path, spec: ModelSpec, cases: Sequence[Case]) -> bool:
    found = ModelSpec.read(folder / "model.json")
    same = attrgetter("method", "channels", "settings", "scaling", "grid")
    trained, wanted = (
        asdict(one.training or Training()) | dict.fromkeys(MAY_CHANGE) for one in (found, spec)
    )
    given = FOUND | CHOSEN if spec.score.kind == "auto" else FOUND
    asked, scored = (
        {name: value for name, value in asdict(one.score).items() if name not in given}
        for one in (spec, found)
    )
    return (
        same(found) == same(spec)
        and trained == wanted
        and scored == asked
        and splits_by_name(cases_of_model(folder)) == splits_by_name(cases)
    )


def with_images(cases: Sequence[Case]) -> tuple[list[Case], list[str]]:
    """The cases that have an image, and notes of the others.

    Raises `AnomriError` for a label without an image where a scan, not for testing, has no label: it may be that one's.
    """
    scans = [case for case in cases if case.channels]
    alone = [case for case in cases if not case.channels and case.label and case.split != "test"]
    if alone and any(case.label is None for case in scans if case.split != "test"):
        raise AnomriError(
            f"{alone[0].label}: is a label, but no image is called {alone[0].name} as it is, and the slices that it marks would be "
            f"taken for healthy; call both alike (<case>_flair.nii.gz, <case>_seg.nii.gz), or name them in a .tsv."
        )
    beside = [case.name for case in cases if not case.channels]
    return scans, [f"no image, and not used: {_some(beside, len(cases))}."] if beside else []


def notes_of(cases: Sequence[Case]) -> list[str]:
    """What the owner of a cohort should know of it before a training."""
    notes = [note for case in cases for note in case.notes]
    used = [case for case in cases if case.split in ("train", "val")]
    unlabelled = [case.name for case in used if case.label is None]
    if unlabelled:
        which = _some(unlabelled, len(used)) if len(unlabelled) < len(used) else "every case"
        notes.append(f"no label, all slices taken for healthy: {which}.")
    if beside := [case.name for case in cases if case.split is None]:
        notes.append(f"in no split, and not used: {_some(beside, len(cases))}.")
    return notes


def _some(names: Sequence[str], all_cases: int) -> str:
    return (
        f"{len(names)} of {all_cases} cases ({', '.join(names[:5])}{', ...' if names[5:] else ''})"
    )


def pack_splits(
    cases: Sequence[Case],
    spec: ModelSpec,
    cache: Path,
    team: ProcessGroup,
    progress: Callable[[int, int], None],
) -> Packed:
    """The packed cases for training and validation; ``progress`` is told how many are done, and of how many.

    Raises `AnomriError` for cases that cannot be used, and where a side has no healthy slice.
    """
    used = [case for case in cases if case.split in ("train", "val")]

    def packed_of(
        chosen: Sequence[Case], tell: Callable[[Case], None] = lambda case: None
    ) -> list[PackedCase]:
        return pack_cohort(chosen, spec.channels, spec.grid, spec.scaling, cache, tell)

    mine, done, packed = team.share(used), itertools.count(1), list[PackedCase]()
    team.run_on_all(
        lambda: packed.extend(packed_of(mine, lambda case: progress(next(done), len(mine))))
    )
    if team.world_size > 1:
        # What the others packed is found; only a cache that machines do not share is packed once a machine.
        packed = packed_of(used)
    sides: Packed = {"train": [], "val": []}
    for case, pack in zip(used, packed, strict=True):
        sides[str(case.split)].append(pack)
    for side, packs in sides.items():
        if not any(pack.healthy for pack in packs):
            raise AnomriError(
                f"none of the {len(packs)} {side} cases has a slice without a labelled lesion; add healthy scans."
            )
    return sides


def describe_cohort(packed: Packed, cases: int) -> Cohort:
    """What a model says of the ``cases`` it was trained on and of those it was not."""
    train, val = packed["train"], packed["val"]
    used = sum(len(case.healthy) for case in train)
    return Cohort(
        fingerprint=cohort_fingerprint([*train, *val]),
        training_cases=len(train),
        validation_cases=len(val),
        training_slices=used,
        left_out_slices=sum(case.slices for case in train) - used,
        unused_cases=cases - len(train) - len(val),
    )


def common_box(packed: Packed, network: Method, spec: ModelSpec) -> Box:
    """The part of the grid that holds every brain, as the network needs its sides."""
    boxes = [case.box for side in packed.values() for case in side]
    return functools.reduce(
        lambda a, b: join_boxes(a, b, network.side_multiple, spec.grid.size), boxes
    )


def task_of(spec: ModelSpec, packed: Packed) -> dict[str, Any]:
    """All that decides what a training does; resuming with anything else is another training."""
    schedule = asdict(spec.training) if spec.training else {}
    return {
        "method": spec.method,
        "channels": list(spec.channels),
        "settings": spec.settings,
        "scaling and grid": [asdict(spec.scaling), asdict(spec.grid)],
        # What began with random weights says nothing of others, as before there was such a choice.
        "training": {
            k: value
            for k, value in schedule.items()
            if k not in MAY_CHANGE and (k, value) != ("pretrained", "")
        },
        "training cases": [case.fingerprint for case in packed["train"]],
        "validation cases": [case.fingerprint for case in packed["val"]],
    }
