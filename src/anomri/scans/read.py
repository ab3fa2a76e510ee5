"""Reading the files of a case into a `Volume`: checked, on one grid, masked, with its label."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.runtime.launch import usable_processors
from anomri.scans.align import align
from anomri.scans.background import without_nan_around, zero_background
from anomri.scans.boxes import box_around, enclosing_box, is_empty
from anomri.scans.case import Case
from anomri.scans.content import check_scan, is_scan
from anomri.scans.geometry import (
    RESULT,
    Geometry,
    check_same_grid,
    copy_transposed,
    gives_position,
)
from anomri.scans.headers import format_mm, sizes_differ
from anomri.scans.marked import find_marked, split_ignored
from anomri.scans.masks import check_brain, check_lesion
from anomri.scans.names import OUTPUTS, SUFFIXES
from anomri.scans.nifti import read_noted_image, read_unscaled, read_values
from anomri.scans.overlap import (
    DOUBTFUL_OVERLAP,
    PlacedImage,
    check_channels_overlap,
    check_mask_overlaps,
    measure_overlap,
)
from anomri.scans.resample import VoxelGrid, corner_distance_mm, coverage, resample
from anomri.scans.volume import Volume
from anomri.spec import Grid

MAX_NEGATIVE_SHARE, MAX_UNDERSHOOT = 0.1, 0.1
"""An image is standardised or a difference if a larger share of its values is negative, and the
lowest is deeper than this share of its maximum; interpolation undershoots less."""
OVERLAP_ADVICE = {
    True: "Give the files of one scan, or align them with --register.",
    False: "Give the files of one scan, or register one to the other before training.",
}
"""What to do if two channels do not lie on each other, by whether channels may be resampled."""


@dataclass(frozen=True)
class _Image:
    """An image as read: ``values`` on the axes of its file, to be multiplied by ``slope``."""

    path: Path
    header: nib.Nifti1Header
    values: NDArray[Any]
    slope: float = 1.0
    notes: tuple[str, ...] = ()
    moved: VoxelGrid | None = None
    """Where the image lies after it was registered to the first channel, if it was."""

    @property
    def grid(self) -> VoxelGrid:
        """The grid of the file, on its own axes."""
        rows, columns, slices = self.header.get_data_shape()
        return VoxelGrid((rows, columns, slices), self.header.get_best_affine())


class LesionLabel(NamedTuple):
    """What a label marks (x, y, z)."""

    lesion: NDArray[np.bool_]
    ignored: NDArray[np.bool_] | None
    """Where nobody says whether there is a lesion; ``None`` if that is known everywhere."""
    notes: list[str]


@dataclass(frozen=True)
class _Reference:
    """The first channel of a case: all other images are brought onto its grid."""

    path: Path
    geometry: Geometry
    grid: Grid
    has_position: bool
    moved: tuple[_Image, ...] = ()
    """Channels that were registered to it: a brain mask on the grid of one moves with it."""


def read_volume(
    case: Case,
    channels: Sequence[str],
    grid: Grid = Grid(),
    *,
    with_label: bool = True,
    resampled: bool = False,
    aligned: bool = False,
) -> Volume:
    """Read ``channels`` of a case in the orientation of ``grid``, checked against each other.

    Negative values are set to zero, and so are voxels outside the case's brain mask, if it has
    one. With ``resampled``, images on another grid than the first channel's are brought onto it by
    their headers (channels trilinear, masks by the nearest voxel), with a note; without, they are
    refused. With ``aligned``, too, a channel that lies on another grid, or beside the first channel
    on the same one, is registered to the first, rigidly, with a note. A label is never resampled,
    because what is measured against it must not depend on how it was brought over. With
    ``resampled``, a label that cannot be used is left out, with a note.

    Raises `AnomriError` naming the file that is missing, damaged, empty, not finite, standardised
    or on another grid, or that is a lesion label in place of a brain mask.
    """
    files = case.files(channels)
    if not files:
        raise AnomriError(f"{case.name}: no channel is asked for; name at least one.")
    reference, arrays, slopes, notes = _read_onto_one_grid(
        files, grid, resampled=resampled, aligned=aligned
    )
    if case.mask is not None:
        mask = _read_brain_mask(case.mask, reference, arrays[0], notes, resampled=resampled)
        arrays = [values * mask for values in arrays]
    inside, brain = _crop_to_brain(case, files, arrays, slopes)
    label: LesionLabel | None = None
    label_error = ""
    if case.label is not None and with_label:
        try:
            label = _read_label_on(reference, case, arrays[0])
            notes += label.notes
        except AnomriError as error:
            if not resampled:
                raise
            label_error = str(error)
            notes.append(f"its label was left out: {error}")
    return Volume(
        case.name,
        tuple(channels),
        inside,
        brain,
        label.lesion if label else None,
        reference.geometry,
        tuple(notes),
        label_error=label_error,
        ignored=label.ignored if label else None,
    )


def read_label(case: Case, grid: Grid = Grid()) -> tuple[LesionLabel, Geometry]:
    """The lesion label of a case in the grid's orientation, and its geometry."""
    assert case.label is not None
    image, notes = read_noted_image(case.label)
    geometry = Geometry.from_header(case.label, image.header, grid)
    label = _read_label_values(case, image)
    ignored = label.ignored
    notes += _note_unknown_position(case.label, geometry)
    return LesionLabel(
        np.ascontiguousarray(geometry.canonical(label.lesion)),
        None if ignored is None else np.ascontiguousarray(geometry.canonical(ignored)),
        [*notes, *label.notes],
    ), geometry


def read_map(
    path: Path, label: Path, geometry: Geometry
) -> tuple[NDArray[np.floating[Any]], list[str]]:
    """An anomaly map (x, y, z) in the working orientation, and notes on its header.

    It must lie on the grid of ``label``. It is float32, or float64 if the file holds values that
    float32 cannot tell apart.
    """
    image, notes = read_noted_image(path)
    check_same_grid(path, image.header, label, geometry)
    values, nan_notes = _without_nan_background(path, read_values(image))
    notes += nan_notes
    rounded = _check_values(path, values).astype(np.float32, copy=False)
    exact = rounded if np.array_equal(rounded, values) else values.astype(np.float64)
    return np.ascontiguousarray(geometry.canonical(exact)), notes


def _read_onto_one_grid(
    files: Sequence[Path], grid: Grid, *, resampled: bool, aligned: bool
) -> tuple[_Reference, list[NDArray[Any]], list[float], list[str]]:
    """The first channel's place; values (x, y, z) and slope of each channel; notes."""
    # Unpacking releases Python's lock, so channels are read in parallel.
    with ThreadPoolExecutor(min(len(files), usable_processors())) as pool:
        images = list(pool.map(_read_channel, files))
    reference, notes = _place_first(images, grid, resampled=resampled)
    first = _place(reference, images[0])
    arrays = []
    for number, image in enumerate(images):
        notes += image.notes
        _check_not_empty(image)
        if aligned and number:
            image = _align(reference, first, image, notes)
            if image.moved is not None:
                reference = replace(reference, moved=(*reference.moved, image))
        arrays.append(_bring_onto(reference, image, notes, resampled=resampled))
        if number:
            advice = OVERLAP_ADVICE[resampled]
            notes += check_channels_overlap(first, _place(reference, image), advice)
    return reference, arrays, [image.slope for image in images], notes


def _place_first(
    images: Sequence[_Image], grid: Grid, *, resampled: bool
) -> tuple[_Reference, list[str]]:
    """The place of the first channel, and notes if its header does not say it.

    If ``resampled``, another channel with as many voxels may say it.
    """
    first = images[0]
    geometry = Geometry.from_header(first.path, first.header, grid)
    if gives_position(first.header):
        return _Reference(first.path, geometry, grid, True), []
    for other in images[1:] if resampled else ():
        if gives_position(other.header) and other.grid.shape == geometry.shape:
            _check_size_without_position(first.path, geometry, other)
            placed = Geometry.from_header(other.path, other.header, grid)
            # Results are written with the first channel's own header.
            geometry = replace(placed, header=first.header)
            note = _note_same_position(first.path, other.path)
            return _Reference(first.path, geometry, grid, True), [note]
    return _Reference(first.path, geometry, grid, False), _note_unknown_position(
        first.path, geometry
    )


def _read_channel(path: Path) -> _Image:
    """Read intensities; negative values, which interpolation leaves, are set to zero."""
    image, header_notes = read_noted_image(path)
    _refuse_own_result(path, image.header)
    stored, slope = read_unscaled(image)
    stored, notes = zero_background(path, stored)
    if notes:
        values, notes = zero_background(path, read_values(image))
        stored, slope = values, 1.0
    stored = _check_values(path, stored)
    check_scan(path, stored)
    if stored.min() >= 0:
        return _Image(path, image.header, stored, slope, (*header_notes, *notes))
    values = _check_values(path, stored if notes else read_values(image))
    lowest, highest = float(values.min()), float(values.max())
    negative, positive = int((values < 0).sum()), int((values > 0).sum())
    share = negative / (negative + positive)
    if share > MAX_NEGATIVE_SHARE and -lowest > MAX_UNDERSHOOT * highest:
        raise AnomriError(
            f"{path}: {share:.0%} of its values that are not zero are negative (down to "
            f"{lowest:.3g}, up to {highest:.3g}); it looks standardised, or is a difference of "
            f"images. Give the image before that step, with intensities from zero up."
        )
    note = (
        f"{path.name} has {negative:,} negative voxels (down to {lowest:.3g}); they were set to "
        f"zero."
    )
    return _Image(path, image.header, np.maximum(values, 0), notes=(*header_notes, *notes, note))


def _refuse_own_result(path: Path, header: nib.Nifti1Header) -> None:
    """Raise `AnomriError` for a map, a mask or a reconstruction that anomri wrote."""
    # A scan converted from DICOM has that description too, but the name of a scan.
    named = any(path.name.endswith(f"_{kind}{suffix}") for kind in OUTPUTS for suffix in SUFFIXES)
    if named and header["descrip"].item() == RESULT:
        raise AnomriError(
            f"{path}: is a result that anomri wrote, not a scan. Give the scan that it was made from."
        )


def _check_values(path: Path, values: NDArray[Any]) -> NDArray[Any]:
    """Refuse values that are not finite real numbers; integers stay, others become float32."""
    if values.dtype.kind not in "iuf":
        raise AnomriError(
            f"{path}: holds values of type {values.dtype}; an image of real numbers is expected."
        )
    if values.dtype.kind in "iu":
        return values
    values = values.astype(np.float32, copy=False)
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise AnomriError(
            f"{path}: {bad:,} of its {values.size:,} voxels are NaN or infinite; replace them, by "
            f"0 outside the brain."
        )
    return values


def _note_unknown_position(path: Path, geometry: Geometry) -> list[str]:
    """A note if nothing says where the image in ``path`` lies."""
    if gives_position(geometry.header):
        return []
    sizes = format_mm(np.array(geometry.file_grid.spacing_mm))
    return [
        f"{path.name} does not say how it lies (sform and qform code 0): left may be right. Its "
        f"axes are taken to run to the left, to the front and up, with voxels of {sizes} by pixdim."
    ]


def _bring_onto(
    reference: _Reference, image: _Image, notes: list[str], *, resampled: bool
) -> NDArray[Any]:
    """The values of an image on the reference's grid, in the working orientation.

    With ``resampled``, an image on another grid is resampled, with a note; without, it is refused.
    """
    first = reference.geometry
    if not resampled:
        check_same_grid(image.path, image.header, reference.path, first)
        return first.canonical(image.values)
    if image.path == reference.path:
        return first.canonical(image.values)
    if not (gives_position(image.header) and reference.has_position):
        notes += _assume_same_position(reference, image)
        return first.canonical(image.values)
    if image.moved is not None:
        values = image.values if image.values.dtype == bool else image.values.astype(np.float32)
        return resample(values, image.moved, first.canonical_grid)
    own = Geometry.from_header(image.path, image.header, reference.grid)
    values, source, target = own.canonical(image.values), own.canonical_grid, first.canonical_grid
    apart = corner_distance_mm(source, target)
    if source.shape == target.shape and apart <= first.tolerance_mm:
        return values
    covered = coverage(source, target)
    part = "" if covered > 0.995 else f", {covered:.0%} of which it covers"
    notes.append(
        f"{image.path.name} lies on another grid than {reference.path.name} ({source} instead of "
        f"{target}, corners up to {apart:.3g} mm apart); it was resampled to that one{part}, by "
        f"what the headers say."
    )
    if values.dtype != bool:
        values = values.astype(np.float32)
    return resample(values, source, target)


def _assume_same_position(reference: _Reference, image: _Image) -> list[str]:
    """A note that an image lies as the reference, where one of the two does not say how it lies.

    Nothing is resampled from or to a position that nibabel made up: raises `AnomriError` if the
    two differ in size.
    """
    if not (gives_position(image.header) or reference.has_position):
        check_same_grid(image.path, image.header, reference.path, reference.geometry)
        return []
    silent, positioned = image.path, reference.path
    if gives_position(image.header):
        silent, positioned = positioned, silent
    shape = tuple(image.header.get_data_shape())
    if shape != reference.geometry.shape:
        raise AnomriError(
            f"{image.path}: {silent.name} does not say how it lies (sform and qform code 0), "
            f"{positioned.name} does, and they differ in size ({shape} and "
            f"{reference.geometry.shape} voxels). Copy the header of the image that it was made "
            "from."
        )
    if silent == reference.path:
        _check_size_without_position(reference.path, reference.geometry, image)
    return [_note_same_position(silent, positioned)]


def _place(reference: _Reference, image: _Image) -> PlacedImage:
    """An image where it is taken to lie, on the axes of its file."""
    first = reference.geometry
    if image.moved is not None:
        return PlacedImage(image.path, image.values, image.moved)
    stated = gives_position(image.header) and reference.has_position
    same = image.grid.shape == first.shape and (
        corner_distance_mm(image.grid, first.file_grid) <= first.tolerance_mm
    )
    grid = image.grid if stated and not same else first.file_grid
    return PlacedImage(image.path, image.values, grid)


def _align(reference: _Reference, first: PlacedImage, image: _Image, notes: list[str]) -> _Image:
    """A channel registered to the ``first``, with a note; as it is if it already lies there."""
    if gives_position(image.header) and reference.has_position:
        own = Geometry.from_header(image.path, image.header, reference.grid).canonical_grid
        target = reference.geometry.canonical_grid
        apart = corner_distance_mm(own, target)
        same = own.shape == target.shape and apart <= reference.geometry.tolerance_mm
    else:
        same = True
        if image.grid.shape != first.grid.shape:
            return image
    placed = _place(reference, image)
    if same and measure_overlap(first, placed).in_common_field >= DOUBTFUL_OVERLAP:
        return image
    moved, note = align(first, placed)
    notes.append(note)
    return image if moved is placed else replace(image, moved=moved.grid)


def _move_with_channel(reference: _Reference, mask: _Image) -> _Image:
    """A brain mask moved as the channel was that it was made from, if that was registered."""
    grid, tolerance = mask.grid, reference.geometry.tolerance_mm
    for channel in (None, *reference.moved):
        other = reference.geometry.file_grid if channel is None else channel.grid
        if grid.shape == other.shape and corner_distance_mm(grid, other) <= tolerance:
            return mask if channel is None else replace(mask, moved=channel.moved)
    return mask


def _check_not_empty(image: _Image) -> None:
    """Raise `AnomriError` if no voxel is above zero."""
    if not image.values[::3, ::3, ::3].any() and not image.values.any():
        raise AnomriError(f"{image.path}: no voxel is above zero; the image is empty.")


def _note_same_position(silent: Path, positioned: Path) -> str:
    return (
        f"{silent.name} does not say how it lies (sform and qform code 0): it was taken to lie as "
        f"{positioned.name}, which has as many voxels."
    )


def _check_size_without_position(path: Path, geometry: Geometry, image: _Image) -> None:
    """Raise `AnomriError` if ``image`` has voxels of another size than the first channel.

    That one, in ``path``, does not say how it lies, so that its size stands in pixdim alone.
    """
    own, other = (np.array(grid.spacing_mm) for grid in (geometry.file_grid, image.grid))
    if sizes_differ(other, own):
        raise AnomriError(
            f"{path}: does not say how it lies (sform and qform code 0), and its voxels have "
            f"{format_mm(own)}, those of {image.path.name} {format_mm(other)}. Volumes depend on "
            f"it; copy the header of the image that it was made from."
        )


def _read_brain_mask(
    path: Path,
    reference: _Reference,
    values: NDArray[Any],
    notes: list[str],
    *,
    resampled: bool,
) -> NDArray[np.bool_]:
    """The voxels of a brain mask, on the grid of the first channel's ``values``.

    As in a label, voxels above zero are marked; from a half on, if the values are shares.
    """
    image, header_notes = read_noted_image(path)
    if not resampled:
        check_same_grid(path, image.header, reference.path, reference.geometry)
    stored, nan_notes = _read_mask_values(path, image)
    first = PlacedImage(reference.path, values, reference.geometry.canonical_grid)
    if is_scan(stored):
        # If it lies elsewhere, that is said first.
        check_mask_overlaps(first, _place(reference, _Image(path, image.header, stored > 0)))
        raise AnomriError(
            f"{path}: holds the values of a scan or of a map, not of a brain mask. Give a mask; if it "
            f"is a scan without its skull, give it as the scan."
        )
    marked, more = find_marked(path, stored, _file_voxel_mm3(image), of_brain=True)
    if not marked.any():
        raise AnomriError(f"{path}: no voxel is above zero; it is not the mask of a brain.")
    own = _move_with_channel(reference, _Image(path, image.header, marked))
    mask = _copy_mask(_bring_onto(reference, own, notes, resampled=resampled))
    notes += [*header_notes, *nan_notes, *more]
    # A mask beside the brain holds too little of it, too.
    notes += check_mask_overlaps(first, _place(reference, own))
    notes += check_brain(path, mask, reference.path, values, reference.geometry.voxel_mm3)
    return mask


def _read_label_on(reference: _Reference, case: Case, values: NDArray[Any]) -> LesionLabel:
    """A case's label on the grid of the first channel, whose ``values`` are given."""
    path = case.label
    assert path is not None
    image, notes = read_noted_image(path)
    first = reference.geometry
    check_same_grid(path, image.header, reference.path, first)
    label = _read_label_values(case, image)
    lesion = _copy_mask(first.canonical(label.lesion))
    check_lesion(path, lesion, reference.path, values, first.voxel_mm3)
    ignored = None if label.ignored is None else _copy_mask(first.canonical(label.ignored))
    return LesionLabel(lesion, ignored, [*notes, *label.notes])


def _read_label_values(case: Case, image: nib.Nifti1Image) -> LesionLabel:
    """What the label of a case marks, on the axes of its file ``image``."""
    path = case.label
    assert path is not None
    values, notes = _read_mask_values(path, image)
    if is_scan(values):
        raise AnomriError(
            f"{path}: holds the values of a scan or of a map, not of a label. Give the label of the "
            f"lesions; if it is a scan, give it the name of its channel."
        )
    values, ignored, more = split_ignored(values, case.ignored, path)
    lesion, how = find_marked(path, values, _file_voxel_mm3(image))
    return LesionLabel(lesion, ignored, [*notes, *more, *how])


def _read_mask_values(path: Path, image: nib.Nifti1Image) -> tuple[NDArray[Any], list[str]]:
    """The values of a mask or a label, finite, and a note if its background was not."""
    values, notes = _without_nan_background(path, read_values(image))
    return _check_values(path, values), notes


def _without_nan_background(path: Path, values: NDArray[Any]) -> tuple[NDArray[Any], list[str]]:
    """Values without the NaN that reach the faces of an image, and a note if there were any."""
    if values.dtype.kind != "f" or not np.isnan(values).any():
        return values, []
    return without_nan_around(path, values)


def _file_voxel_mm3(image: nib.Nifti1Image) -> float:
    """The volume of a voxel by the affine."""
    return abs(float(np.linalg.det(image.affine[:3, :3])))


def _copy_mask(turned: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask that is a turned view, as an array of its own; most of it is empty and not copied."""
    mask = np.zeros(turned.shape, dtype=bool)
    box = box_around(turned)
    copy_transposed(turned[box], mask[box])
    return mask


def _crop_to_brain(
    case: Case,
    files: Sequence[Path],
    arrays: Sequence[NDArray[Any]],
    slopes: Sequence[float],
) -> tuple[NDArray[np.float32], tuple[slice, ...]]:
    """The box around the brain in all channels: its content (channels, x, y, z), and the box."""
    boxes = [box_around(values) for values in arrays]
    for path, box in zip(files, boxes, strict=True):
        if is_empty(box):
            where = f"the field of {files[0].name}"
            if case.mask is not None:
                where = f"the brain mask {case.mask.name}"
            raise AnomriError(f"{path}: no voxel above zero lies in {where}; look at both.")
    brain = enclosing_box(boxes)
    sides = [side.stop - side.start for side in brain]
    inside = np.empty((len(arrays), *sides), dtype=np.float32)
    for values, slope, channel in zip(arrays, slopes, inside, strict=True):
        copy_transposed(values[brain], channel)
        if slope != 1:
            channel *= np.float32(slope)
    return inside, brain
