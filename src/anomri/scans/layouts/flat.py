"""One folder with all images: ``<case>_<channel>.nii.gz``, or one case's ``<channel>.nii.gz``."""

from __future__ import annotations

from anomri.scans.cohort import Cohort
from anomri.scans.grouping import Group, cases_from_groups
from anomri.scans.places import Place

NAME = "one folder of images"
EXAMPLE = "<case>_<channel>.nii.gz"


def matches(place: Place) -> bool:
    """Whether images lie in the folder itself."""
    return bool(place.images)


def read(place: Place) -> Cohort:
    """The cases that the files' names say."""
    return cases_from_groups(NAME, place.path, [Group(place.path, place.images)])
