"""The BIDS app: scans of a BIDS data set in, BIDS derivatives out, participant by participant, then the group."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from anomri.cases import Case
from anomri.detection import detect_each
from anomri.detector import Detector
from anomri.files import output_folder, write_text
from anomri.findings import Detection
from anomri.launch import alone
from anomri.lesions import lesion_labels
from anomri.preparation import Preparation
from anomri.reporting import detection_report
from anomri.results import CaseResult, run_facts, tsv, write_run, write_tables
from anomri.spec import CITATION, AnomriError
from anomri.volume import Volume, write_image

CHANNELS = {"flair": "FLAIR", "t1": "T1w", "t1ce": "ce-*_T1w", "t2": "T2w"}
"""How the names of each channel's images end; ``ce`` says that a contrast agent was given."""
SUFFIXES = ("FLAIR", "T1w", "T2w")
# Reports, and tables of a group, have no names in BIDS. A folder ending in "/" is not ignored by validator 3.0.
IGNORED = ("report.html", "cases.tsv", "lesions.tsv", "run.json", "logs", "previews")
LESION_FIELDS = {
    "volume_mm3": "Volume in mm^3.",
    **{f"{axis}_mm": f"Centroid in scanner coordinates (RAS+) in mm, axis {axis}." for axis in "xyz"},
    "peak": "Highest anomaly score.",
    "mean": "Mean anomaly score.",
    "confidence": "k / (n + 1), where the highest score of k of n held-out healthy scans lies below the peak.",
    "edge_distance_mm": "Smallest distance of a voxel from the brain's edge in mm.",
}
SCORE = "Anomaly score: 0 outside the brain, higher the less a scan looks like healthy ones; one scale for all; no probability."
MASK = "1 where the anomaly score exceeds Threshold, as little of healthy brains does."
README = f"""# Anomalies in brain MRI, found by anomri

For research; not a medical device. Files `*_desc-anomaly_...` are:

* `FLAIR`, `T1w` or `T2w`: {SCORE}
* `mask`: where that score exceeds the model's threshold, small components dropped.
* `dseg`: the connected components of the mask, numbered, with a line on each in the table.

{CITATION}
"""


@dataclass(frozen=True)
class _File:
    path: Path
    suffix: str
    entities: dict[str, Any]
    derived: bool  # it lies in ``derivatives`` of the data set

    @property
    def case(self) -> str:
        return "_".join(f"{key}-{self.entities[key]}" for key in ("sub", "ses") if key in self.entities)

    @property
    def grids(self) -> set[tuple[str, str]]:
        """The grids (space, res) it may lie on; an image without ``space`` is what others call ``space-<suffix>``."""
        space, res = str(self.entities.get("space", "")), str(self.entities.get("res", ""))
        named = SUFFIXES if self.suffix == "mask" else () if "ce" in self.entities else (self.suffix,)
        return {(space, res)} if space else {(name, res) for name in ("", *named)}

    def shows(self, what: str) -> bool:
        """Whether it is an image of that channel, or a mask of the ``brain`` or a ``lesion``."""
        if self.suffix == "mask":
            return what not in CHANNELS and what in (self.entities.get("label"), self.entities.get("desc"))
        kind = f"ce-*_{self.suffix}" if "ce" in self.entities else self.suffix
        return not self.derived and CHANNELS.get(what) == kind


def bids_cases(
    bids_dir: str | Path,
    *,
    participant_labels: Sequence[str] | None = None,
    session_labels: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> list[Case]:
    """The cases ``sub-XX[_ses-YY]`` of a BIDS data set, raw or derivative, sorted by name.

    Images come from ``sub-*/[ses-*/]anat`` of ``bids_dir`` itself; brain masks (``desc-brain``) and lesion labels
    (``label-lesion`` or ``desc-lesion``) also from its ``derivatives``. All files of a case lie in one space: that
    which offers most of ``channels`` (default: all of `CHANNELS`). Of several images of a channel the first by run
    and acquisition is taken, and ``warn`` told. A participant without any image is a case without channels.
    Raises `AnomriError` if this is no BIDS data set, or a label or all images are missing.
    """
    root = Path(bids_dir)
    _description(root)
    participants = {path.name[4:] for path in root.glob("sub-*") if path.is_dir()}
    wanted = _chosen("participant", root, sorted(participants), participant_labels)
    files = [file for file in _anatomical_files(root) if str(file.entities["sub"]) in wanted]
    sessions = sorted({str(file.entities["ses"]) for file in files if "ses" in file.entities})
    asked = _chosen("session", root, sessions, session_labels) if session_labels else [*sessions, "None"]
    by_case = defaultdict[str, list[_File]](list)
    for file in files:
        if str(file.entities.get("ses")) in asked:
            by_case[file.case].append(file)
    names = [name for name, group in by_case.items() if any(not f.derived and f.suffix in SUFFIXES for f in group)]
    if not names:
        who = ", ".join(f"sub-{label}" for label in wanted) if participant_labels else "any participant"
        elsewhere = next((file.path for file in files if file.suffix in SUFFIXES), None)
        hint = f" There is {elsewhere}: name that data set's folder instead." if elsewhere else ""
        raise AnomriError(f"{root}: no image of {who} in sub-*/[ses-*/]anat (*_{', *_'.join(SUFFIXES)}.nii.gz).{hint}")
    cases = [_case(name, by_case[name], channels or tuple(CHANNELS), warn) for name in names]
    if participant_labels or not session_labels:
        without = {f"sub-{label}" for label in wanted} - {name.split("_")[0] for name in names}
        cases += [Case(name, {}) for name in without]
    return sorted(cases, key=lambda case: case.name)


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
    """Detect in every case of a BIDS data set, after ``preparation``, and write derivatives to the data set ``out_dir``.

    A case that fails is noted in ``logs`` and the run goes on. What other runs with the same model and data set
    wrote to ``out_dir`` stays, so participants may be worked on one by one, or at the same time. Raises
    `AnomriError` if `bids_cases` does, the data set is not valid, or ``out_dir`` belongs to something else.
    """
    alone("a run over BIDS (split it by --participant-label)")
    root, out = Path(bids_dir), Path(out_dir)
    detector = model if isinstance(model, Detector) else Detector.load(model)
    channels = detector.channels
    if not CHANNELS.keys() >= set(channels):
        raise AnomriError(f"the model's channels are {', '.join(channels)}; in BIDS there are {', '.join(CHANNELS)}.")
    labels: dict[str, Any] = {"participant_labels": participant_labels, "session_labels": session_labels}
    cases = bids_cases(root, **labels, channels=channels, warn=warn)
    if not skip_bids_validation:
        validate(root, warn)
    facts = run_facts(detector, len(cases), preparation)
    _start(root, out, facts)
    logs, started, results = output_folder(out / "logs"), time.time(), list[CaseResult]()
    write_run(out, facts, started)
    try:
        read, save = partial(_read, detector, preparation, root), partial(_save, root=root, out=out)
        for result in detect_each(detector, cases, read, save, out):
            results.append(result)
            write_text(logs / f"{result.case}.json", json.dumps(asdict(result), indent=2) + "\n")
            progress(result, len(cases))
    finally:
        write_run(out, facts, started)
    return results


def run_group(out_dir: str | Path) -> Path:
    """Collect what `run_participant` left in ``out_dir`` in tables and ``report.html``; returns the report's path."""
    out = Path(out_dir)
    results = [CaseResult(**_json(path)) for path in sorted((out / "logs").glob("sub-*.json"))]
    if not results:
        raise AnomriError(f"{out}: holds no participant's results (logs/sub-*.json); run the level participant first.")
    write_tables(out, results)
    return detection_report(out)


def validate(bids_dir: Path, warn: Callable[[str], None] = lambda text: None) -> None:
    """Raise `AnomriError` with the first errors that the BIDS validator finds; ``warn`` if it is not installed."""
    name = "bids-validator-deno"
    # A virtual environment that is not activated has it beside its Python, but not on the path.
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        return warn(f"{bids_dir} was not validated: there is no {name} here; pip install {name}")
    command = [found, "--format", "json", "--ignoreWarnings", str(bids_dir)]
    ran = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    try:
        issues = json.loads(ran.stdout)["issues"]["issues"]
    except (ValueError, KeyError) as error:
        raise AnomriError(f"{name} failed ({ran.stderr.strip()[-200:]}); try --skip-bids-validation.") from error
    errors = [f"{one['code']} {one.get('location', '')}" for one in issues if one["severity"] == "error"]
    if errors:
        raise AnomriError(
            f"{bids_dir}: is not valid BIDS: {'; '.join(errors[:5])}{'; ...' if errors[5:] else ''}. Mend these "
            f"({name} {bids_dir} says more), list what is not BIDS in .bidsignore, or try --skip-bids-validation."
        )


def _anatomical_files(root: Path) -> list[_File]:
    try:
        from ancpbids import DatasetOptions, load_dataset
    except ImportError as error:
        raise AnomriError(f"BIDS needs ancpbids ({error}); pip install 'anomri[bids]'") from error
    # A pickle in the data set would be loaded, and so run, if it were not ignored.
    options = DatasetOptions(ignore=[".*", "sourcedata", "code"], ignore_pickle_file=True)
    dataset: Any = load_dataset(str(root), options)
    files: list[_File] = []
    for artifact in dataset.query(suffix=[*SUFFIXES, "mask"], extension=[".nii", ".nii.gz"]):
        path = Path(artifact.get_relative_path())
        file = _File(root / path, artifact.suffix, dict(artifact.entities), path.parts[0] == "derivatives")
        place = Path(*file.case.split("_"), "anat")
        inside = path.parent.parts[-len(place.parts) :] == place.parts if file.derived else path.parent == place
        if inside and file.case.startswith("sub-") and file.entities.get("desc") != "anomaly":
            files.append(file)
    # Aligned, so that run 2 comes before run 10.
    return sorted(files, key=lambda f: (f.derived, f"{f.entities.get('run', ''):>9} {f.entities.get('acq')}", f.path))


def _case(name: str, files: Sequence[_File], channels: Sequence[str], warn: Callable[[str], None]) -> Case:
    def offers(grid: tuple[str, str], wanted: Sequence[str]) -> int:
        return sum(any(grid in file.grids and file.shows(channel) for file in files) for channel in wanted)

    grids = {grid for file in files if file.suffix in SUFFIXES and not file.derived for grid in file.grids}
    # FLAIR shows most lesions best: a space that has it comes before one with more of the others.
    bright = [channel for channel in channels if channel == "flair"]
    chosen = min(grids, key=lambda grid: (-offers(grid, bright), -offers(grid, channels), grid))
    paths: dict[str, Path] = {}
    for what in (*channels, "brain", "lesion"):
        found = [file.path for file in files if chosen in file.grids and file.shows(what)]
        if found:
            paths[what] = found[0]
        if len(found) > 1:
            others = ", ".join(path.name for path in found[1:])
            warn(f"{name}: {len(found)} files for {what}; {found[0].name} is taken, not {others}.")
    mask, label = paths.pop("brain", None), paths.pop("lesion", None)
    return Case(name, paths, label, mask)


def _read(detector: Detector, preparation: Preparation, root: Path, case: Case) -> Volume:
    wanted = detector.channels
    missing = ", ".join(f"{name} (*_{CHANNELS[name]}.nii.gz)" for name in wanted if name not in case.channels)
    if missing and not (detector.takes_subsets and case.channels):
        folder, found = root.joinpath(*case.name.split("_"), "anat"), ", ".join(case.channels) or "none"
        raise AnomriError(
            f"{case.name}: no image for channel {missing} in {folder} (channels found in one space: {found}). Add it, "
            f"or choose others with --participant-label."
        )
    return detector.read(case, preparation)


def _save(case: Case, detection: Detection, root: Path, out: Path) -> None:
    geometry, spec, thresholds = detection.volume.geometry, detection.spec, detection.spec.thresholds
    images = [case.channels[channel] for channel in detection.channels]
    sources = [f"bids:source:{quote(path.relative_to(root).as_posix())}" for path in (*images, case.mask) if path]
    space = [part for path in images for part in path.name.split("_") if part.startswith("space-")]
    folder = output_folder(out.joinpath(*case.name.split("_"), "anat"))
    stem = "_".join([case.name, *space[:1], "desc-anomaly"])

    def write(kind: str, data: NDArray[Any], high: float, made_from: list[str], about: dict[str, object]) -> list[str]:
        path = folder / f"{stem}_{kind}.nii.gz"
        write_image(path, data, geometry, (0, high) if kind in ("mask", "dseg") else detection.display_range)
        said = {**about, "Sources": made_from, "SpatialReference": sources[0]}
        write_text(folder / f"{stem}_{kind}.json", json.dumps(said, indent=2) + "\n")
        return ["bids::" + path.relative_to(out).as_posix()]

    about = {"Description": SCORE, "SkullStripped": True, "Channels": detection.channels, "Method": spec.method}
    made = write(CHANNELS[detection.channels[0]].split("_")[-1], detection.anomaly_map, 0, sources, about)
    if detection.mask is None or thresholds is None:
        return
    about = {"Description": MASK, "Type": "Lesion", "Threshold": detection.threshold}
    if thresholds.voxel_rate is not None:
        about["VoxelFalsePositiveRate"] = thresholds.voxel_rate
    else:
        about["FalsePositiveVolume"] = f"{thresholds.chosen_ml} ml in a mean healthy scan"
    made = write("mask", detection.mask.astype(np.uint8), 1, made, about)
    about = {name: {"Description": text} for name, text in LESION_FIELDS.items()}
    about |= {"Description": "The connected components of the mask, numbered from the largest down.", "Manual": False}
    write("dseg", lesion_labels(detection.mask), max(1, len(detection.lesions)), made, about)
    rows = []
    for one in detection.lesions:
        scores = (one.peak, one.mean, one.confidence, one.edge_distance_mm)
        known = ("n/a" if score is None else f"{score:.5g}" for score in scores)
        rows.append((one.lesion, f"lesion {one.lesion}", one.volume_mm3, *one.centroid_mm, *known))
    write_text(folder / f"{stem}_dseg.tsv", tsv(("index", "name", *LESION_FIELDS), rows))


def _start(root: Path, out: Path, facts: dict[str, object]) -> None:
    """Make ``out`` a derivative data set, or see that it is one of the same input and model."""
    try:
        link = quote(Path(os.path.relpath(root.resolve(), out.resolve())).as_posix())
    except ValueError as error:
        raise AnomriError(f"{out}: lies on another drive than {root}; name a folder on the same one.") from error
    path, source = out / "dataset_description.json", _description(root)
    old = _json(path) if path.is_file() else {}
    if old and '"anomri"' not in json.dumps(old.get("GeneratedBy")):
        raise AnomriError(f"{path}: describes a data set that anomri did not write; name another output folder.")
    if old.get("DatasetLinks", {"source": link}) != {"source": link}:
        raise AnomriError(f"{path}: holds results of {old['DatasetLinks']}, not of {link}; name another output folder.")
    if (out / "run.json").is_file():
        said, now = _json(out / "run.json"), json.loads(json.dumps(facts))
        other = [
            key for key in ("method", "channels", "score", "thresholds", "preparation") if said.get(key) != now[key]
        ]
        if other:
            raise AnomriError(
                f"{out / 'run.json'}: holds results of another model (of another {', '.join(other)}); name another output folder."
            )
    described = {
        "Name": f"Anomalies in {source.get('Name', 'brain MRI')}",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "SourceDatasets": [{"URL": link} | ({"DOI": source["DatasetDOI"]} if "DatasetDOI" in source else {})],
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


def _description(root: Path) -> dict[str, Any]:
    if not (path := root / "dataset_description.json").is_file():
        found = ", ".join(sorted(entry.name for entry in root.glob("*"))[:5]) or "nothing"
        raise AnomriError(f"{path}: no such file, so this is no BIDS data set (found: {found}); name another folder.")
    return _json(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise AnomriError(f"{path}: cannot be read as a JSON object ({error}); mend it.") from error


def _chosen(kind: str, root: Path, found: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    labels = [label.strip().removeprefix("sub-").removeprefix("ses-") for label in asked or found]
    unknown = [label for label in labels if label not in found]
    if unknown:
        some = ", ".join(found[:10]) + (", ..." if found[10:] else "")
        raise AnomriError(f"{root}: no {kind} {', '.join(unknown)}; labels found: {some or 'none'}.")
    return labels
