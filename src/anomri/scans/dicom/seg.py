"""DICOM out: a mask as a DICOM segmentation (SEG) of the series it was found in.

A SEG belongs to its source's study, so it carries that study's patient module: name, PatientID, birth date and sex
as the source has them. The standard asks for it (PS3.3, A.51); it is as identifying as the source series.
"""

from __future__ import annotations

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
from anomri.scans.dicom.files import import_dicom, quiet, reason_of
from anomri.scans.dicom.read import stack
from anomri.scans.geometry import Geometry

PATIENT_AND_STUDY = ["PatientName", "PatientID", "PatientBirthDate", "PatientSex"]
PATIENT_AND_STUDY += [
    "AccessionNumber",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "ReferringPhysicianName",
]
OFFSET_TOLERANCE = 0.1
"""How far, in voxels, a voxel of the mask may lie from the pixel of the source series that it becomes."""


def write_segmentation(
    path: Path,
    mask: NDArray[np.bool_],
    geometry: Geometry,
    source: Series,
    *,
    parameters: Mapping[str, object] | None = None,
) -> None:
    """Write a mask as DICOM SEG (binary, one segment ``Anomaly``) on the slices of ``source``, whole or not at all.

    ``mask`` (x, y, z) lies in the working orientation of ``geometry``, which has to be that of the series'
    own NIfTI, whatever its axes. ``parameters``, such as the method and the threshold on the score, are listed as
    those of the algorithm. Slices without a finding are left out; of an empty mask all are written, all empty.
    Raises `AnomriError` naming the file, or the series if the mask lies on another grid or its headers do not do.
    """
    pydicom, highdicom = import_dicom("pydicom"), import_dicom("highdicom")
    where = f"{source.files[0].parent}, series {source}"
    with quiet():
        try:
            headers = [pydicom.dcmread(file, stop_before_pixels=True) for file in source.files]
        except Exception as error:  # damaged bytes make pydicom raise about anything
            raise AnomriError(
                f"{where}: cannot be read as DICOM ({reason_of(error)}); copy it again."
            ) from error
        ordered, affine = stack(source, headers)
        for one in ordered:
            # Where names were taken out the whole element may be gone; the standard wants it there, empty.
            for keyword in PATIENT_AND_STUDY:
                if keyword not in one:
                    setattr(one, keyword, "")
            if not one.get("SliceThickness"):
                one.SliceThickness = f"{np.linalg.norm(affine[:3, 2]):.6g}"
        shape = (int(ordered[0].Columns), int(ordered[0].Rows), len(ordered))
        frames = _onto(mask, geometry, shape, affine, where).transpose(2, 1, 0)
        with whole_file(path) as partial:
            try:
                _segmentation(highdicom, ordered, frames, parameters or {}).save_as(partial)
            except OSError:
                raise
            except (
                Exception
            ) as error:  # highdicom raises what a missing or odd header value leads to
                reason = reason_of(error)
                raise AnomriError(
                    f"{where}: its headers do not do for a DICOM SEG ({reason})."
                ) from error


def _onto(
    mask: NDArray[np.bool_],
    geometry: Geometry,
    shape: tuple[int, int, int],
    affine: NDArray[np.float64],
    where: str,
) -> NDArray[np.bool_]:
    """The mask on the axes (column, row, slice) of a series, whose voxel centres have to be the mask's own."""
    here = geometry.canonical_affine
    # The axes are taken from where voxels lie in mm: which way the mask's file was stored does not matter.
    turn = orientations.io_orientation(np.linalg.inv(affine) @ here)
    turned = orientations.apply_orientation(mask, turn)
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (
        np.array(shape) - 1
    )
    there = apply_affine(
        np.linalg.inv(here @ orientations.inv_ornt_aff(turn, mask.shape)) @ affine, corners
    )
    apart = float(np.abs(there - corners).max())
    if turned.shape != shape or apart > OFFSET_TOLERANCE:
        raise AnomriError(
            f"{where}: the mask lies on another grid ({turned.shape} voxels, up to {apart:.3g} voxels away) than this "
            f"series ({shape}). Name the series that the scan was converted from, before any resampling."
        )
    return np.asarray(turned, dtype=bool)


def _segmentation(
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
