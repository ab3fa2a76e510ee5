"""Which files of a BIDS case belong together, by the entities in their names.

``run-1`` and ``run-2`` are two scans: a mask or label of one says nothing about the other. So the
images, the brain mask and the label of a case are chosen together, not one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import combinations, product
from pathlib import Path

CHANNELS = {"flair": "FLAIR", "t1": "T1w", "t1ce": "ce-*_T1w", "t2": "T2w"}
"""How the names of each channel's images end; ``ce`` says that a contrast agent was given."""
SUFFIXES = ("FLAIR", "T1w", "T2w")
WITHOUT_IMAGE = (
    *("sub", "ses", "space", "cohort", "res", "den", "label", "desc", "seg", "atlas", "hemi"),
    *("from", "to", "mode", "mod"),
)
"""Entities that do not tell two images of one channel apart: they say whose a file is, where it
lies, or what was made of it."""
REPEATS = ("run", "chunk", "split")
"""Entities that images of different channels must not differ in. Others, such as ``acq``, name the
sequence, which is another one for every channel."""
PARTS = ("phase", "real", "imag")
"""Parts of a complex image that are not its magnitude."""


@dataclass(frozen=True)
class BidsFile:
    """An image or a mask, and the entities in its name."""

    path: Path
    suffix: str
    entities: Mapping[str, str | int]
    derived: bool
    """Whether it lies in ``derivatives`` of the data set."""

    @property
    def is_magnitude(self) -> bool:
        """Whether it is not a phase image, or another part of a complex one."""
        return self.entities.get("part") not in PARTS

    @property
    def is_image(self) -> bool:
        """Whether it is an image of the data set itself."""
        return self.suffix in SUFFIXES and not self.derived and self.is_magnitude

    @property
    def case(self) -> str:
        """The case that its name says: ``sub-XX[_ses-YY]``."""
        return "_".join(
            f"{key}-{self.entities[key]}" for key in ("sub", "ses") if key in self.entities
        )

    @property
    def of_image(self) -> dict[str, str | int]:
        """The entities that tell images of one channel apart, such as ``run`` and ``acq``."""
        return {key: self.entities[key] for key in self.entities if key not in WITHOUT_IMAGE}

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
        return self.is_image and CHANNELS.get(what) == kind

    def names_image(self, image: BidsFile) -> bool:
        """Whether a mask may belong to ``image``: the image has all entities that the mask
        names."""
        space = self.entities.get("space")
        if space in SUFFIXES and "space" not in image.entities and space != image.suffix:
            return False
        return self.of_image.items() <= image.of_image.items()


class Fit(IntEnum):
    """Whether a mask or label belongs to the images that are taken, the surest first."""

    SURE = 0
    AMBIGUOUS = 1
    """It may as well belong to an image that is not taken."""
    NONE = 2
    """It belongs to none of them."""


@dataclass(frozen=True)
class Choice:
    """The files that are taken for one case."""

    images: dict[str, BidsFile]
    """Of every channel, also of those that are not asked for."""
    masks: dict[str, BidsFile]
    """``brain`` and ``lesion``, if there are any."""
    fits: dict[str, Fit]
    """How well each of the masks fits."""


def choose_together(
    images: Mapping[str, Sequence[BidsFile]],
    masks: Mapping[str, Sequence[BidsFile]],
    asked: Sequence[str],
) -> Choice:
    """One image of each channel and one mask of each kind, so that their entities agree.

    ``images`` and ``masks`` hold all files, the preferred first; ``asked`` are the channels that
    are used. What agrees comes before what is preferred: first the label, then the brain mask, then
    the images among each other.
    """

    def order(numbers: Sequence[int]) -> tuple[int, int, int, Sequence[int]]:
        taken = pick(numbers)
        label, brain = (
            min((fit(mask, taken) for mask in masks.get(kind, ())), default=Fit.SURE)
            for kind in ("lesion", "brain")
        )
        differences = sum(
            len(differing(one, other)) for one, other in combinations(taken.values(), 2)
        )
        return label, brain, differences, numbers

    def pick(numbers: Sequence[int]) -> dict[str, BidsFile]:
        return {
            channel: files[number]
            for (channel, files), number in zip(images.items(), numbers, strict=True)
        }

    def fit(mask: BidsFile, taken: Mapping[str, BidsFile]) -> Fit:
        return _fit(mask, taken, images, asked)

    taken = pick(min(product(*(range(len(files)) for files in images.values())), key=order))
    best = {
        kind: min(files, key=lambda mask: fit(mask, taken))
        for kind, files in masks.items()
        if files
    }
    return Choice(taken, best, {kind: fit(mask, taken) for kind, mask in best.items()})


def differing(one: BidsFile, other: BidsFile) -> list[str]:
    """The entities of two images that both have, with different values; not the contrast agent."""
    first, second = one.of_image, other.of_image
    common = first.keys() & second.keys() - {"ce"}
    return sorted(key for key in common if first[key] != second[key])


def different_repeats(
    images: Mapping[str, BidsFile], asked: Sequence[str]
) -> tuple[BidsFile, BidsFile] | None:
    """Two images of the channels ``asked`` that are of different runs, if there are any."""
    used = [image for channel, image in images.items() if channel in asked]
    for one, other in combinations(used, 2):
        if set(differing(one, other)) & {*REPEATS}:
            return one, other
    return None


def _fit(
    mask: BidsFile,
    taken: Mapping[str, BidsFile],
    images: Mapping[str, Sequence[BidsFile]],
    asked: Sequence[str],
) -> Fit:
    for channel, image in taken.items():
        if channel in asked and set(differing(mask, image)) & {*REPEATS}:
            return Fit.NONE
    fits = Fit.NONE
    for channel, image in taken.items():
        if not mask.names_image(image):
            continue
        others = [file for file in images[channel] if file is not image and mask.names_image(file)]
        if not others or mask.of_image == image.of_image:
            return Fit.SURE
        fits = Fit.AMBIGUOUS
    return fits
