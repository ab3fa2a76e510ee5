"""The BIDS app: scans of a BIDS data set in, BIDS derivatives out, participant by participant, then
the group."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.files import output_folder, read_json, remove_abandoned, write_text
from anomri.model.detection import Detection
from anomri.model.detector import Detector
from anomri.model.lesions import Lesion, lesion_labels, table_columns, table_row
from anomri.runs.case_names import with_usable_names
from anomri.runs.identity import identify
from anomri.runs.ledger import Ledger, Task
from anomri.runs.pipeline import detect_each
from anomri.runs.report import detection_report
from anomri.runs.tables import (
    LOGS,
    CaseResult,
    load_result,
    read_results,
    run_facts,
    write_run,
    write_tables,
    write_tsv,
)
from anomri.runtime.folders import refuse_foreign
from anomri.runtime.launch import require_single_process
from anomri.scans.bids import bids_cases, read_description, validate
from anomri.scans.bids_files import CHANNELS, WITHOUT_IMAGE
from anomri.scans.case import Case
from anomri.scans.names import bare_name
from anomri.scans.nifti import write_image
from anomri.scans.prepare import Preparation
from anomri.scans.volume import Volume
from anomri.spec import CITATION, Thresholds

# Reports, and tables of a group, have no names in BIDS. A folder ending in "/" is not ignored by
# validator 3.0.
IGNORED = ("report.html", "cases.tsv", "lesions.tsv", "run.json", "logs", "previews")
SCORE = "Anomaly score: 0 outside the brain, higher the less a scan looks like healthy ones; one scale for all; no probability."
MASK = "1 where the anomaly score exceeds Threshold, as little of healthy brains does."
README = f"""# Anomalies in brain MRI, found by anomri

For research; not a medical device. Files `*_desc-anomaly_...` are:

* `FLAIR`, `T1w` or `T2w`: {SCORE}
* `mask`: where that score exceeds the model's threshold, small components dropped.
* `dseg`: the connected components of the mask, numbered, with a line on each in the table.

{CITATION}
"""


def run_participant(
    bids_dir: str | Path,
    out_dir: str | Path,
    model: Detector | str | Path,
    *,
    participant_labels: Sequence[str] | None = None,
    session_labels: Sequence[str] | None = None,
    skip_bids_validation: bool = False,
    preparation: Preparation = Preparation(),
    warn: Callable[[str], None] = lambda text: None,
    progress: Callable[[CaseResult, int], None] = lambda result, total: None,
) -> list[CaseResult]:
    """Detect in every case of a BIDS data set, after ``preparation``, and write derivatives to the
    data set ``out_dir``.

    A case that fails is noted in ``logs`` and the run goes on. What other runs with the same model
    and data set wrote to ``out_dir`` stays, and what is done is not done again, so participants may
    be worked on one by one, or at the same time, and a run that was stopped goes on. Raises
    `AnomriError` if `bids_cases` does, the data set is not valid, or ``out_dir`` belongs to
    something else.
    """
    require_single_process("a run over BIDS (split it by --participant-label)")
    preparation.check_tools()
    root, out = Path(bids_dir), Path(out_dir)
    detector = model if isinstance(model, Detector) else Detector.load(model)
    channels = detector.channels
    if not CHANNELS.keys() >= set(channels):
        raise AnomriError(
            f"the model's channels are {', '.join(channels)}; in BIDS there are {', '.join(CHANNELS)}."
        )
    labels: dict[str, Any] = {
        "participant_labels": participant_labels,
        "session_labels": session_labels,
    }
    cases = bids_cases(root, **labels, channels=channels, warn=warn)
    if not skip_bids_validation:
        validate(root, warn)
    facts = run_facts(detector, len(cases), preparation)
    _start(root, out, facts)
    cases = with_usable_names(cases, out)
    task = Task(detector.fingerprint, asdict(preparation))
    logs = output_folder(out / LOGS)
    ledger = Ledger(out, logs, task, identify(cases, detector.spec.channels))
    started = time.time()
    results = {}
    for case in cases:
        if result := load_result(ledger, case.name):
            results[case.name] = result
    waiting = [case for case in cases if case.name not in results]
    for result in results.values():
        progress(result, len(cases))
    write_run(out, facts, started)
    try:
        read, save = partial(_read, detector, preparation, root), partial(_save, root=root, out=out)
        for result in detect_each(detector, waiting, read, save, out):
            results[result.case] = result
            _remove_former(out, result.case, result.files)
            ledger.save(result.case, result.to_record(out))
            progress(result, len(cases))
    finally:
        write_run(out, facts, started)
    return [results[case.name] for case in cases]


def _remove_former(out: Path, case: str, kept: Sequence[Path]) -> None:
    """Remove the images of a case that its record names, with what is said of them, but those
    ``kept``."""
    former: dict[str, Any] = {}
    with suppress(AnomriError):
        former = read_json(out / "logs" / f"{case}.json")
    for name in former.get("files") or ():
        image = out / name
        if image not in kept and image.resolve().is_relative_to(out.resolve()):
            for path in (
                image,
                *(image.with_name(bare_name(image) + end) for end in (".json", ".tsv")),
            ):
                path.unlink(missing_ok=True)


def run_group(out_dir: str | Path) -> Path:
    """Collect what `run_participant` left in ``out_dir`` in tables and ``report.html``; returns the
    report's path."""
    out = Path(out_dir)
    results = read_results(out)
    if not results:
        raise AnomriError(
            f"{out}: holds no participant's results (logs/sub-*.json); run the level participant first."
        )
    write_tables(out, results)
    return detection_report(out, results, read_json(out / "run.json"))


def _read(detector: Detector, preparation: Preparation, root: Path, case: Case) -> Volume:
    wanted = detector.channels
    missing = ", ".join(
        f"{name} (*_{CHANNELS[name]}.nii.gz)" for name in wanted if name not in case.channels
    )
    if missing and not (detector.takes_subsets and case.channels):
        folder, found = (
            root.joinpath(*case.name.split("_"), "anat"),
            ", ".join(case.channels) or "none",
        )
        raise AnomriError(
            f"{case.name}: no image for channel {missing} in {folder} (channels found in one space: {found}). Add it, "
            f"or choose others with --participant-label."
        )
    return detector.read(case, preparation)


def _save(case: Case, detection: Detection, root: Path, out: Path) -> list[Path]:
    """Write the derivatives of one case; returns the paths of its images.

    Their names have the entities of the first image, such as ``run`` and ``acq``, and its space.
    """
    images = [case.channels[channel] for channel in detection.channels]
    sources = [
        f"bids:source:{_quote(path.relative_to(root))}" for path in (*images, case.mask) if path
    ]
    spaces = [part for path in images for part in path.name.split("_") if part.startswith("space-")]
    folder = output_folder(out.joinpath(*case.name.split("_"), "anat"))
    remove_abandoned(folder)
    of_image = [part for part in images[0].name.split("_") if _tells_images_apart(part)]
    stem = folder / "_".join([case.name, *of_image, *spaces[:1], "desc-anomaly"])

    def write(
        kind: str,
        data: NDArray[Any],
        display: tuple[float, float],
        made_from: list[str],
        about: dict[str, object],
    ) -> Path:
        path = stem.with_name(f"{stem.name}_{kind}.nii.gz")
        write_image(path, detection.volume.geometry.to_image(data, display))
        about = {**about, "Sources": made_from, "SpatialReference": sources[0]}
        write_text(path.with_name(f"{stem.name}_{kind}.json"), json.dumps(about, indent=2) + "\n")
        return path

    suffix = CHANNELS[detection.channels[0]].split("_")[-1]
    about = _about_map(detection)
    anomaly = write(suffix, detection.anomaly_map, detection.display_range, sources, about)
    if detection.mask is None or detection.spec.thresholds is None:
        return [anomaly]
    made_from = [f"bids::{anomaly.relative_to(out).as_posix()}"]
    about = _about_mask(detection, detection.spec.thresholds)
    mask = write("mask", detection.mask.astype(np.uint8), (0, 1), made_from, about)
    made_from = [f"bids::{mask.relative_to(out).as_posix()}"]
    display = (0, max(1, len(detection.lesions)))
    labels = write("dseg", lesion_labels(detection.mask), display, made_from, _about_lesions())
    _write_lesions(stem.with_name(f"{stem.name}_dseg.tsv"), detection.lesions)
    return [anomaly, mask, labels]


def _quote(path: Path) -> str:
    """A relative path as part of a URI; its bytes may be anything."""
    return quote(os.fsencode(path.as_posix()))


def _tells_images_apart(part: str) -> bool:
    """Whether a part of a file's name is an entity such as ``run-2``.

    >>> [_tells_images_apart(part) for part in ("sub-1", "run-2", "desc-x", "T1w.nii.gz")]
    [False, True, False, False]
    """
    key, hyphen, _ = part.partition("-")
    return bool(hyphen) and key not in WITHOUT_IMAGE


def _about_map(detection: Detection) -> dict[str, object]:
    return {
        "Description": SCORE,
        "SkullStripped": True,
        "Channels": detection.channels,
        "Method": detection.spec.method,
    }


def _about_mask(detection: Detection, thresholds: Thresholds) -> dict[str, object]:
    about: dict[str, object] = {
        "Description": MASK,
        "Type": "Lesion",
        "Threshold": detection.threshold,
    }
    if thresholds.voxel_rate is not None:
        return about | {"VoxelFalsePositiveRate": thresholds.voxel_rate}
    return about | {"FalsePositiveVolume": f"{thresholds.asked_ml} ml in a mean healthy scan"}


def _about_lesions() -> dict[str, object]:
    columns = {name: text for name, text in table_columns().items() if name != "lesion"}
    return columns | {
        "Description": "The connected components of the mask, numbered from the largest down.",
        "Manual": False,
    }


def _write_lesions(path: Path, lesions: Sequence[Lesion]) -> None:
    """Write the table of the labels in a ``dseg``; BIDS calls the number of a lesion its index."""
    _, *columns = table_columns()
    rows = []
    for lesion in lesions:
        index, *values = table_row(lesion, missing="n/a")
        rows.append([index, f"lesion {index}", *values])
    write_tsv(path, ("index", "name", *columns), rows)


def _is_derivative(path: Path) -> bool:
    """Whether a ``dataset_description.json`` is that of derivatives that anomri made."""
    return '"anomri"' in json.dumps(read_json(path).get("GeneratedBy"))


def _start(root: Path, out: Path, facts: dict[str, object]) -> None:
    """Make ``out`` a derivative data set, or see that it is one of the same input and model."""
    try:
        link = _quote(Path(os.path.relpath(root.resolve(), out.resolve())))
    except ValueError as error:
        raise AnomriError(
            f"{out}: lies on another drive than {root}; name a folder on the same one."
        ) from error
    path, source = out / "dataset_description.json", read_description(root)
    refuse_foreign([path], _is_derivative)
    old = read_json(path) if path.is_file() else {}
    if old.get("DatasetLinks", {"source": link}) != {"source": link}:
        raise AnomriError(
            f"{path}: holds results of {old['DatasetLinks']}, not of {link}; name another output folder."
        )
    if (out / "run.json").is_file():
        said, now = read_json(out / "run.json"), json.loads(json.dumps(facts))
        other = [
            key
            for key in ("method", "channels", "score", "thresholds", "preparation")
            if said.get(key) != now[key]
        ]
        if other:
            raise AnomriError(
                f"{out / 'run.json'}: holds results of another model (of another {', '.join(other)}); name another output folder."
            )
    described = {
        "Name": f"Anomalies in {source.get('Name', 'brain MRI')}",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "SourceDatasets": [
            {"URL": link} | ({"DOI": source["DatasetDOI"]} if "DatasetDOI" in source else {})
        ],
        "DatasetLinks": {"source": link},
        **old,
        "GeneratedBy": [{"Name": "anomri", "Version": version("anomri")}],
    }
    write_text(output_folder(out) / path.name, json.dumps(described, indent=2) + "\n")
    ignore = out / ".bidsignore"
    lines = ignore.read_text(encoding="utf-8").splitlines() if ignore.is_file() else []
    write_text(ignore, "\n".join(dict.fromkeys([*lines, *IGNORED])) + "\n")
    if not (out / "README.md").is_file():
        write_text(out / "README.md", README)
