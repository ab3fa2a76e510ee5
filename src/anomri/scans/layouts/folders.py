"""Folders of images: ``<case>/<case>_<channel>.nii.gz`` (BraTS), ``<patient>/<channel>.nii.gz``.

A case is called after its files or, if they are called alike in all folders, after its folder.
So the folders may also be one for each channel, or for labels. In each may be `steps`.
"""

from __future__ import annotations

from collections.abc import Iterator

from anomri.scans.cohort import Cohort
from anomri.scans.grouping import Group, cases_from_groups
from anomri.scans.layouts.steps import find_step, is_step
from anomri.scans.places import Place

NAME = "a folder per case"
EXAMPLE = "<case>/<case>_<channel>.nii.gz"


def matches(place: Place) -> bool:
    """Whether images lie in the folders of the folder."""
    return any(holds_images(inside) for inside in place.folders)


def read(place: Place) -> Cohort:
    """The cases of all folders, and of the images beside them."""
    return cases_from_groups(NAME, place.path, find_groups(place))


def holds_images(place: Place) -> bool:
    """Whether a folder is one of images, or of steps of processing."""
    return bool(place.images) or any(is_step(inside) for inside in place.folders)


def find_groups(place: Place) -> Iterator[Group]:
    """The images in the folder itself and in each folder in it."""
    yield Group(place.path, place.images)
    for inside in place.folders:
        yield find_group(inside)


def find_group(place: Place) -> Group:
    """The images of one folder."""
    return find_step(place) or Group(place.path, place.images)
