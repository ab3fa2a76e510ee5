"""The scans of a BIDS data set: each participant's channels, brain mask and lesion label."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.files import read_json
from anomri.optional import import_extra
from anomri.scans.bids_files import (
    CHANNELS,
    SUFFIXES,
    BidsFile,
    Choice,
    Fit,
    choose_together,
    different_repeats,
)
from anomri.scans.case import Case
from anomri.scans.cohort import LeftOut

LIKE_A_LESION = re.compile(
    r"lesion|tumou?r|wm[hl]|infarct|stroke|_msk|_(FLAIR|T1w|T2w)_roi"
    r"|(label|desc|seg)-(gt|consensus)|(label|seg)-manual",
    re.IGNORECASE,
)
"""What may make a file a label if it stands in its name behind participant and session."""


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
    a case lie in one space: the one with most of ``channels`` (default: all of `CHANNELS`). Images,
    mask and label are of the same run, acquisition and so on (`bids_files`). If a channel has
    several such images, the first by run and acquisition is taken, and ``warn`` is called. A case
    whose mask or channels are of different images has a ``problem``. A participant without any
    image is a case without channels. Raises `AnomriError` if this is not a BIDS data set, or if a
    label or all images are missing.
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
    by_case = defaultdict[str, list[BidsFile]](list)
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
        unread = [file for file in by_case[name.split("_")[0]] if "_" in name]
        cases.append(replace(case, notes=(*case.notes, *_notes_without_session(name, unread))))
        left_out += others
    for name, group in by_case.items():
        if name not in names:
            reason = f"no image of {name} lies beside it"
            left_out += [LeftOut(file.path, reason) for file in group]
    if participant_labels or not session_labels:
        without_image = {f"sub-{label}" for label in wanted} - {
            name.split("_")[0] for name in names
        }
        cases += [Case(name, {}) for name in without_image]
    return sorted(cases, key=lambda case: case.name), left_out


def _notes_without_session(name: str, files: Sequence[BidsFile]) -> list[str]:
    """Notes on brain masks of the participant that do not say which session they belong to."""
    return [
        f"{name}: {file.path.name} is not used: its name says no session."
        for file in files
        if file.shows("brain")
    ]


def _no_image(root: Path, files: Sequence[BidsFile], labels: Sequence[str] | None) -> AnomriError:
    who = ", ".join(f"sub-{label}" for label in labels or ()) or "any participant"
    elsewhere = next((file.path for file in files if file.suffix in SUFFIXES), None)
    hint = f" There is {elsewhere}: name that data set's folder instead." if elsewhere else ""
    return AnomriError(
        f"{root}: no image of {who} in sub-*/[ses-*/]anat (*_{', *_'.join(SUFFIXES)}.nii.gz).{hint}"
    )


def check_labels(bids_dir: Path, cases: Sequence[Case], left_out: Sequence[LeftOut] = ()) -> None:
    """Raise `AnomriError` if a file may be a label that is not read as one.

    Its slices would be taken for healthy. ``left_out`` says why files are not read.
    """
    reasons = dict(left_out)
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
            reason = f" ({reasons[path]})" if path in reasons else ""
            raise AnomriError(
                f"{path}: looks like the label of a lesion, but is not read as one{reason}: labels are "
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


def _anatomical_files(root: Path) -> list[BidsFile]:
    ancpbids = import_extra("ancpbids", "bids", "BIDS")
    # ancpbids would load a pickle in the data set, and so run its code.
    options = ancpbids.DatasetOptions(ignore=[".*", "sourcedata", "code"], ignore_pickle_file=True)
    dataset: Any = ancpbids.load_dataset(str(root), options)
    files: list[BidsFile] = []
    for artifact in dataset.query(suffix=[*SUFFIXES, "mask"], extension=[".nii", ".nii.gz"]):
        path = Path(artifact.get_relative_path())
        file = BidsFile(
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
    name: str, files: Sequence[BidsFile], channels: Sequence[str]
) -> tuple[Case, list[LeftOut]]:
    """The files of one case, all on one grid, and those that it does not take."""
    grid = _choose_grid(files, channels)
    # Images that are not asked for may be those that a mask was drawn on.
    every = dict.fromkeys((*channels, *CHANNELS))
    images = {channel: found for channel in every if (found := _showing(channel, grid, files))}
    masks = {what: _showing(what, grid, files) for what in ("brain", "lesion")}
    first = CHANNELS.get(next((channel for channel in channels if channel in images), ""))
    if first in SUFFIXES and not grid[0]:
        # The images name no space: masks on their grid may be named after the first of them.
        for what, found in masks.items():
            masks[what] = found or _showing(what, (first, grid[1]), files)
    choice = choose_together(images, masks, channels)
    reasons: dict[Path, str] = {}
    notes: list[str] = []
    for what, found in {**images, **masks}.items():
        if what not in (*channels, *masks) or not found:
            continue
        taken = choice.images[what] if what in images else choice.masks[what]
        others = [file.path for file in found if file is not taken]
        reasons.update(dict.fromkeys(others, f"another file is taken for {what}"))
        notes += _note_choice(name, what, taken.path, others)
    label, label_notes = _label(name, choice, images, reasons)
    mask, mask_notes = _brain_mask(name, choice, images)
    paths = {channel: image.path for channel, image in choice.images.items() if channel in channels}
    used = {*paths.values(), label, mask}
    left_out = [
        LeftOut(file.path, reasons.get(file.path) or _reason(file))
        for file in files
        if file.path not in used
    ]
    problem = _mask_problem(name, choice) or _repeats_problem(name, choice, channels)
    all_notes = (*notes, *label_notes, *mask_notes)
    return Case(name, paths, label, mask, notes=all_notes, problem=problem), left_out


def _note_choice(name: str, what: str, taken: Path, others: Sequence[Path]) -> list[str]:
    """A note that one of several files is taken; nothing if there is only one."""
    if not others:
        return []
    same_names = len({taken.name, *(path.name for path in others)}) <= len(others)
    first, *rest = [str(path) if same_names else path.name for path in (taken, *others)]
    return [f"{name}: {len(others) + 1} files for {what}; {first} is taken, not {', '.join(rest)}."]


def _label(
    name: str,
    choice: Choice,
    images: Mapping[str, Sequence[BidsFile]],
    reasons: dict[Path, str],
) -> tuple[Path | None, list[str]]:
    """The label, if it surely belongs to the images that are taken; else none, with a note."""
    label = choice.masks.get("lesion")
    if label is None or choice.fits["lesion"] == Fit.SURE:
        return (label.path if label else None), []
    if choice.fits["lesion"] == Fit.AMBIGUOUS:
        names = " or ".join(_possible(label, images))
        reason = f"its name does not say whether it belongs to {names}"
    else:
        names = ", ".join(image.path.name for image in choice.images.values())
        reason = f"its name says another image than {names}"
    reasons[label.path] = reason
    return None, [f"{name}: {label.path.name} is not read: {reason}."]


def _brain_mask(
    name: str, choice: Choice, images: Mapping[str, Sequence[BidsFile]]
) -> tuple[Path | None, list[str]]:
    mask = choice.masks.get("brain")
    if mask is None or choice.fits["brain"] != Fit.AMBIGUOUS:
        return (mask.path if mask else None), []
    names = " or ".join(_possible(mask, images))
    return mask.path, [
        f"{name}: {mask.path.name} does not say whether it belongs to {names}; it is used."
    ]


def _possible(mask: BidsFile, images: Mapping[str, Sequence[BidsFile]]) -> list[str]:
    """The names of the images that a mask may belong to."""
    every = [image for found in images.values() for image in found]
    return [image.path.name for image in every if mask.names_image(image)]


def _mask_problem(name: str, choice: Choice) -> str:
    if choice.fits.get("brain") != Fit.NONE:
        return ""
    mask = choice.masks["brain"].path
    images = ", ".join(image.path.name for image in choice.images.values())
    return (
        f"{name}: {mask} is the brain mask of another image than {images}, as their names say; add"
        " that image, give the mask the entities of the image it belongs to, or remove it."
    )


def _repeats_problem(name: str, choice: Choice, channels: Sequence[str]) -> str:
    images = different_repeats(choice.images, channels)
    if images is None:
        return ""
    one, other = images
    return (
        f"{name}: {one.path} and {other.path.name} are of different runs; add the image of the same"
        " run, or remove one of the two."
    )


def _reason(file: BidsFile) -> str:
    if not file.is_magnitude:
        return f"is part-{file.entities['part']}, not an image of magnitudes"
    return "lies in another space or shows something else"


def _choose_grid(files: Sequence[BidsFile], channels: Sequence[str]) -> tuple[str, str]:
    """The grid with most channels; FLAIR, which shows most lesions best, counts before others."""

    def order(grid: tuple[str, str]) -> tuple[int, int, tuple[str, str]]:
        offered = [channel for channel in channels if _showing(channel, grid, files)]
        return -offered.count("flair"), -len(offered), grid

    return min({grid for file in files if file.is_image for grid in file.grids}, key=order)


def _showing(what: str, grid: tuple[str, str], files: Sequence[BidsFile]) -> list[BidsFile]:
    return [file for file in files if grid in file.grids and file.shows(what)]
