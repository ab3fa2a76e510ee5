"""One patient, with a folder for each step of processing: ``pre/<channel>.nii.gz``, ``orig/...``.

The images of the first of the `STEPS` are taken. Labels and masks may lie beside these folders, or
in a folder for them. WMH 2017, MSSEG 2016 and ISBI 2015 are published so, in a folder per patient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from anomri.errors import AnomriError
from anomri.scans.cohort import Cohort, LeftOut
from anomri.scans.grouping import Group, cases_from_groups, step_order
from anomri.scans.names import (
    ANNOTATIONS,
    IMAGES,
    LABEL_NAMES,
    STEPS,
    FileName,
    folder_name,
    parse_folder,
)
from anomri.scans.places import Place

NAME = "one patient, a folder per step of processing"
EXAMPLE = "pre/<channel>.nii.gz"

FOLDERS_OF_MASKS = ("mask", "masks")
FOLDERS_OF_LABELS = (
    *("label", "labels", "lesion", "lesions", "seg", "segmentation", "segmentations"),
)
FOLDERS_BESIDE = (*FOLDERS_OF_MASKS, *FOLDERS_OF_LABELS)
"""Names of folders of masks and labels that may lie beside the `STEPS`."""


def matches(place: Place) -> bool:
    """Whether the folders of steps are one patient's, not those of a whole cohort."""
    return _is_one_patient(place) and find_step(place) is not None


def read(place: Place) -> Cohort:
    """The scans of one patient."""
    group = find_step(place)
    assert group is not None
    return cases_from_groups(NAME, place.path, [group])


def is_step(place: Place) -> bool:
    """Whether a folder is called after one of the `STEPS`."""
    return place.path.name.lower() in STEPS


def find_step(place: Place) -> Group | None:
    """In the folder of a scan, the images of the first step, and the masks and labels for them.

    None if no step is there, if images lie beside the steps, or if they are called after others
    than the folder or its parent. Raises `AnomriError` if images also lie in another folder:
    ``pre`` beside ``post`` is a point in time.
    """
    if not any(is_step(inside) for inside in place.folders):
        return None
    above = parse_folder(place.images)
    inside = {one.path: parse_folder(one.images) for one in place.folders}
    with_images = [folder for folder, names in inside.items() if _image_stems(names)]
    steps = sorted((one for one in with_images if one.name.lower() in STEPS), key=step_order)
    if not steps or _image_stems(above):
        return None
    owners = (folder_name(place.path), place.path.parent.name)
    if not all(stem.startswith(owners) for stem in _image_stems(inside[steps[0]]) - {""}):
        return None
    for folder in with_images:
        if folder.name.lower() not in (*STEPS, *FOLDERS_BESIDE):
            raise AnomriError(
                f"{place.path}: has images in {steps[0].name} and in {folder.name}; call folders"
                " of times as v1 and v2 (or name the files in a .tsv), and take others out of it."
            )
    taken = [*inside[steps[0]], *_of_kinds(above, ANNOTATIONS)]
    for folder, names in inside.items():
        if folder.name.lower() in FOLDERS_OF_MASKS:
            taken += _of_kinds(names, ANNOTATIONS)
        elif folder.name.lower() in FOLDERS_OF_LABELS:
            taken += _of_kinds(names, {*LABEL_NAMES})
    all_files = [*above, *(path for names in inside.values() for path in names)]
    left_out = [path for path in all_files if path not in {*taken}]
    reason = f"the images are read from {steps[0].name}"
    return Group(
        place.path,
        taken,
        note=_note(place.path, steps[0], left_out),
        left_out=[LeftOut(path, reason) for path in left_out],
    )


def _is_one_patient(place: Place) -> bool:
    steps = [inside for inside in place.folders if is_step(inside)]
    beside = [inside for inside in place.folders if not is_step(inside)]
    if not steps or any(
        _image_stems(parse_folder(one.images))
        for one in beside
        if one.path.name.lower() not in FOLDERS_BESIDE
    ):
        return False
    stems = {stem for step in steps for stem in _image_stems(parse_folder(step.images))}
    if stems <= {"", folder_name(place.path)}:
        return not any(one.folders for one in beside)
    # Cases may be called after their cohort. Several scans of one patient all lie in the first
    # step, and all other files are read.
    group = find_step(place)
    if group is None:
        return False
    annotations = {path for one in beside for path in parse_folder(one.images)}
    return annotations <= {*group.images} and stems <= _image_stems(parse_folder(group.images))


def _image_stems(names: Mapping[Path, FileName]) -> set[str]:
    return {name.stem for name in names.values() if name.kind in IMAGES}


def _of_kinds(names: Mapping[Path, FileName], kinds: Iterable[str]) -> list[Path]:
    return [path for path, name in names.items() if name.kind in kinds]


def _note(place: Path, step: Path, left_out: list[Path]) -> str:
    if not left_out:
        return ""
    names = ", ".join(str(path.relative_to(place)) for path in left_out[:3])
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return f"its images are those in {step.name}; not read: {names}{more}."
