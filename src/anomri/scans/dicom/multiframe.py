"""Enhanced MR images: all slices of a series in one file, described by functional groups.

Each group holds for one frame, or in the shared groups for all (PS3.3, C.7.6.16 and C.8.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.scans.dicom.channels import Series
from anomri.scans.dicom.files import (
    Header,
    check_pixels,
    import_dicom,
    quiet,
    read_headers,
    read_text,
    read_whole,
)
from anomri.scans.dicom.stack import stack_slices

ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
TIMES = {
    "EchoTime": ("MREchoSequence", "EffectiveEchoTime"),
    "RepetitionTime": ("MRTimingAndRelatedParametersSequence", "RepetitionTime"),
    "InversionTime": ("MRModifierSequence", "InversionTimes"),
    "DiffusionBValue": ("MRDiffusionSequence", "DiffusionBValue"),
    "ImageOrientationPatient": ("PlaneOrientationSequence", "ImageOrientationPatient"),
    "ImagePositionPatient": ("PlanePositionSequence", "ImagePositionPatient"),
}
"""Where functional groups have what a classic image has in its own tags."""
PULSES = {"SPIN": "SE", "GRADIENT": "GR", "BOTH": "SE GR"}
"""Values of EchoPulseSequence as ScanningSequence has them."""


def frame_headers(path: Path) -> list[Header]:
    """What the headers of a file say of each frame, in the tags of classic images.

    It is empty if a frame has no position: then it is no scan.
    """
    with quiet():
        data_set = read_headers(path)
        sequence = PULSES.get(read_text(data_set, "EchoPulseSequence"), "")
        if read_text(data_set, "EchoPlanarPulseSequence") == "YES":
            sequence += " EP"
        common = {
            "ScanningSequence": sequence,
            "SequenceName": read_text(data_set, "PulseSequenceName"),
            "ImageType": read_text(data_set, "ImageType"),
            "BodyPartExamined": read_text(data_set, "BodyPartExamined"),
        }
        if read_text(data_set, "TimeOfFlightContrast") == "TRUE":
            common["AngioFlag"] = "Y"
        frames = [
            common | {keyword: _group_text(groups, *place) for keyword, place in TIMES.items()}
            for groups in _groups_of_frames(data_set)
        ]
    has_places = all(frame["ImagePositionPatient"] for frame in frames)
    return list(frames) if has_places else []


def read_multiframe(series: Series) -> nib.Nifti1Image:
    """The image (column, row, slice) of a series that is one file of several frames.

    Values that the headers rescale are float32. Raises `AnomriError` as `read_series` does.
    """
    (path,) = set(series.files)
    data_set = read_whole(path)
    check_pixels(data_set)
    pixels: NDArray[Any] = data_set.pixel_array
    frames = _make_slices(data_set)
    if pixels.shape != (len(frames), data_set.Rows, data_set.Columns):
        raise AnomriError(
            f"{series.place}: an image of {pixels.shape} came out of {len(frames)} grey slices; "
            f"convert it to NIfTI by hand."
        )
    ordered, affine = stack_slices(series, frames)
    values = pixels[[frame.InstanceNumber for frame in ordered]]
    slopes = np.array([frame.RescaleSlope for frame in ordered], dtype=np.float64)
    intercepts = np.array([frame.RescaleIntercept for frame in ordered], dtype=np.float64)
    if (slopes != 1).any() or intercepts.any():
        scaled = values * slopes[:, None, None] + intercepts[:, None, None]
        values = scaled.astype(np.float32)
    return nib.Nifti1Image(np.ascontiguousarray(values.transpose(2, 1, 0)), affine)


def _make_slices(data_set: Any) -> list[Any]:
    """A data set for each frame, with the tags of a classic image; they are numbered from 0."""
    dataset = import_dicom("pydicom").Dataset
    slices = []
    for number, groups in enumerate(_groups_of_frames(data_set)):
        one = dataset()
        one.InstanceNumber, one.Rows, one.Columns = number, data_set.Rows, data_set.Columns
        for keyword in ("ImageOrientationPatient", "ImagePositionPatient"):
            setattr(one, keyword, _group_value(groups, *TIMES[keyword]))
        one.PixelSpacing = _group_value(groups, "PixelMeasuresSequence", "PixelSpacing")
        for keyword, otherwise in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
            value = _group_value(groups, "PixelValueTransformationSequence", keyword)
            setattr(one, keyword, otherwise if value is None else value)
        slices.append(one)
    return slices


def _groups_of_frames(data_set: Any) -> list[list[Any]]:
    """For each frame its own functional groups and the shared ones."""
    shared = list(data_set.get("SharedFunctionalGroupsSequence") or [])[:1]
    return [[own, *shared] for own in data_set.get("PerFrameFunctionalGroupsSequence") or []]


def _group_value(groups: Sequence[Any], sequence: str, keyword: str) -> Any:
    """The value of an element in the first group that has it; ``None`` if none does."""
    for group in groups:
        items = group.get(sequence)
        if items and items[0].get(keyword) is not None:
            return items[0].get(keyword)
    return None


def _group_text(groups: Sequence[Any], sequence: str, keyword: str) -> str:
    for group in groups:
        items = group.get(sequence)
        if items and (text := read_text(items[0], keyword)):
            return text
    return ""
