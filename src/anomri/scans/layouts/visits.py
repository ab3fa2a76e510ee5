"""Folders of visits in folders of patients: ``<patient>/<visit>/<channel>.nii.gz``.

All images of a visit are one case, called ``<patient>_<visit>``. Other folders may lie beside
those of patients and of visits, as in `folders`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from anomri.scans.cohort import Cohort
from anomri.scans.grouping import Group, cases_from_groups
from anomri.scans.layouts.folders import find_group, find_groups, holds_images
from anomri.scans.places import Place

NAME = "a folder per patient and visit"
EXAMPLE = "<patient>/<visit>/<channel>.nii.gz"

VISIT = re.compile(
    r"ses(sion)?[-_]?[a-z0-9]+"
    r"|(visit|v|m|tp|time(point)?|scan|exam|day|week|month|year|fu|follow[-_]?up)[-_]?\d+"
    r"|baseline|bl|follow[-_]?up"
    r"|(19|20)\d\d([-_.]?\d\d){0,2}",
    re.IGNORECASE,
)
"""Names of a visit's folder. Any other folder in a patient's may hold a channel or a label."""


def matches(place: Place) -> bool:
    """Whether images lie in folders that are called after visits."""
    return any(holds_images(visit) for patient in place.folders for visit in _visits(patient))


def read(place: Place) -> Cohort:
    """The cases of all visits, and of the images beside them."""
    groups = [*find_groups(place)]
    for patient in place.folders:
        groups += _visit_groups(patient)
    return cases_from_groups(NAME, place.path, groups)


def _visits(patient: Place) -> list[Place]:
    return [inside for inside in patient.folders if VISIT.fullmatch(_visit_name(patient, inside))]


def _visit_groups(patient: Place) -> Iterator[Group]:
    for visit in _visits(patient):
        name = _visit_name(patient, visit)
        is_plain = name == visit.path.name
        case = f"{patient.path.name}_{name}" if is_plain else visit.path.name
        yield replace(find_group(visit), case=case, subject=patient.path.name)


def _visit_name(patient: Place, visit: Place) -> str:
    """The name of a visit's folder without the patient's name before it: p1/p1_v2 is visit v2."""
    for separator in "-_":
        if visit.path.name.startswith(patient.path.name + separator):
            return visit.path.name[len(patient.path.name) + 1 :]
    return visit.path.name
