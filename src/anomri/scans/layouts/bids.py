"""A BIDS data set, raw or derivative: ``sub-*/[ses-*/]anat/*_T1w.nii.gz`` and the like.

Participants without an image are left out.
"""

from __future__ import annotations

from anomri.errors import AnomriError
from anomri.scans.bids import check_labels, read_bids
from anomri.scans.cohort import Cohort
from anomri.scans.places import Place

NAME = "BIDS data set"
EXAMPLE = "BIDS (dataset_description.json with sub-*/anat)"


def matches(place: Place) -> bool:
    """Whether there is a ``dataset_description.json`` and a participant with a folder ``anat``."""
    if not (place.path / "dataset_description.json").is_file():
        return False
    patterns = ("sub-*/anat", "sub-*/ses-*/anat")
    return any(any(place.path.glob(pattern)) for pattern in patterns)


def read(place: Place) -> Cohort:
    """The cases with an image.

    Raises `AnomriError` if a file may be a label that is not read, or if files of a case do not
    belong together.
    """
    cases, left_out = read_bids(place.path)
    found = [case for case in cases if case.channels]
    check_labels(place.path, found, left_out)
    for case in found:
        if case.problem:
            raise AnomriError(case.problem)
    return Cohort(NAME, found, left_out)
