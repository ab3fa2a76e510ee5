"""Scans in memory: channels checked against each other, one orientation inside, the input's own grid outside."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.runtime.launch import usable_processors
from anomri.scans.boxes import box_around, is_empty, join
from anomri.scans.case import Case
from anomri.scans.geometry import Geometry, check_grid, copy_turned, geometry_of, says_where
from anomri.scans.masks import check_brain, check_lesion, lesion_of
from anomri.scans.nifti import read_image, stored_values_of, type_of, values_of, write_image_file
from anomri.scans.resample import Lattice, covered, resample
from anomri.spec import Grid

MAX_NEGATIVE = 0.1
"""An image with a larger share of negative values than this, deeper than `MAX_UNDERSHOOT`, is no plain MR image."""
MAX_UNDERSHOOT = 0.1
"""How deep interpolation may undershoot, as a share of the largest value."""


@dataclass(frozen=True)
class Volume:
    """A scan in the working orientation, of which only the box around the brain is kept: two fifths of most scans.

    ``brain`` is the box (x, y, z) that holds all voxels above zero, and ``inside`` (channels, x, y, z) float32 what is
    in it. ``label`` (x, y, z) bool is the lesion mask of the whole scan, if there is one; ``notes`` say what was done to
    the scan that its owner should know. ``missing`` names channels that the scan does not have, and that are zero.
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

    @classmethod
    def from_array(
        cls,
        name: str,
        channels: Sequence[str],
        data: NDArray[np.float32],
        label: NDArray[np.bool_] | None,
        geometry: Geometry,
    ) -> Volume:
        """A scan whose ``data`` is (channels, x, y, z) >= 0, zero outside the brain."""
        return cls(name, tuple(channels), *_cut_to_brain(data), label, geometry)

    @cached_property
    def data(self) -> NDArray[np.float32]:
        """All of the scan, air as well: (channels, x, y, z), zero outside the brain."""
        return np.stack([self.channel(number) for number in range(len(self.channels))])

    def channel(self, number: int) -> NDArray[np.float32]:
        """All of one channel (x, y, z)."""
        channel = np.zeros(self.geometry.canonical_shape, dtype=np.float32)
        channel[self.brain] = self.inside[number]
        return channel

    @cached_property
    def foreground(self) -> NDArray[np.bool_]:
        """Where any channel is above zero (x, y, z)."""
        foreground = np.zeros(self.geometry.canonical_shape, dtype=bool)
        foreground[self.brain] = (self.inside > 0).any(axis=0)
        return foreground

    def with_data(self, data: NDArray[np.float32], note: str) -> Volume:
        """The scan with other ``data`` (channels, x, y, z) on the same grid, and a note of why."""
        inside, brain = _cut_to_brain(data)
        return replace(self, inside=inside, brain=brain, notes=(*self.notes, note))

    @property
    def in_plane_mm(self) -> tuple[float, float]:
        """Pixel size of an axial slice in mm."""
        return self.geometry.spacing_mm[:2]

    @property
    def present(self) -> tuple[str, ...]:
        """The channels that are not ``missing``."""
        return tuple(name for name in self.channels if name not in self.missing)

    def completed(self, channels: Sequence[str], notes: Sequence[str] = ()) -> Volume:
        """The scan with a channel of zeros for each of ``channels`` that was not read, and more ``notes``."""
        inside = np.zeros((len(channels), *self.inside.shape[1:]), dtype=np.float32)
        for name, channel in zip(self.channels, self.inside, strict=True):
            inside[list(channels).index(name)] = channel
        missing = tuple(name for name in channels if name not in self.channels)
        return replace(
            self,
            channels=tuple(channels),
            inside=inside,
            missing=missing,
            notes=(*self.notes, *notes),
        )

    def lesions(self) -> NDArray[np.bool_]:
        """The label; raises `AnomriError` if there is none, with the reason if it was left out."""
        if self.label is None:
            raise AnomriError(self.label_error or f"{self.name}: no label was read.")
        return self.label

    def without(self, hidden: Sequence[str]) -> Volume:
        """The scan with these of its channels ``missing``."""
        if not hidden:
            return self
        kept = np.array([name not in hidden for name in self.channels])
        missing = tuple(name for name in self.channels if name in (*hidden, *self.missing))
        return replace(self, inside=self.inside * kept[:, None, None, None], missing=missing)


def read_volume(
    case: Case,
    channels: Sequence[str],
    grid: Grid = Grid(),
    *,
    with_label: bool = True,
    resampled: bool = False,
) -> Volume:
    """Read ``channels`` of a case, checked against each other, in the grid's orientation.

    Voxels outside the case's brain mask, if it has one, are set to zero, and so are negative values, with a note.
    With ``resampled`` an image on another grid than the first channel is brought onto it by the headers (trilinear;
    masks by the nearest voxel), with a note. A label never is: what is measured against it must not depend on how it
    was brought over; one that cannot be used is left out, with a note. Raises `AnomriError` naming the file that is
    missing, empty, not finite, standardised, on another grid, the label of a lesion in place of a brain's mask, or, with
    ``resampled``, that does not overlap the first at all.
    """
    files, notes, read, slopes = (
        case.files(channels),
        list[str](),
        list[NDArray[Any]](),
        list[float](),
    )
    if not files:
        raise AnomriError(f"{case.name}: no channel is asked for.")
    first: Geometry | None = None
    # Unpacking leaves other threads alone, so that channels are read side by side.
    with ThreadPoolExecutor(min(len(files), usable_processors())) as pool:
        for path, (image, values, slope, found) in zip(
            files, pool.map(_read_positive, files), strict=True
        ):
            if first is None:
                first = geometry_of(path, image, grid)
                if not says_where(image.header):
                    notes.append(
                        f"{path.name} does not say how it lies (sform and qform code 0): left may be right."
                    )
            notes += found
            slopes.append(slope)
            read.append(_onto(path, image, values, files[0], first, notes if resampled else None))
    assert first is not None
    if case.mask is not None:
        mask = _read_mask(case.mask, files[0], first, notes, resampled)
        check_brain(case.mask, mask, files[0], read[0], first.voxel_mm3)
        read = [values * mask for values in read]
    boxes = [box_around(values) for values in read]
    for path, box in zip(files, boxes, strict=True):
        if is_empty(box):
            raise AnomriError(
                f"{path}: no voxel is above zero; the image is empty (or all of it lies outside the mask)."
            )
    label: NDArray[np.bool_] | None = None
    label_error = ""
    if case.label is not None and with_label:
        about = list[str]()
        try:
            label = _read_mask(case.label, files[0], first, about, resampled=False, lesion=True)
            check_lesion(case.label, label, files[0], read[0], first.voxel_mm3)
        except AnomriError as error:
            if not resampled:
                raise
            label, label_error, about = None, str(error), [f"its label was left out: {error}"]
        notes += about
    brain = join(boxes)
    inside = np.empty((len(read), *(side.stop - side.start for side in brain)), dtype=np.float32)
    for values, slope, channel in zip(read, slopes, inside, strict=True):
        copy_turned(values[brain], channel)
        if slope != 1:
            channel *= np.float32(slope)
    return Volume(
        case.name,
        tuple(channels),
        inside,
        brain,
        label,
        first,
        tuple(notes),
        label_error=label_error,
    )


def read_label(case: Case, grid: Grid = Grid()) -> tuple[NDArray[np.bool_], Geometry, list[str]]:
    """The lesion label (x, y, z) of a case in the grid's orientation, where it lies, and notes on it."""
    assert case.label is not None
    image, notes = read_image(case.label), list[str]()
    geometry = geometry_of(case.label, image, grid)
    marked = lesion_of(case.label, _finite(case.label, values_of(image)), notes)
    return np.ascontiguousarray(geometry.canonical(marked)), geometry, notes


def read_map(path: Path, label: Path, geometry: Geometry) -> NDArray[np.floating[Any]]:
    """An anomaly map (x, y, z) in the working orientation, which must lie on the grid of ``label``.

    It is float32, or float64 where that tells more of its values apart.
    """
    image = read_image(path)
    check_grid(path, image, label, geometry)
    values = values_of(image)
    rounded = _finite(path, values).astype(np.float32, copy=False)
    exact = rounded if np.array_equal(rounded, values) else values.astype(np.float64)
    return np.ascontiguousarray(geometry.canonical(exact))


def write_image(
    path: Path, data: NDArray[Any], geometry: Geometry, display: tuple[float, float] | None = None
) -> None:
    """Write `image_of` an array in the working orientation, whole or not at all."""
    write_image_file(path, image_of(data, geometry, display))


def image_of(
    data: NDArray[Any], geometry: Geometry, display: tuple[float, float] | None = None
) -> nib.Nifti1Image | nib.Nifti2Image:
    """An array in the working orientation as NIfTI on the input's own grid.

    ``data`` is (x, y, z), or (channels, x, y, z), which becomes a 4D file with the channels last. Both header
    forms and their codes are the input's; the data type is that of ``data`` and ``display`` sets ``cal_min`` and
    ``cal_max``, the range viewers open with.
    """
    header = geometry.header.copy()
    header.set_data_dtype(data.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = display or (0, 0)
    header["descrip"] = b"anomri"
    # Free text may hold the patient's name.
    header.extensions.clear()
    for field in (
        "aux_file",
        "intent_name",
        *(name for name in ("db_name", "data_type") if name in header),
    ):
        header[field] = b""
    # No affine is given: nibabel would rewrite the codes of a header whose sform and qform differ.
    native = (
        geometry.native(data)
        if data.ndim == 3
        else np.stack([geometry.native(c) for c in data], axis=-1)
    )
    return type_of(header)(native, None, header)


def _finite(path: Path, data: NDArray[Any]) -> NDArray[Any]:
    """The values of an image, checked: whole numbers as they are, others float32."""
    if data.dtype.kind not in "iuf":
        raise AnomriError(
            f"{path}: holds values of type {data.dtype}; an image of real numbers is expected."
        )
    if data.dtype.kind in "iu":
        return data
    data = data.astype(np.float32, copy=False)
    bad = int(data.size - np.isfinite(data).sum())
    if bad:
        raise AnomriError(
            f"{path}: {bad:,} of its {data.size:,} voxels are NaN or infinite; replace them, by 0 outside the brain."
        )
    return data


def _cut_to_brain(data: NDArray[np.float32]) -> tuple[NDArray[np.float32], tuple[slice, ...]]:
    """What is in the box (x, y, z) around all of (channels, x, y, z) above zero, and the box."""
    brain = box_around(data)[1:]
    return np.ascontiguousarray(data[(slice(None), *brain)], dtype=np.float32), brain


def _read_mask(
    path: Path,
    first_path: Path,
    first: Geometry,
    notes: list[str],
    resampled: bool,
    lesion: bool = False,
) -> NDArray[np.bool_]:
    image = read_image(path)
    values = _finite(path, values_of(image))
    marked = lesion_of(path, values, notes) if lesion else values > 0
    inside = _onto(path, image, marked, first_path, first, notes if resampled else None)
    mask, box = np.zeros(first.canonical_shape, dtype=bool), box_around(inside)
    copy_turned(inside[box], mask[box])
    return mask


def _onto(
    path: Path,
    image: nib.Nifti1Image,
    values: NDArray[Any],
    first_path: Path,
    first: Geometry,
    notes: list[str] | None,
) -> NDArray[Any]:
    """``values`` of an image in the working orientation of ``first``; without ``notes`` it must lie there already."""
    if notes is None:
        check_grid(path, image, first_path, first)
        return first.canonical(values)
    told = {says_where(image.header): path.name, says_where(first.header): first_path.name}
    if len(told) > 1:
        # What nibabel makes up where a header says nothing is no place to resample from, or to.
        if image.shape != first.shape:
            raise AnomriError(
                f"{path}: {told[False]} does not say how it lies (sform and qform code 0), {told[True]} does, and they "
                f"differ in size ({image.shape} and {first.shape} voxels). Copy the header of the image that it was made from."
            )
        notes.append(
            f"{told[False]} does not say how it lies (sform and qform code 0): it was taken to lie as {told[True]}, "
            f"which has as many voxels."
        )
        return first.canonical(values)
    axes = orientations.io_orientation(first.canonical_affine)
    here = geometry_of(path, image, Grid())
    here = replace(
        here,
        to_canonical=orientations.ornt_transform(orientations.io_orientation(here.affine), axes),
    )
    source, target = (
        Lattice(here.canonical_shape, here.canonical_affine),
        Lattice(first.canonical_shape, first.canonical_affine),
    )
    apart = float(np.abs(source.corners_mm - target.corners_mm).max())
    turned = here.canonical(values)
    if source.shape == target.shape and apart <= first.tolerance_mm:
        return turned
    share = covered(source, target)
    if not share:
        raise AnomriError(
            f"{path}: its header places it beside {first_path.name}, they do not overlap at all (corners up to "
            f"{apart:.4g} mm apart). They are of different scans, or a header is wrong; register one to the other."
        )
    part = "" if share > 0.995 else f", {share:.0%} of which it covers"
    notes.append(
        f"{path.name} lies on another grid than {first_path.name} ({_size(source)} instead of {_size(target)}, corners "
        f"up to {apart:.3g} mm apart); it was resampled to that one{part}, by what the headers say."
    )
    return resample(turned if turned.dtype == bool else turned.astype(np.float32), source, target)


def _size(lattice: Lattice) -> str:
    spacing = " x ".join(f"{mm:.3g}" for mm in lattice.spacing_mm)
    return f"{' x '.join(map(str, lattice.shape))} voxels of {spacing} mm"


def _read_positive(path: Path) -> tuple[nib.Nifti1Image, NDArray[Any], float, list[str]]:
    """An image, its values to be multiplied by a slope, which follows, and a note if any were below zero.

    Those, which interpolation leaves behind, are set to zero.
    """
    image = read_image(path)
    stored, slope = stored_values_of(image)
    stored = _finite(path, stored)
    if stored.min() >= 0:
        return image, stored, slope, []
    data = _finite(path, values_of(image))
    negative = int((data < 0).sum())
    positive = int((data > 0).sum())
    if negative > MAX_NEGATIVE * (negative + positive) and float(
        -data.min()
    ) > MAX_UNDERSHOOT * float(data.max()):
        raise AnomriError(
            f"{path}: {negative / (negative + positive):.0%} of its values that are not zero are negative (down to "
            f"{data.min():.3g}, up to {data.max():.3g}); it looks standardised or is a difference. Hand in the image "
            f"before that, with intensities from zero up."
        )
    note = f"{path.name} has {negative:,} negative voxels (down to {data.min():.3g}); they were set to zero."
    return image, np.maximum(data, 0), 1.0, [note]
