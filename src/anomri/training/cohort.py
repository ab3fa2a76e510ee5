"""The cases of a training: checked, packed, divided into training and validation, and described."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.methods.base import Method
from anomri.model.files import read_model_cases
from anomri.runtime.folders import refuse_foreign
from anomri.runtime.processes import ProcessGroup
from anomri.scans.case import Case
from anomri.scans.names import may_name_files
from anomri.scans.splits import read_split_cases, splits_by_name
from anomri.scans.tables import read_table
from anomri.slices import Box, join_boxes
from anomri.spec import Cohort, Grid, ModelSpec, Score, Training
from anomri.training.packing import PackedCase, cohort_fingerprint, pack_cohort
from anomri.training.state import Log, TrainingState

Packed = dict[str, list[PackedCase]]
"""The packed cases for ``train`` and for ``val``."""
MAY_CHANGE = ("learning_rate", "precision")
"""Training settings that may differ on resuming: the way out when the loss becomes NaN."""
FILLED_IN = {"healthy_mean", "healthy_spread", "healthy_maps", "chosen_by"}
"""Fields of a score that a training fills in."""
CHOSEN = {"kind", "channels", "median", "smoothing_mm"}
"""Fields that it chooses too, if the score is ``auto``."""


def check_grid(network: Method, grid: Grid) -> None:
    """Raise `AnomriError` if a method cannot work on slices of this size."""
    multiple = network.side_multiple
    rows, columns = grid.size
    if network.fixed_size and grid.size != (multiple, multiple):
        raise AnomriError(
            f"the method works on slices of {multiple} x {multiple} only, not {rows} x {columns}; "
            f"leave out --grid."
        )
    if rows % multiple or columns % multiple:
        raise AnomriError(
            f"a grid of {rows} x {columns} does not fit the method, which needs sides that are "
            f"multiples of {multiple}; choose another --grid."
        )


def is_finished(folder: Path, spec: ModelSpec, cases: Sequence[Case], resume: bool) -> bool:
    """Whether ``folder`` holds the finished model of this very training.

    Raises `AnomriError` if it holds another model, an unfinished training that is not to be
    resumed, or tables that the training would overwrite.
    """
    state = folder / TrainingState.NAME
    if (folder / "model.json").exists():
        if resume and _is_model_of(folder, spec, cases):
            # A training may have been killed just before it removed its state.
            TrainingState.remove(folder)
            return True
        another = "another" if resume else "a"
        raise AnomriError(
            f"{folder}: already holds {another} finished model; choose another folder with -o."
        )
    if state.exists() and not resume:
        raise AnomriError(
            f"{folder}: holds a training that did not finish; use --resume or choose another "
            f"folder with -o."
        )
    if not state.exists():
        _check_tables(folder, cases)
    return False


def _check_tables(folder: Path, cases: Sequence[Case]) -> None:
    """Raise `AnomriError` for tables in ``folder`` that this training would overwrite."""
    refuse_foreign([folder / "splits.csv"], lambda path: _has_same_splits(path, cases))
    refuse_foreign([folder / "log.csv"], Log.is_log)


def _has_same_splits(path: Path, cases: Sequence[Case]) -> bool:
    """Whether a table says what `case.write_splits` would write for the cases, and nothing else."""
    try:
        columns = {name for row in read_table(path, ("case", "split")) for name in row}
        known = columns <= {"case", "split", "subject"}
        return known and splits_by_name(read_split_cases(path)) == splits_by_name(cases)
    except AnomriError:
        return False


def _is_model_of(folder: Path, spec: ModelSpec, cases: Sequence[Case]) -> bool:
    """Whether a training by ``spec`` on the ``cases`` gave the model in ``folder``."""
    found = ModelSpec.read(folder / "model.json")
    filled_in = FILLED_IN | CHOSEN if spec.score.kind == "auto" else FILLED_IN

    def given(score: Score) -> dict[str, Any]:
        return {name: value for name, value in asdict(score).items() if name not in filled_in}

    def lasting(training: Training | None) -> dict[str, Any]:
        return asdict(training or Training()) | dict.fromkeys(MAY_CHANGE)

    return (
        found.method == spec.method
        and found.channels == spec.channels
        and found.settings == spec.settings
        and found.scaling == spec.scaling
        and found.grid == spec.grid
        and lasting(found.training) == lasting(spec.training)
        and given(found.score) == given(spec.score)
        and splits_by_name(read_model_cases(folder)) == splits_by_name(cases)
    )


def cases_for_tables(cases: Sequence[Case]) -> tuple[list[Case], list[str]]:
    """The cases whose names fit in ``splits.csv``, and notes on the others.

    By their names an evaluation knows which cases a model has seen. Raises `AnomriError` if no name
    fits.
    """
    kept = [case for case in cases if may_name_files(case.name)]
    unfit = [repr(case.name) for case in cases if not may_name_files(case.name)]
    if not unfit:
        return kept, []
    note = f"names that fit in no table, not used: {_some(unfit, len(cases))}; rename their files."
    if not kept:
        raise AnomriError(note)
    return kept, [note]


def cases_with_images(cases: Sequence[Case]) -> tuple[list[Case], list[str]]:
    """The cases that have an image, and notes on the others.

    Raises `AnomriError` for a label without an image if some scan, not for testing, has no label:
    the label may belong to that scan.
    """
    scans = [case for case in cases if case.channels]
    lonely = [case for case in cases if not case.channels and case.label and case.split != "test"]
    if lonely and any(case.label is None for case in scans if case.split != "test"):
        name = lonely[0].name
        raise AnomriError(
            f"{lonely[0].label}: is a label, but no image is called {name}. If it belongs to one "
            f"of the images, slices with lesions would be taken for healthy; give both the same "
            f"name (<case>_flair.nii.gz, <case>_seg.nii.gz), or list them in a .tsv."
        )
    without = [case.name for case in cases if not case.channels]
    return scans, [f"no image, not used: {_some(without, len(cases))}."] if without else []


def collect_notes(cases: Sequence[Case]) -> list[str]:
    """What the user should know about a cohort before a training."""
    notes = [note for case in cases for note in case.notes]
    used = [case for case in cases if case.split in ("train", "val")]
    unlabelled = [case.name for case in used if case.label is None]
    if unlabelled:
        which = _some(unlabelled, len(used)) if len(unlabelled) < len(used) else "every case"
        notes.append(f"no label, so all slices are taken for healthy: {which}.")
    unused = [case.name for case in cases if case.split is None]
    if unused:
        notes.append(f"in no split, not used: {_some(unused, len(cases))}.")
    return notes


def _some(names: Sequence[str], total: int) -> str:
    """Some of the names, and how many there are.

    >>> _some(["a", "b"], 9)
    '2 of 9 cases (a, b)'
    """
    more = ", ..." if len(names) > 5 else ""
    return f"{len(names)} of {total} cases ({', '.join(names[:5])}{more})"


def pack_splits(
    cases: Sequence[Case],
    spec: ModelSpec,
    cache: Path,
    team: ProcessGroup,
    on_progress: Callable[[int, int], None],
) -> Packed:
    """The packed cases for training and validation; ``on_progress`` gets how many of how many.

    Raises `AnomriError` for cases that cannot be used, and if either split has no healthy slice.
    """
    used = [case for case in cases if case.split in ("train", "val")]
    mine, done = team.share(used), 0

    def count(case: Case) -> None:
        nonlocal done
        done += 1
        on_progress(done, len(mine))

    def pack(
        some: Sequence[Case], on_case: Callable[[Case], None] = lambda case: None
    ) -> list[PackedCase]:
        return pack_cohort(some, spec.channels, spec.grid, spec.scaling, cache, on_case)

    packed: list[PackedCase] = []
    team.run_on_all(lambda: packed.extend(pack(mine, count)))
    if team.world_size > 1:
        # Finds what the others packed, unless machines do not share the cache.
        packed = pack(used)
    splits: Packed = {"train": [], "val": []}
    for case, one in zip(used, packed, strict=True):
        splits[str(case.split)].append(one)
    for split, some in splits.items():
        if not any(one.healthy for one in some):
            raise AnomriError(
                f"none of the {len(some)} {split} cases has a slice without a labelled lesion; "
                f"add healthy scans."
            )
    return splits


def collect_scan_notes(packed: Packed) -> list[str]:
    """What the user should know of how the files of each case were read."""
    notes = []
    for case in [*packed["train"], *packed["val"]]:
        start = f"{case.name}: "
        notes += [start + note.removeprefix(start) for note in case.notes]
    return notes


def describe_cohort(packed: Packed, cases: int) -> Cohort:
    """What a model says about its cohort of so many ``cases``."""
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
    """The part of the grid that holds every brain, with sides as the network needs them."""
    boxes = [case.box for some in packed.values() for case in some]
    return functools.reduce(
        lambda a, b: join_boxes(a, b, network.side_multiple, spec.grid.size), boxes
    )


def describe_task(spec: ModelSpec, packed: Packed) -> dict[str, Any]:
    """All that decides the result of a training; it is not resumed with anything else."""
    training = asdict(spec.training) if spec.training else {}
    for name in MAY_CHANGE:
        training.pop(name, None)
    if not training.get("pretrained"):
        training.pop("pretrained", None)
    return {
        "method": spec.method,
        "channels": list(spec.channels),
        "settings": spec.settings,
        "scaling and grid": [asdict(spec.scaling), asdict(spec.grid)],
        "training": training,
        "training cases": [case.fingerprint for case in packed["train"]],
        "validation cases": [case.fingerprint for case in packed["val"]],
    }
