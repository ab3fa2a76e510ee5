"""A scan in memory: channels on one grid, in the working orientation, zero outside the brain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.boxes import box_around
from anomri.scans.geometry import Geometry


@dataclass(frozen=True)
class Volume:
    """A scan in the working orientation; only the box around the brain is kept, about two fifths.

    ``brain`` is the box (x, y, z) of all voxels above zero, and ``inside`` (channels, x, y, z)
    float32 its content. ``label`` (x, y, z) bool is the lesion mask of the whole scan, if there is
    one. ``notes`` tell the user what was done to the scan. ``missing`` names channels that the scan
    does not have, and that are zero.
    """

    name: str
    channels: tuple[str, ...]
    inside: NDArray[np.float32]
    brain: tuple[slice, ...]
    label: NDArray[np.bool_] | None
    geometry: Geometry
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    label_error: str = ""
    """Why the label was left out, if it was."""
    ignored: NDArray[np.bool_] | None = None
    """Where (x, y, z) the label says neither lesion nor healthy, if anywhere."""

    @classmethod
    def from_array(
        cls,
        name: str,
        channels: Sequence[str],
        data: NDArray[np.float32],
        label: NDArray[np.bool_] | None,
        geometry: Geometry,
    ) -> Volume:
        """A scan from ``data`` (channels, x, y, z) >= 0, zero outside the brain."""
        return cls(name, tuple(channels), *_crop_to_brain(data), label, geometry)

    @cached_property
    def data(self) -> NDArray[np.float32]:
        """The whole field (channels, x, y, z), with the air around the brain."""
        return np.stack([self.channel(number) for number in range(len(self.channels))])

    def channel(self, number: int) -> NDArray[np.float32]:
        """The whole field of one channel (x, y, z)."""
        channel = np.zeros(self.geometry.canonical_shape, dtype=np.float32)
        channel[self.brain] = self.inside[number]
        return channel

    @cached_property
    def foreground(self) -> NDArray[np.bool_]:
        """Where any channel is above zero (x, y, z)."""
        foreground = np.zeros(self.geometry.canonical_shape, dtype=bool)
        foreground[self.brain] = (self.inside > 0).any(axis=0)
        return foreground

    @property
    def in_plane_mm(self) -> tuple[float, float]:
        """Pixel size of an axial slice."""
        return self.geometry.spacing_mm[:2]

    @property
    def present(self) -> tuple[str, ...]:
        """The channels that are not ``missing``."""
        return tuple(name for name in self.channels if name not in self.missing)

    def lesions(self) -> NDArray[np.bool_]:
        """The label; raises `AnomriError` if there is none, with the reason if it was left out."""
        if self.label is None:
            raise AnomriError(self.label_error or f"{self.name}: no label was read.")
        return self.label

    def with_data(self, data: NDArray[np.float32], note: str) -> Volume:
        """The scan with other ``data`` (channels, x, y, z) on the same grid, and a note."""
        inside, brain = _crop_to_brain(data)
        return replace(self, inside=inside, brain=brain, notes=(*self.notes, note))

    def completed(self, channels: Sequence[str], notes: Sequence[str] = ()) -> Volume:
        """The scan with exactly ``channels``, zero where it lacks one, and more ``notes``."""
        inside = np.zeros((len(channels), *self.inside.shape[1:]), dtype=np.float32)
        for name, channel in zip(self.channels, self.inside, strict=True):
            inside[list(channels).index(name)] = channel
        return replace(
            self,
            channels=tuple(channels),
            inside=inside,
            missing=tuple(name for name in channels if name not in self.channels),
            notes=(*self.notes, *notes),
        )

    def without(self, hidden: Sequence[str]) -> Volume:
        """The scan with these of its channels ``missing``."""
        if not hidden:
            return self
        kept = np.array([name not in hidden for name in self.channels])
        missing = tuple(name for name in self.channels if name in (*hidden, *self.missing))
        return replace(self, inside=self.inside * kept[:, None, None, None], missing=missing)


def _crop_to_brain(data: NDArray[np.float32]) -> tuple[NDArray[np.float32], tuple[slice, ...]]:
    """The box (x, y, z) around all of (channels, x, y, z) above zero: its content, and the box."""
    brain = box_around(data)[1:]
    return np.ascontiguousarray(data[(slice(None), *brain)], dtype=np.float32), brain
