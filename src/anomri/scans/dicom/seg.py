"""DICOM out: a mask as a DICOM segmentation (SEG) of the series it was found in.

A SEG belongs to its source's study, so it carries that study's patient module: name, PatientID,
birth date and sex as the source has them. The standard requires it (PS3.3, A.51); it is as
identifying as the source series.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import orientations
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.files import whole_file
from anomri.scans.dicom.channels import Series
from anomri.scans.dicom.files import describe_error, import_dicom, quiet, read_headers
from anomri.scans.dicom.stack import stack_slices
from anomri.scans.geometry import Geometry
from anomri.scans.resample import VoxelGrid

PATIENT_AND_STUDY = [
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "ReferringPhysicianName",
]
"""Elements that the standard requires in a SEG, perhaps empty."""
VALID = {
    "PatientSex": r"[MFO]?",
    "PatientBirthDate": r"(\d{8})?",
    "StudyDate": r"(\d{8})?",
    "StudyTime": r"(\d{2}){0,3}(\.\d{1,6})?",
}
"""What the standard allows in elements that anonymisation fills with other text."""
OFFSET_TOLERANCE = 0.1
"""How far, in voxels, a voxel of the mask may lie from its pixel of the source series."""


def write_segmentation(
    path: Path,
    mask: NDArray[np.bool_],
    geometry: Geometry,
    source: Series,
    *,
    parameters: Mapping[str, object] | None = None,
) -> list[str]:
    """Write a mask as DICOM SEG (binary, one segment ``Anomaly``) on the slices of ``source``.

    ``mask`` (x, y, z) is in the working orientation of ``geometry``, which must be that of the
    series' own NIfTI. ``parameters``, such as the method and the threshold, are listed as those of
    the algorithm. Slices without a finding are left out; an empty mask is written with all slices.
    Returns the names of elements that are left empty, because the series holds values there that
    the standard forbids.
    Raises `AnomriError` naming the file, or the series if the mask lies on another grid or the
    headers do not suffice.
    """
    highdicom = import_dicom("highdicom")
    with quiet():
        slices, affine, emptied = _read_source(source)
        shape = (int(slices[0].Columns), int(slices[0].Rows), len(slices))
        frames = _turn_onto(mask, geometry, VoxelGrid(shape, affine), source.place)
        with whole_file(path) as partial:
            try:
                frames = frames.transpose(2, 1, 0)
                _make_segmentation(highdicom, slices, frames, parameters or {}).save_as(partial)
            except OSError:
                raise
            except (
                Exception
            ) as error:  # highdicom raises anything for a missing or odd header value
                raise AnomriError(
                    f"{source.place}: its headers do not suffice for a DICOM SEG "
                    f"({describe_error(error)}); leave --dicom-seg out, or correct the headers."
                ) from None
    return emptied


def _read_source(source: Series) -> tuple[list[Any], NDArray[np.float64], list[str]]:
    """The headers of a series in the order of its slices, completed for a SEG, and its affine.

    The third value names the elements whose values the standard forbids, which are emptied.
    """
    if source.frames:
        raise AnomriError(
            f"{source.place}: is enhanced multi-frame MR, for which no DICOM SEG is written; leave "
            f"--dicom-seg out, or convert the mask with another tool."
        )
    headers = [read_headers(file) for file in source.files]
    slices, affine = stack_slices(source, headers)
    emptied: set[str] = set()
    for one in slices:
        # Anonymisation may have removed whole elements; the standard wants them there, empty.
        for keyword in PATIENT_AND_STUDY:
            if keyword not in one:
                setattr(one, keyword, "")
        for keyword, allowed in VALID.items():
            if not re.fullmatch(allowed, str(one.get(keyword) or "").strip()):
                setattr(one, keyword, "")
                emptied.add(keyword)
        if not one.get("SliceThickness"):
            one.SliceThickness = f"{np.linalg.norm(affine[:3, 2]):.6g}"
    return slices, affine, sorted(emptied)


def _turn_onto(
    mask: NDArray[np.bool_], geometry: Geometry, series: VoxelGrid, where: str
) -> NDArray[np.bool_]:
    """The mask on the axes (column, row, slice) of a series, on whose grid it must lie."""
    # The axes follow from where voxels lie, in whatever order the mask's file is stored.
    turn = orientations.io_orientation(np.linalg.inv(series.affine) @ geometry.canonical_affine)
    turned = orientations.apply_orientation(mask, turn)
    affine = geometry.canonical_affine @ orientations.inv_ornt_aff(turn, mask.shape)
    in_series, in_mask = (
        apply_affine(np.linalg.inv(to_mm), series.corners_mm) for to_mm in (series.affine, affine)
    )
    apart = float(np.abs(in_series - in_mask).max())
    if turned.shape != series.shape or apart > OFFSET_TOLERANCE:
        raise AnomriError(
            f"{where}: the mask lies on another grid ({turned.shape} voxels, up to {apart:.3g} "
            f"voxels away) than this series ({series.shape}). Name the series that the scan was "
            f"converted from, before any resampling."
        )
    return np.asarray(turned, dtype=bool)


def _make_segmentation(
    highdicom: Any, source: list[Any], frames: NDArray[np.bool_], parameters: Mapping[str, object]
) -> Any:
    """The DICOM object of ``frames`` (slice, row, column), which lie on the slices ``source``."""
    code = highdicom.sr.CodedConcept
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="anomri",
        family=code("123110", "DCM", "Artificial Intelligence"),
        version=version("anomri"),
        parameters={name: str(value) for name, value in parameters.items()} or None,
    )
    segment = highdicom.seg.SegmentDescription(
        segment_number=1,
        segment_label="Anomaly",
        segmented_property_category=code("49755003", "SCT", "Morphologically Abnormal Structure"),
        segmented_property_type=code("52988006", "SCT", "Lesion"),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        anatomic_regions=[code("12738006", "SCT", "Brain")],
    )
    return highdicom.seg.Segmentation(
        source_images=source,
        pixel_array=frames.astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=[segment],
        series_instance_uid=highdicom.UID(),
        series_number=900 + int(source[0].get("SeriesNumber") or 0) % 100,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="anomri",
        manufacturer_model_name="anomri",
        software_versions=version("anomri"),
        # The standard wants a value; software has no serial number.
        device_serial_number="0",
        content_label="ANOMALY",
        content_description="What does not look healthy, found automatically",
        series_description="anomri anomaly mask, for research",
        omit_empty_frames=bool(frames.any()),
    )
