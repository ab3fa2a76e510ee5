"""The layouts of cohorts that are known, a file each.

A layout is a module with a ``NAME`` and an ``EXAMPLE`` for messages, ``matches(place)`` and
``read(place)``. To add one, write its file and name it in `LAYOUTS`. The first that matches reads.
"""

from __future__ import annotations

from typing import Protocol

from anomri.scans.cohort import Cohort
from anomri.scans.layouts import bids, flat, folders, nnunet, single_file, steps, table, visits
from anomri.scans.places import Place


class Layout(Protocol):
    """What a module of this package has."""

    NAME: str
    EXAMPLE: str

    def matches(self, place: Place) -> bool:
        """Whether a file or folder has this layout; quick, and opens no image."""
        ...

    def read(self, place: Place) -> Cohort:
        """The cases in a file or folder of this layout; raises `AnomriError`."""
        ...


LAYOUTS: tuple[Layout, ...] = (
    single_file,
    table,
    nnunet,
    bids,
    steps,
    visits,
    folders,
    flat,
)
"""In the order in which they are tried: the surest first, and of nested folders the deepest."""
