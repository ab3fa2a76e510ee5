"""Scans in memory: channels checked against each other, one orientation inside, the input's own grid outside."""

from __future__ import annotations

import os
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

from anomri.boxes import box_around, is_empty, join
from anomri.cases import Case
from anomri.nifti import read_image, type_of, values_of, write_image_file
from anomri.resampling import Lattice, covered, resample
from anomri.spec import AnomriError, Grid

AFFINE_TOLERANCE_MM = 1e-2
MAX_NEGATIVE = 0.1
"""An image with a larger share of negative values than this, deeper than `MAX_UNDERSHOOT`, is no plain MR image."""
MAX_UNDERSHOOT = 0.1
"""How deep interpolation may undershoot, as a share of the largest value."""


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a scan lie, and how to write an image that lies on them.

    ``shape`` is that of the file, ``to_canonical`` the nibabel orientation transform into the working
    orientation, ``header`` the file's own, ``affine`` voxel indices of the file -> scanner mm (RAS+).
    ``working`` replaces the file's own grid inside, where a scan is turned into the model's space: a grid that lies
    oblique in the scan; its axes are those of the working orientation.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    to_canonical: NDArray[np.float64]
    header: nib.Nifti1Header
    working: Lattice | None = None

    @property
    def file_lattice(self) -> Lattice:
        """The grid of the file, on the file's own axes."""
        return Lattice(self.shape, self.affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size in mm along the axes of the working orientation."""
        if self.working is not None:
            return self.working.spacing_mm
        sizes = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        spacing = np.empty(3)
        spacing[self.to_canonical[:, 0].astype(int)] = sizes
        return float(spacing[0]), float(spacing[1]), float(spacing[2])

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """The shape in the working orientation."""
        if self.working is not None:
            return self.working.shape
        shape = np.empty(3, int)
        shape[self.to_canonical[:, 0].astype(int)] = self.shape
        return int(shape[0]), int(shape[1]), int(shape[2])

    @property
    def canonical_affine(self) -> NDArray[np.float64]:
        """Voxel indices in the working orientation -> scanner mm (RAS+)."""
        if self.working is not None:
            return self.working.affine
        return self.affine @ orientations.inv_ornt_aff(self.to_canonical, self.shape)

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel of the working orientation in mm3."""
        return float(abs(np.linalg.det(self.canonical_affine[:3, :3])))

    def canonical(self, data: NDArray[Any]) -> NDArray[Any]:
        """An array on the file's axes turned into the working orientation: a view of it, where that is possible."""
        if self.working is not None:
            return resample(data, self.file_lattice, self.working)
        turned: NDArray[Any] = orientations.apply_orientation(data, self.to_canonical)
        return turned

    def native(self, data: NDArray[Any]) -> NDArray[Any]:
        """An array in the working orientation turned back onto the file's axes."""
        if self.working is not None:
            return resample(data, self.working, self.file_lattice)
        order = self.to_canonical[:, 0].astype(int)
        flip = [axis for axis, (_, sign) in enumerate(self.to_canonical) if sign < 0]
        return np.ascontiguousarray(np.flip(np.transpose(data, order), tuple(flip)))


@dataclass(frozen=True)
class Volume:
    """A scan in the working orientation: ``data`` (channels, x, y, z) float32, zero outside the brain.

    ``label`` (x, y, z) bool is the lesion mask, if there is one; ``notes`` say what was done to the scan that its
    owner should know. ``missing`` names channels that the scan does not have, and that are zero.
    """

    name: str
    channels: tuple[str, ...]
    data: NDArray[np.float32]
    label: NDArray[np.bool_] | None
    geometry: Geometry
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @cached_property
    def brain(self) -> tuple[slice, ...]:
        """The box (x, y, z) that holds all voxels above zero."""
        return box_around(self.data)[1:]

    @property
    def in_plane_mm(self) -> tuple[float, float]:
        """Pixel size of an axial slice in mm."""
        return self.geometry.spacing_mm[:2]

    def completed(self, channels: Sequence[str], absent: Sequence[str]) -> Volume:
        """The scan with a channel of zeros for each one that was not read, and a note of those ``absent`` from it."""
        data = np.zeros((len(channels), *self.data.shape[1:]), dtype=np.float32)
        for name, channel in zip(self.channels, self.data, strict=True):
            data[list(channels).index(name)] = channel
        missing = tuple(name for name in channels if name not in self.channels)
        notes = [f"the scan has no {', '.join(absent)}; the model was trained to do without."] if absent else []
        return replace(self, channels=tuple(channels), data=data, missing=missing, notes=(*self.notes, *notes))


def read_volume(
    case: Case, channels: Sequence[str], grid: Grid = Grid(), *, with_label: bool = True, resampled: bool = False
) -> Volume:
    """Read ``channels`` of a case, checked against each other, in the grid's orientation.

    Voxels outside the case's brain mask, if it has one, are set to zero, and so are negative values, with a note.
    With ``resampled`` an image on another grid than the first channel is brought onto it by the headers (trilinear;
    masks by the nearest voxel), with a note. A label never is: what is measured against it must not depend on how it
    was brought over. Raises `AnomriError` naming the file that is missing, empty, not finite, standardised, on another
    grid, or, with ``resampled``, that does not overlap the first at all.
    """
    files, notes, boxes = case.files(channels), list[str](), list[tuple[slice, ...]]()
    if not files:
        raise AnomriError(f"{case.name}: no channel is asked for.")
    first: Geometry | None = None
    data = np.empty(0, dtype=np.float32)
    # Unpacking leaves other threads alone, so that channels are read side by side.
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
        for number, (path, (image, values, found)) in enumerate(
            zip(files, pool.map(_read_positive, files), strict=True)
        ):
            if first is None:
                first = _geometry(path, image, grid)
                data = np.zeros((len(files), *first.canonical_shape), dtype=np.float32)
            notes += found
            here = _onto(path, image, values, files[0], first, notes if resampled else None)
            boxes.append(_copy_positive(here, data[number]))
    assert first is not None
    if case.mask is not None:
        data *= _read_mask(case.mask, files[0], first, notes if resampled else None)
        boxes = [box_around(data[number]) for number in range(len(data))]
    for path, box in zip(files, boxes, strict=True):
        if is_empty(box):
            raise AnomriError(
                f"{path}: no voxel is above zero; the image is empty (or all of it lies outside the mask)."
            )
    label: NDArray[np.bool_] | None = None
    if case.label is not None and with_label:
        label = _read_mask(case.label, files[0], first, None)
    volume = Volume(case.name, tuple(channels), data, label, first, tuple(notes))
    # Known already: looking for it again would take longer than reading a channel.
    vars(volume)["brain"] = join(boxes)
    return volume


def read_label(case: Case, grid: Grid = Grid()) -> tuple[NDArray[np.bool_], Geometry]:
    """The lesion label (x, y, z) of a case in the grid's orientation, and where it lies."""
    assert case.label is not None
    image = read_image(case.label)
    geometry = _geometry(case.label, image, grid)
    return np.ascontiguousarray(geometry.canonical(_finite(case.label, image) > 0)), geometry


def read_map(path: Path, label: Path, geometry: Geometry) -> NDArray[np.float32]:
    """An anomaly map (x, y, z) in the working orientation, which must lie on the grid of ``label``."""
    image = read_image(path)
    _check_grid(path, image, label, geometry)
    return np.ascontiguousarray(geometry.canonical(_finite(path, image)), dtype=np.float32)


def write_image(path: Path, data: NDArray[Any], geometry: Geometry, display: tuple[float, float] | None = None) -> None:
    """Write an array in the working orientation as NIfTI on the input's own grid, whole or not at all.

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
    for field in ("aux_file", "intent_name", *(name for name in ("db_name", "data_type") if name in header)):
        header[field] = b""
    # No affine is given: nibabel would rewrite the codes of a header whose sform and qform differ.
    native = geometry.native(data) if data.ndim == 3 else np.stack([geometry.native(c) for c in data], axis=-1)
    image = type_of(header)(native, None, header)
    write_image_file(path, image)


def _geometry(path: Path, image: nib.Nifti1Image, grid: Grid) -> Geometry:
    affine = np.asarray(image.affine, dtype=np.float64)
    i, j, k = affine[:3, :3].T
    if not np.isfinite(affine).all() or abs(np.dot(i, np.cross(j, k))) < 1e-9:
        raise AnomriError(f"{path}: its header gives no usable position (the affine is singular or not finite).")
    axes = orientations.io_orientation(affine)
    if np.isnan(axes).any():
        raise AnomriError(f"{path}: its header gives two axes of the image the same direction; it is damaged.")
    transform = orientations.ornt_transform(axes, orientations.axcodes2ornt(tuple(grid.orientation)))
    rows, columns, slices = image.shape
    return Geometry((rows, columns, slices), affine, transform, image.header)


def _check_grid(path: Path, image: nib.Nifti1Image, first_path: Path, first: Geometry) -> None:
    if image.shape != first.shape:
        raise AnomriError(
            f"{path}: has {image.shape} voxels, but {first_path.name} has {first.shape}. All images of a case "
            f"lie on one grid; resample this one to that one's."
        )
    corners = np.array([[i, j, k, 1] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (*first.shape, 1)
    apart = float(np.abs(corners @ (np.asarray(image.affine) - first.affine).T).max())
    if not apart <= AFFINE_TOLERANCE_MM:
        raise AnomriError(
            f"{path}: its header places it up to {apart:.3g} mm away from {first_path.name}. All images of a "
            f"case lie on one grid; register or resample this one to that one's."
        )


def _finite(path: Path, image: nib.Nifti1Image) -> NDArray[Any]:
    """The values of an image: whole numbers as they are in the file, others float32."""
    data = values_of(image)
    if data.dtype.kind not in "iuf":
        raise AnomriError(f"{path}: holds values of type {data.dtype}; an image of real numbers is expected.")
    if data.dtype.kind in "iu":
        return data
    data = data.astype(np.float32, copy=False)
    bad = int(data.size - np.isfinite(data).sum())
    if bad:
        raise AnomriError(
            f"{path}: {bad:,} of its {data.size:,} voxels are NaN or infinite; replace them, by 0 outside the brain."
        )
    return data


def _copy_positive(values: NDArray[Any], target: NDArray[Any]) -> tuple[slice, ...]:
    """Copy values >= 0 into zeros of the same shape, in the box of those above zero alone; returns the box."""
    box = box_around(values)
    target[box] = values[box]
    return box


def _read_mask(path: Path, first_path: Path, first: Geometry, notes: list[str] | None) -> NDArray[np.bool_]:
    image = read_image(path)
    mask = np.zeros(first.canonical_shape, dtype=bool)
    _copy_positive(_onto(path, image, _finite(path, image) > 0, first_path, first, notes), mask)
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
        _check_grid(path, image, first_path, first)
        return first.canonical(values)
    axes = orientations.io_orientation(first.canonical_affine)
    here = _geometry(path, image, Grid())
    here = replace(here, to_canonical=orientations.ornt_transform(orientations.io_orientation(here.affine), axes))
    source, target = (
        Lattice(here.canonical_shape, here.canonical_affine),
        Lattice(first.canonical_shape, first.canonical_affine),
    )
    apart = float(np.abs(source.corners_mm - target.corners_mm).max())
    turned = here.canonical(values)
    if source.shape == target.shape and apart <= AFFINE_TOLERANCE_MM:
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


def _read_positive(path: Path) -> tuple[nib.Nifti1Image, NDArray[Any], list[str]]:
    """An image, its values with negative ones, which interpolation leaves behind, set to zero, and a note if any were."""
    image = read_image(path)
    data = _finite(path, image)
    if data.min() >= 0:
        return image, data, []
    negative = int((data < 0).sum())
    positive = int((data > 0).sum())
    if negative > MAX_NEGATIVE * (negative + positive) and float(-data.min()) > MAX_UNDERSHOOT * float(data.max()):
        raise AnomriError(
            f"{path}: {negative / (negative + positive):.0%} of its values that are not zero are negative (down to "
            f"{data.min():.3g}, up to {data.max():.3g}); it looks standardised or is a difference. Hand in the image "
            f"before that, with intensities from zero up."
        )
    note = f"{path.name} has {negative:,} negative voxels (down to {data.min():.3g}); they were set to zero."
    return image, np.maximum(data, 0), [note]
