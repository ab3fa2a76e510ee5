"""Converting DICOM series to NIfTI without a name.

A NIfTI file written here holds voxels and a position, nothing else from the headers. File names and
case names hold a hash of the study's UID. Only ``keep_identifiers=True`` reveals the PatientID, as
part of the case's name. Messages name files and the SeriesDescription, free text into which a
scanner's user may have written anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.files import output_folder
from anomri.scans.case import Case
from anomri.scans.dicom.channels import Series
from anomri.scans.dicom.files import (
    check_pixels,
    describe_error,
    import_dicom,
    open_data_set,
    quiet,
    read_text,
    read_whole,
)
from anomri.scans.dicom.find import choose_series
from anomri.scans.dicom.multiframe import read_multiframe
from anomri.scans.dicom.stack import stack_slices
from anomri.scans.nifti import read_image, write_image


def convert(
    folder: str | Path,
    out: str | Path,
    channels: Mapping[str, str] | None = None,
    *,
    keep_identifiers: bool = False,
    on_skipped: Callable[[str], None] | None = None,
) -> Case:
    """Write ``<case>_<channel>.nii.gz`` to ``out`` for the series that `choose_series` chooses.

    All series are read before the first file is written. The case is called ``case`` and twelve
    digits of the hash of its StudyInstanceUID; with ``keep_identifiers`` its PatientID stands
    before them and is the case's ``subject``. Series are not registered to each other. Raises
    `AnomriError` naming the folder or file that is not MR, damaged or incomplete, or how to
    install libraries that are missing.
    """
    chosen = choose_series(folder, channels, on_skipped)
    return convert_series(chosen, out, keep_identifiers=keep_identifiers)


def convert_series(
    chosen: Mapping[str, Series], out: str | Path, *, keep_identifiers: bool = False
) -> Case:
    """As `convert`, for series that are chosen already: channel -> series of one study."""
    first = next(iter(chosen.values()))
    subject = _read_patient_id(first.files[0]) if keep_identifiers else None
    name = _name_case(first.study, subject)
    images = {channel: read_series(series) for channel, series in chosen.items()}
    out = output_folder(Path(out))
    files = {channel: out / f"{name}_{channel}.nii.gz" for channel in chosen}
    for channel, image in images.items():
        # A file that is already there keeps its time, by which a resumed run knows what is done.
        if not _holds(files[channel], image):
            write_image(files[channel], image)
    notes = [
        f"which series is {channel} is in doubt: {series.doubt}. If that is wrong, name the series "
        f"with --series {channel}=..."
        for channel, series in chosen.items()
        if series.doubt
    ]
    if len({series.frame for series in chosen.values() if series.frame}) > 1:
        notes.append(
            "its series are not of one frame of reference (the patient may have moved in between), "
            "and their channels may not lie on each other: register them, or look at one."
        )
    return Case(name, files, subject=subject or None, notes=tuple(notes))


def read_series(series: Series) -> nib.Nifti1Image:
    """The image (column, row, slice) of a series, decoded and rescaled by dicom2nifti.

    Integers stay as they are; values that the headers rescale are float32. Raises `AnomriError`
    naming the file or the series that cannot be decoded or does not fit.
    """
    if series.frames:
        with quiet():
            image = read_multiframe(series)
        return _make_nameless(np.asanyarray(image.dataobj), image.affine)
    with quiet():
        slices = [read_whole(path) for path in series.files]
        ordered, affine = stack_slices(series, slices)
        image = _run_dicom2nifti(series, ordered)
    data = np.asanyarray(image.dataobj)
    if data.shape != (ordered[0].Columns, ordered[0].Rows, len(ordered)):
        raise AnomriError(
            f"{series.place}: an image of {data.shape} came out of {len(ordered)} grey slices; "
            f"convert it to NIfTI by hand."
        )
    if not np.allclose(image.affine, affine, atol=1e-3):
        raise AnomriError(
            f"{series.place}: dicom2nifti places it elsewhere than its headers say; convert it to "
            f"NIfTI by hand."
        )
    return _make_nameless(data, affine)


def _read_patient_id(path: Path) -> str:
    with quiet():
        return read_text(open_data_set(path, specific_tags=["PatientID"]), "PatientID")


def _name_case(study: str, subject: str | None) -> str:
    digits = sha256(study.encode()).hexdigest()[:12]
    if subject is None:
        return f"case{digits}"
    # The digits stay: two visits of a patient are two cases, and must not overwrite each other.
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', subject).strip('.-') or 'unnamed'}-{digits}"


def _holds(path: Path, image: nib.Nifti1Image) -> bool:
    try:
        return read_image(path).to_bytes() == image.to_bytes()
    except AnomriError:
        return False


def _run_dicom2nifti(series: Series, ordered: Sequence[Any]) -> Any:
    library = import_dicom("dicom2nifti.convert_dicom")
    for number, data_set in enumerate(ordered, start=1):
        # dicom2nifti takes slices numbered in the order of acquisition for several volumes.
        data_set.InstanceNumber = number
        # It asks for the modality, which may be missing; that the series is MR is known.
        data_set.Modality = "MR"
        for keyword in ("EchoTime", "RepetitionTime"):
            # dicom2nifti reads them as numbers, but they may be empty; they are not needed.
            if keyword in data_set:
                delattr(data_set, keyword)
    try:
        # Not reoriented: slices stay slices.
        return library.dicom_array_to_nifti(ordered, None, reorient_nifti=False)["NII"]
    except Exception as error:  # a decoder or dicom2nifti raises anything; name the first bad file
        for data_set in ordered:
            check_pixels(data_set)
        raise AnomriError(
            f"{series.place}: dicom2nifti cannot convert it ({describe_error(error)}); convert it "
            f"to NIfTI with another tool."
        ) from None


def _make_nameless(data: NDArray[Any], affine: NDArray[np.float64]) -> nib.Nifti1Image:
    """An image of nothing but voxels and a position."""
    image = nib.Nifti1Image(data.astype(np.float32) if data.dtype.kind == "f" else data, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header["descrip"] = b"anomri"
    return image
