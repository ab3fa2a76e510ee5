"""One NIfTI file: a case of one channel, ``<case>_<channel>.nii.gz``."""

from __future__ import annotations

from anomri.scans.case import Case
from anomri.scans.cohort import Cohort
from anomri.scans.names import CHANNELS, SUFFIXES, folder_name, parse_name
from anomri.scans.places import Place

NAME = "one file"
EXAMPLE = "<case>_<channel>.nii.gz"


def matches(place: Place) -> bool:
    """Whether this is a .nii or .nii.gz file."""
    return place.path.name.lower().endswith(SUFFIXES) and place.path.is_file()


def read(place: Place) -> Cohort:
    """The case; a name such as FLAIR.nii.gz is the channel's, and the folder's is the case's."""
    stem, channel = parse_name(place.path)
    name = stem
    if not name:
        name = folder_name(place.path.parent) if channel in CHANNELS else channel
    return Cohort(NAME, [Case(name, {channel: place.path})], [])
