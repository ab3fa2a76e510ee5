"""Finding the scans of a cohort: BraTS folders, flat folders, BIDS data sets, tables; nothing is opened here but tables.

A case is one scan; whose it is, its ``subject``, is known from a folder of visits or a table, else from its name (`Case.patient`).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from anomri.errors import AnomriError
from anomri.files import read_json
from anomri.scans.bids import bids_cases, check_labels
from anomri.scans.case import Case, case_from_kinds, note_choice
from anomri.scans.names import (
    ANNOTATIONS,
    CHANNELS,
    IMAGES,
    LABEL_NAMES,
    SUFFIXES,
    bare_name,
    channel_name,
    folder_name,
    may_name_files,
    preference,
    split_folder,
    split_name,
    split_names,
)
from anomri.scans.splits import SPLITS, assign_splits, read_splits
from anomri.scans.tables import read_table

VISIT = re.compile(
    r"ses(sion)?[-_]?[a-z0-9]+|(visit|v|m|tp|time(point)?|scan|exam|day|week|month|year|fu|follow[-_]?up)[-_]?\d+"
    r"|baseline|bl|follow[-_]?up|(19|20)\d\d([-_.]?\d\d){0,2}",
    re.IGNORECASE,
)
"""How the folder of a visit may be called; any other folder in a patient's may hold a channel, a label, another patient."""
STEPS = (
    *("pre", "preproc", "preprocessed", "preprocessed_data", "processed"),
    *("orig", "original", "raw", "raw_data", "native"),
)
"""How the folders of a scan's images before and after processing are called, first those on which lesions are drawn."""
BESIDE = (
    "mask",
    "masks",
    "label",
    "labels",
    "lesion",
    "lesions",
    "seg",
    "segmentation",
    "segmentations",
)
"""How the folders of masks, the first two, and of labels are called that lie beside those of `STEPS`."""
Listing = tuple[list[Path], list[Path]]
"""Images and folders in a folder."""


def find_cases(cohort: str | Path) -> list[Case]:
    """The cases of a cohort, sorted by name.

    ``cohort`` is one of

    * a folder in the BraTS layout, ``<case>/<case>_<channel>.nii.gz``;
    * a flat folder, ``<case>_<channel>.nii.gz``, also that of a single case;
    * a folder of one folder a patient, in which files are called ``<channel>.nii.gz``, or alike in all of them;
    * the same with a folder for each `VISIT`, ``<patient>/<visit>/<channel>.nii.gz``; all images there are one case, called
      ``<patient>_<visit>``, and all visits of a patient are one ``subject``'s;
    * the same with a folder for each of the `STEPS` of processing, ``<patient>/pre/<channel>.nii.gz``, of which the first is
      taken; labels and masks may lie above it, or beside it in a folder called so (WMH 2017, MSSEG 2016, ISBI 2015);
    * a BIDS data set, raw or derivative (`bids.bids_cases`: FLAIR, T1w, ``ce-*_T1w`` and T2w), but for participants
      without an image;
    * a raw data set of nnU-Net, its channels by the names in ``dataset.json``; what is in ``imagesTs`` is for testing;
    * a ``.tsv`` with a column ``case``, one per channel, and optionally ``mask``, ``label``, ``split``,
      ``subject`` (whose scans must not be split); its paths are relative to the table;
    * one NIfTI file, a case of one channel.

    ``_seg``, ``_lesion``, ``_lesion_mask`` and the like mark the lesion label (`names.LABEL_NAMES`; of several one is
    taken, with a note), ``_mask`` or ``_brainmask`` the brain mask; channel names are lower case, and ``t1w``, ``t1c``,
    ``T2_FLAIR``, ... are taken for what they are (`names.ALIASES`), also behind a hyphen and with ``_n4``, ``_reg`` or the
    like behind them. Of an image and the same with ``_brain`` or ``_bet`` behind its name, the brain is taken; of one that its
    name says was processed and another, the other; segmentations of healthy tissue are left alone. What `anomri detect`
    wrote there is no scan. A ``splits.csv`` (case,split) in the folder gives each case its split. Nothing is opened but
    tables. Raises `AnomriError` if there is nothing, or something that does not fit.
    """
    path = Path(cohort)
    if path.is_dir():
        if (path / "dataset.json").is_file() and (path / "imagesTr").is_dir():
            cases = _cases_of_nnunet(path)
        else:
            cases = _cases_in_folder(path) or (_cases_in_bids(path) if _is_bids(path) else [])
        splits = path / "splits.csv"
        if splits.is_file():
            cases = assign_splits(cases, read_splits(splits))
    elif path.name.lower().endswith(".tsv") and path.is_file():
        cases = _cases_in_table(path)
    elif path.name.lower().endswith(SUFFIXES) and path.is_file():
        stem, channel = split_name(path)
        name = stem or (folder_name(path.parent) if channel in CHANNELS else channel)
        cases = [Case(name, {channel: path})]
    elif path.exists():
        raise AnomriError(
            f"{path}: not a folder, a .tsv, a .nii or a .nii.gz; those are what a cohort can be."
        )
    else:
        raise AnomriError(f"{path}: no such file or folder.")
    deeper = None
    if not any(case.channels for case in cases) and path.is_dir():
        known = {file for case in cases for file in (case.label, case.mask)}
        images = (one for one in path.glob("*/*/**/*") if one.name.lower().endswith(SUFFIXES))
        deeper = next(
            (
                one
                for one in images
                if one not in known and (not cases or split_name(one)[1] in IMAGES)
            ),
            None,
        )
    if not cases or deeper:
        hint = (
            f" There is {deeper}: name a folder that is nearer, or write a .tsv." if deeper else ""
        )
        labels = " but labels and masks" if cases else ""
        raise AnomriError(
            f"{path}: no scans found{labels}. Expected NIfTI files, <case>/<case>_<channel>.nii.gz, <case>_<channel>.nii.gz, "
            f"<patient>/<visit>/<channel>.nii.gz, a data set of BIDS or nnU-Net, or a .tsv.{hint}"
        )
    return sorted(cases, key=lambda case: case.name)


def _cases_of_nnunet(folder: Path) -> list[Case]:
    facts = read_json(folder / "dataset.json")
    named = facts.get("channel_names") or facts.get("modality")
    if not isinstance(named, dict) or not all(str(number).isdigit() for number in named):
        raise AnomriError(
            f"{folder / 'dataset.json'}: has no channel_names as {{'0': 'FLAIR', ...}}; name them there."
        )
    channels = {
        f"{int(n):04d}": channel_name(re.sub("[^a-z0-9]", "", str(name).lower()))
        for n, name in named.items()
    }
    tested = (folder / "imagesTs").is_dir()
    cases: list[Case] = []
    for part, split in (("Tr", "train"), ("Ts", "test"))[: 1 + tested]:
        images: dict[str, dict[str, Path]] = {}
        for path in _listed(folder / f"images{part}")[0]:
            name, _, number = bare_name(path).rpartition("_")
            if number not in channels:
                raise AnomriError(
                    f"{path}: does not end in one of {', '.join(channels)}, as dataset.json has them; write one 3D file for each."
                )
            other = images.setdefault(name, {}).setdefault(channels[number], path)
            if other is not path:
                raise AnomriError(
                    f"{other} and {path} are both {channels[number]} of {name}; name each channel once."
                )
        there = folder / f"labels{part}"
        labels = {bare_name(path): path for path in _listed(there)[0]} if there.is_dir() else {}
        for name in {**images, **labels}:
            cases.append(
                Case(name, images.get(name, {}), labels.get(name), split=split if tested else None)
            )
    return cases


def _is_bids(folder: Path) -> bool:
    places = ("sub-*/anat", "sub-*/ses-*/anat")
    return (folder / "dataset_description.json").is_file() and any(
        any(folder.glob(place)) for place in places
    )


def _cases_in_bids(folder: Path) -> list[Case]:
    told: list[str] = []
    cases = [case for case in bids_cases(folder, warn=told.append) if case.channels]
    check_labels(folder, cases)
    return [
        replace(case, notes=tuple(text for text in told if text.startswith(f"{case.name}: ")))
        for case in cases
    ]


def _cases_in_folder(folder: Path) -> list[Case]:
    loose, subfolders = _listed(folder)
    listed = {place: _listed(place) for place in subfolders}
    own, note = _processed(folder, loose, listed) if _is_one_patient(folder, listed) else ([], "")
    if own:
        listed = {}
    visits = _visits({place: deeper for place, (_, deeper) in listed.items()})
    listed |= {place: _listed(place) for place in visits}
    stepped = {place: _steps_in(place, *inside) for place, inside in listed.items()}
    places = {folder: own or loose} | {
        place: stepped[place][0] or files for place, (files, _) in listed.items()
    }
    told = {
        path: text for files, text in ((own, note), *stepped.values()) if text for path in files
    }
    images = split_names({place: places[place] for place in sorted(places)})
    patients = _patients_folders(
        folder, {place: named for place, named in images.items() if place not in visits}
    )
    found: dict[str, dict[str, list[Path]]] = {}
    for place, named in images.items():
        for path, (stem, kind) in named.items():
            name = visits.get(place) or (
                folder_name(place) if not stem or place in patients else stem
            )
            found.setdefault(name, {}).setdefault(kind, []).append(path)
    subjects = {name: place.parent.name for place, name in visits.items()}
    cases = []
    for name, files in found.items():
        case = _case(name, files)
        notes = {f"{name}: {told[path]}" for path in case.channels.values() if path in told}
        cases.append(replace(case, subject=subjects.get(name), notes=(*case.notes, *sorted(notes))))
    return [case for case in cases if case.channels or case.label or case.mask]


def _is_one_patient(folder: Path, listed: Mapping[Path, Listing]) -> bool:
    """Whether the folders in a cohort's are `STEPS` of one patient's scans, not of a whole cohort, nor patients."""
    if not any(one.name.lower() in STEPS for one in listed):
        return False
    stems = {one: _stems(split_folder(images)) for one, (images, _) in listed.items()}
    if any(found and one.name.lower() not in (*STEPS, *BESIDE) for one, found in stems.items()):
        return False
    in_steps = set[str]().union(
        *(found for one, found in stems.items() if one.name.lower() in STEPS)
    )
    beside = [inside for one, inside in listed.items() if one.name.lower() not in STEPS]
    if in_steps <= {"", folder_name(folder)}:
        return not any(deeper for _, deeper in beside)
    # Cases may be called after their cohort; of a patient's several scans all lie in the first step, and all else is read.
    own, _ = _processed(folder, [], listed)
    rest = {path for images, _ in beside for path in split_folder(images)}
    return rest <= {*own} and in_steps <= _stems(split_folder(own))


def _stems(named: Mapping[Path, tuple[str, str]]) -> set[str]:
    return {stem for stem, kind in named.values() if kind in IMAGES}


def _steps_in(
    place: Path, images: Sequence[Path], folders: Sequence[Path]
) -> tuple[list[Path], str]:
    """`_processed` of a folder, if one in it may be a step: no other is looked into."""
    if not any(one.name.lower() in STEPS for one in folders):
        return [], ""
    return _processed(place, images, {one: _listed(one) for one in folders})


def _processed(
    place: Path, images: Sequence[Path], listed: Mapping[Path, Listing]
) -> tuple[list[Path], str]:
    """In a scan's folder with `STEPS`, the images of the first, labels and masks above it and `BESIDE`; and what is not read.

    Nothing where images lie above, or are called after others than the folder, or the one that it lies in. Raises `AnomriError`
    where images lie in a folder that is neither: ``pre`` beside ``post`` is a time, and not a step.
    """
    above, inside = (
        split_folder(images),
        {one: split_folder(files) for one, (files, _) in listed.items()},
    )
    shown = [one for one, named in inside.items() if _stems(named)]
    steps = sorted((one for one in shown if one.name.lower() in STEPS), key=_step)
    names = (folder_name(place), place.parent.name)
    if (
        not steps
        or _stems(above)
        or not all(stem.startswith(names) for stem in _stems(inside[steps[0]]) - {""})
    ):
        return [], ""
    if strange := [one for one in shown if one.name.lower() not in (*STEPS, *BESIDE)]:
        raise AnomriError(
            f"{place}: has images in {steps[0].name} and in {strange[0].name}; call folders of times as v1 and v2 (or name the "
            f"files in a .tsv), and take others out of it."
        )
    marks = {
        one: ANNOTATIONS if one.name.lower() in BESIDE[:2] else {*LABEL_NAMES}
        for one in inside
        if one.name.lower() in BESIDE
    }
    taken = [*inside[steps[0]]]
    for named, kinds in (
        (above, ANNOTATIONS),
        *((inside[one], kinds) for one, kinds in marks.items()),
    ):
        taken += [path for path, (_, kind) in named.items() if kind in kinds]
    read = {*taken}
    left = [path.name for path in above if path not in read]
    left += [
        str(path.relative_to(one.parent))
        for one, named in inside.items()
        for path in named
        if path not in read
    ]
    if not left:
        return taken, ""
    more = f" and {len(left) - 3} more" if left[3:] else ""
    return taken, f"its images are those in {steps[0].name}; not read: {', '.join(left[:3])}{more}."


def _step(folder: Path) -> tuple[int, Path]:
    return STEPS.index(folder.name.lower()), folder


def _case(name: str, files: Mapping[str, Sequence[Path]]) -> Case:
    """A case of the images of each kind, all of one step: of a channel's the preferred one, of labels the first, with a note."""
    shown = {path.parent for kind, paths in files.items() if kind in IMAGES for path in paths}
    step, *unread = sorted((one for one in shown if one.name.lower() in STEPS), key=_step) or [
        Path()
    ]
    left = [
        path
        for kind, paths in files.items()
        if kind in ANNOTATIONS
        for path in paths
        if path.parent in unread
    ]
    files = {
        kind: own
        for kind, paths in files.items()
        if (own := [one for one in paths if one.parent not in unread])
    }
    chosen: dict[str, Path] = {}
    for kind, paths in files.items():
        first, *others = sorted(paths, key=preference)
        if kind not in LABEL_NAMES:
            if others and preference(first) == preference(others[0]):
                raise AnomriError(
                    f"{first} and {others[0]} are both {kind} of case {name}; keep one of them or, if they are of two scans, "
                    f"call these differently or name them in a TSV."
                )
            chosen[kind] = first
    if labels := [
        (path, kind) for kind, paths in files.items() if kind in LABEL_NAMES for path in paths
    ]:
        chosen[labels[0][1]] = labels[0][0]
    case = case_from_kinds(name, chosen)
    notes = [*case.notes, *note_choice(name, "label", [path for path, _ in labels])]
    if (
        case.label
        and name not in case.label.name
        and all(name in path.name for path in case.channels.values())
    ):
        notes.append(f"{name}: {case.label.name} is taken for its label, as it is in its folder.")
    if unread:
        names = [
            *(one.name for one in unread),
            *(f"{path.parent.name}/{path.name}" for path in left),
        ]
        notes.append(f"{name}: its images are those in {step.name}; not read: {', '.join(names)}.")
    return replace(case, notes=tuple(notes))


def _visits(patients: Mapping[Path, Sequence[Path]]) -> dict[Path, str]:
    """The folders of visits among those in the folders of patients, and what their cases are called."""
    found: dict[Path, str] = {}
    for patient, places in patients.items():
        for place in places:
            visit = re.sub(rf"^{re.escape(patient.name)}[-_]", "", place.name)
            if VISIT.fullmatch(visit):
                found[place] = f"{patient.name}_{visit}" if visit == place.name else place.name
    return found


def _listed(folder: Path) -> Listing:
    """Images and folders in a folder, without hidden ones."""
    # A scan of it knows what is a folder; of paths every file would be asked, and a cohort has many.
    with os.scandir(folder) as entries:
        shown = sorted(
            (Path(entry.path), entry.is_dir())
            for entry in entries
            if not entry.name.startswith(".")
        )
    images = [path for path, _ in shown if path.name.lower().endswith(SUFFIXES)]
    return images, [path for path, is_folder in shown if is_folder]


def _patients_folders(
    folder: Path, images: Mapping[Path, Mapping[Path, tuple[str, str]]]
) -> set[Path]:
    """The folders of a cohort that are a patient's each, as their files are called alike in several of them.

    Else they may be of the same patients: a folder for each channel, or for masks.
    """
    elsewhere = {stem for stem, _ in images[folder].values()} | {folder_name(folder)}
    alike: dict[str, list[Path]] = {}
    for place, named in images.items():
        stems, kinds = {stem for stem, _ in named.values()}, {kind for _, kind in named.values()}
        words = {channel_name(word) for word in re.split(r"[^A-Za-z0-9]+", place.name)}
        if len(stems) != 1 or words & kinds or kinds <= ANNOTATIONS or place.name.lower() in STEPS:
            continue
        (stem,) = stems
        if stem == place.name or stem in elsewhere:
            continue
        if not re.search(
            r"\d", stem
        ):  # what has a number may be a patient's, with a folder for each step of the work
            alike.setdefault(stem, []).append(place)
    shared = [
        places
        for places in alike.values()
        if max(Counter(one for place in places for one in _contents(images[place])).values()) > 1
    ]
    return {place for places in shared for place in places}


def _contents(named: Mapping[Path, tuple[str, str]]) -> list[tuple[str, tuple[bool, bool, int]]]:
    return [(kind, preference(path)) for path, (_, kind) in named.items()]


def _cases_in_table(path: Path) -> list[Case]:
    cases: dict[str, Case] = {}
    for line, row in enumerate(read_table(path, ("case",)), start=2):
        name, split = row.pop("case"), row.pop("split", None) or None
        subject = row.pop("subject", None) or None
        if not name or name in cases or not may_name_files(name):
            raise AnomriError(
                f"{path}, line {line}: case {name!r} is empty, named twice or holds a '/'."
            )
        if split not in (*SPLITS, None):
            raise AnomriError(
                f"{path}, line {line}: split {split!r} is not one of {', '.join(SPLITS)}."
            )
        given = {column: path.parent / value for column, value in row.items() if value}
        files = {channel_name(column): file for column, file in given.items()}
        if len(files) < len(given):
            raise AnomriError(
                f"{path}, line {line}: two of the columns {', '.join(given)} are the same channel."
            )
        for column, file in files.items():
            if not file.is_file():
                raise AnomriError(f"{path}, line {line}, column {column}: no such file: {file}")
        cases[name] = replace(case_from_kinds(name, files), split=split, subject=subject)
    return list(cases.values())
