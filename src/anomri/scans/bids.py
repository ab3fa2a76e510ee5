"""The scans of a BIDS data set: each participant's channels, brain mask and lesion label."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.files import read_json
from anomri.optional import import_extra
from anomri.scans.case import Case
from anomri.scans.cohort import LeftOut

CHANNELS = {"flair": "FLAIR", "t1": "T1w", "t1ce": "ce-*_T1w", "t2": "T2w"}
"""How the names of each channel's images end; ``ce`` says that a contrast agent was given."""
SUFFIXES = ("FLAIR", "T1w", "T2w")
LIKE_A_LESION = re.compile(
    r"lesion|tumou?r|wm[hl]|infarct|stroke|_msk|_(FLAIR|T1w|T2w)_roi"
    r"|(label|desc|seg)-(gt|consensus)|(label|seg)-manual",
    re.IGNORECASE,
)
"""What may make a file a label if it stands in its name behind participant and session."""


@dataclass(frozen=True)
class _File:
    path: Path
    suffix: str
    entities: dict[str, Any]
    derived: bool
    """Whether it lies in ``derivatives`` of the data set."""

    @property
    def is_image(self) -> bool:
        """Whether it is an image of the data set itself."""
        return self.suffix in SUFFIXES and not self.derived

    @property
    def case(self) -> str:
        return "_".join(
            f"{key}-{self.entities[key]}" for key in ("sub", "ses") if key in self.entities
        )

    @property
    def grids(self) -> set[tuple[str, str]]:
        """The grids (space, res) it may lie on.

        The grid of an image without ``space`` may be called ``space-<suffix>`` by other files.
        """
        space, res = str(self.entities.get("space", "")), str(self.entities.get("res", ""))
        if space:
            return {(space, res)}
        spaces = {""}
        if self.suffix == "mask":
            spaces.update(SUFFIXES)
        elif "ce" not in self.entities:
            spaces.add(self.suffix)
        return {(name, res) for name in spaces}

    def shows(self, what: str) -> bool:
        """Whether it is an image of that channel, or a mask of the ``brain`` or a ``lesion``."""
        if self.suffix == "mask":
            return what not in CHANNELS and what in (
                self.entities.get("label"),
                self.entities.get("desc"),
            )
        kind = f"ce-*_{self.suffix}" if "ce" in self.entities else self.suffix
        return not self.derived and CHANNELS.get(what) == kind


def bids_cases(
    bids_dir: str | Path,
    *,
    participant_labels: Sequence[str] | None = None,
    session_labels: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    warn: Callable[[str], None] | None = None,
) -> list[Case]:
    """The cases ``sub-XX[_ses-YY]`` of a BIDS data set, raw or derivative, sorted by name.

    Images come from ``sub-*/[ses-*/]anat`` of ``bids_dir`` itself; brain masks (``desc-brain``) and
    lesion labels (``label-lesion`` or ``desc-lesion``) also from its ``derivatives``. All files of
    a case lie in one space: the one with most of ``channels`` (default: all of `CHANNELS`). If a
    channel has several images, the first by run and acquisition is taken, and ``warn`` is called.
    A participant without any image is a case without channels. Raises `AnomriError` if this is not
    a BIDS data set, or if a label or all images are missing.
    """
    cases, _ = read_bids(
        bids_dir,
        participant_labels=participant_labels,
        session_labels=session_labels,
        channels=channels,
    )
    if warn:
        for note in [note for case in cases for note in case.notes]:
            warn(note)
    return [replace(case, notes=()) for case in cases]


def read_bids(
    bids_dir: str | Path,
    *,
    participant_labels: Sequence[str] | None = None,
    session_labels: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
) -> tuple[list[Case], list[LeftOut]]:
    """`bids_cases`, with the warnings as the cases' notes, and the files that no case takes."""
    root = Path(bids_dir)
    read_description(root)
    participants = {path.name[4:] for path in root.glob("sub-*") if path.is_dir()}
    wanted = _select("participant", root, sorted(participants), participant_labels)
    files = [file for file in _anatomical_files(root) if str(file.entities["sub"]) in wanted]
    sessions = sorted({str(file.entities["ses"]) for file in files if "ses" in file.entities})
    asked = [*sessions, "None"]
    if session_labels:
        asked = _select("session", root, sessions, session_labels)
    by_case = defaultdict[str, list[_File]](list)
    for file in files:
        if str(file.entities.get("ses")) in asked:
            by_case[file.case].append(file)
    names = [name for name, group in by_case.items() if any(file.is_image for file in group)]
    if not names:
        raise _no_image(root, files, wanted if participant_labels else None)
    cases: list[Case] = []
    left_out: list[LeftOut] = []
    for name in names:
        case, others = _choose_files(name, by_case[name], channels or tuple(CHANNELS))
        cases.append(case)
        left_out += others
    if participant_labels or not session_labels:
        without_image = {f"sub-{label}" for label in wanted} - {
            name.split("_")[0] for name in names
        }
        cases += [Case(name, {}) for name in without_image]
    return sorted(cases, key=lambda case: case.name), left_out


def _no_image(root: Path, files: Sequence[_File], labels: Sequence[str] | None) -> AnomriError:
    who = ", ".join(f"sub-{label}" for label in labels or ()) or "any participant"
    elsewhere = next((file.path for file in files if file.suffix in SUFFIXES), None)
    hint = f" There is {elsewhere}: name that data set's folder instead." if elsewhere else ""
    return AnomriError(
        f"{root}: no image of {who} in sub-*/[ses-*/]anat (*_{', *_'.join(SUFFIXES)}.nii.gz).{hint}"
    )


def check_labels(bids_dir: Path, cases: Sequence[Case]) -> None:
    """Raise `AnomriError` if a file may be a label that is not read as one.

    Its slices would be taken for healthy.
    """
    labelled = {case.name for case in cases if case.label}
    images = {path for case in cases for path in case.channels.values()}
    for path in sorted(bids_dir.rglob("*.nii*")):
        whose = re.match(r"sub-[A-Za-z0-9]+(_ses-[A-Za-z0-9]+)?", path.name)
        named = whose.group() if whose else ""
        # A case with several labels uses the first, and a note says so.
        if (
            path not in images
            and named not in labelled
            and LIKE_A_LESION.search(path.name[len(named) :])
        ):
            raise AnomriError(
                f"{path}: looks like the label of a lesion, but is not read as one: labels are "
                f"derivatives/*/sub-*/[ses-*/]anat/*_label-lesion_mask.nii.gz in the space of the "
                f"images. Rename it, or name "
                f"all files in a .tsv; to detect, `anomri bids` needs no labels."
            )


def validate(bids_dir: Path, warn: Callable[[str], None]) -> None:
    """Raise `AnomriError` with the first errors that the BIDS validator finds.

    If the validator is not installed, ``warn`` is called and nothing is checked.
    """
    name = "bids-validator-deno"
    # In a virtual environment that is not activated it lies beside Python, but not on the path.
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        warn(f"{bids_dir} was not validated: {name} is not installed; pip install {name}")
        return
    command = [found, "--format", "json", "--ignoreWarnings", str(bids_dir)]
    ran = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    try:
        issues = json.loads(ran.stdout)["issues"]["issues"]
    except (ValueError, KeyError) as error:
        raise AnomriError(
            f"{name} failed ({ran.stderr.strip()[-200:]}); try --skip-bids-validation."
        ) from error
    errors = [
        f"{one['code']} {one.get('location', '')}" for one in issues if one["severity"] == "error"
    ]
    if errors:
        raise AnomriError(
            f"{bids_dir}: is not valid BIDS: {'; '.join(errors[:5])}{'; ...' if errors[5:] else ''}."
            f" Correct these ({name} {bids_dir} says more), list what is not BIDS in .bidsignore, or"
            " try --skip-bids-validation."
        )


def read_description(root: Path) -> dict[str, Any]:
    """The ``dataset_description.json`` of a data set; raises `AnomriError` if there is none."""
    if not (path := root / "dataset_description.json").is_file():
        found = ", ".join(sorted(entry.name for entry in root.glob("*"))[:5]) or "nothing"
        raise AnomriError(
            f"{path}: no such file, so this is not a BIDS data set (found: {found}); name another"
            " folder."
        )
    return read_json(path)


def _select(kind: str, root: Path, found: Sequence[str], asked: Sequence[str] | None) -> list[str]:
    labels = [label.strip().removeprefix("sub-").removeprefix("ses-") for label in asked or found]
    unknown = [label for label in labels if label not in found]
    if unknown:
        some = ", ".join(found[:10]) + (", ..." if found[10:] else "")
        raise AnomriError(
            f"{root}: no {kind} {', '.join(unknown)}; labels found: {some or 'none'}."
        )
    return labels


def _anatomical_files(root: Path) -> list[_File]:
    ancpbids = import_extra("ancpbids", "bids", "BIDS")
    # ancpbids would load a pickle in the data set, and so run its code.
    options = ancpbids.DatasetOptions(ignore=[".*", "sourcedata", "code"], ignore_pickle_file=True)
    dataset: Any = ancpbids.load_dataset(str(root), options)
    files: list[_File] = []
    for artifact in dataset.query(suffix=[*SUFFIXES, "mask"], extension=[".nii", ".nii.gz"]):
        path = Path(artifact.get_relative_path())
        file = _File(
            root / path, artifact.suffix, dict(artifact.entities), path.parts[0] == "derivatives"
        )
        place = Path(*file.case.split("_"), "anat")
        inside = (
            path.parent.parts[-len(place.parts) :] == place.parts
            if file.derived
            else path.parent == place
        )
        if inside and file.case.startswith("sub-") and file.entities.get("desc") != "anomaly":
            files.append(file)
    # Aligned, so that run 2 comes before run 10.
    return sorted(
        files,
        key=lambda f: (
            f.derived,
            f"{f.entities.get('run', ''):>9} {f.entities.get('acq')}",
            f.path,
        ),
    )


def _choose_files(
    name: str, files: Sequence[_File], channels: Sequence[str]
) -> tuple[Case, list[LeftOut]]:
    """The files of one case, all on one grid, and those that it does not take."""
    grid = _choose_grid(files, channels)
    paths: dict[str, Path] = {}
    notes: list[str] = []
    reasons: dict[Path, str] = {}
    for what in (*channels, "brain", "lesion"):
        found = _showing(what, grid, files)
        first = CHANNELS.get(next(iter(paths), ""))
        if not found and what not in CHANNELS and not grid[0] and first in SUFFIXES:
            # The images name no space: masks on their grid may be named after the first of them.
            found = _showing(what, (first, grid[1]), files)
        if not found:
            continue
        paths[what] = found[0]
        for path in found[1:]:
            reasons[path] = f"another file is taken for {what}"
        if len(found) > 1:
            others = ", ".join(path.name for path in found[1:])
            notes.append(
                f"{name}: {len(found)} files for {what}; {found[0].name} is taken, not {others}."
            )
    left_out = [
        LeftOut(file.path, reasons.get(file.path, "lies in another space or shows something else"))
        for file in files
        if file.path not in paths.values()
    ]
    mask, label = paths.pop("brain", None), paths.pop("lesion", None)
    return Case(name, paths, label, mask, notes=tuple(notes)), left_out


def _choose_grid(files: Sequence[_File], channels: Sequence[str]) -> tuple[str, str]:
    """The grid with most channels; FLAIR, which shows most lesions best, counts before others."""

    def order(grid: tuple[str, str]) -> tuple[int, int, tuple[str, str]]:
        offered = [channel for channel in channels if _showing(channel, grid, files)]
        return -offered.count("flair"), -len(offered), grid

    return min({grid for file in files if file.is_image for grid in file.grids}, key=order)


def _showing(what: str, grid: tuple[str, str], files: Sequence[_File]) -> list[Path]:
    return [file.path for file in files if grid in file.grids and file.shows(what)]
