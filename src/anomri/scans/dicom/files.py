"""Single DICOM files: their headers and pixels, and errors that reveal nothing about a patient."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError, first_line
from anomri.optional import import_extra
from anomri.scans.places import walk_once

REASONS = {
    "1.2.840.10008.5.1.4.1.1.4.1": "enhanced multi-frame MR; convert it to NIfTI with dcm2niix",
    "1.2.840.10008.1.3.10": "a DICOMDIR, which is only an index; the folder itself is searched",
}
"""Why objects of this SOP class are left out, where the name of the class does not say it."""
TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesDescription",
    "ProtocolName",
    "ImageType",
    "ContrastBolusAgent",
    "EchoTime",
    "InversionTime",
    "ScanningSequence",
    "FrameOfReferenceUID",
]
"""The tags that are read of each file."""


def import_dicom(module: str) -> Any:
    """Import a library of the ``dicom`` extra; raises `AnomriError` with how to install it."""
    return import_extra(module, "dicom", "DICOM")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of DICOM libraries: they quote header values, maybe a patient's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def regular_files(folder: Path) -> Iterator[Path]:
    """The files in a folder and below it, but hidden ones; raises `AnomriError` if it is none."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise AnomriError(
            f"{folder}: {what}; name the folder that holds the DICOM series (not a DICOMDIR)."
        )
    for place, names in walk_once(folder):
        for name in names:
            path = Path(place, name)
            # Regular files only: reading a pipe would block.
            if not name.startswith(".") and path.is_file():
                yield path


def read_header(path: Path) -> Any:
    """The `TAGS` of a file, as a pydicom data set; ``None`` if the file is not DICOM."""
    pydicom = import_dicom("pydicom")
    if not path.stat().st_size:
        raise AnomriError(f"{path}: the file is empty; copy it again, or delete it.")
    try:
        with quiet():
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
            if header.file_meta.get("MediaStorageSOPClassUID") in REASONS:
                header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID
    except pydicom.errors.InvalidDicomError:
        return None
    except Exception as error:  # damaged bytes make pydicom raise about anything
        raise damaged(path, describe_error(error)) from error
    if not read_text(header, "SOPClassUID"):
        raise damaged(path, "it does not say what it is")
    return header


def read_whole(path: Path) -> Any:
    """A file with its pixels, not decoded; raises `AnomriError` if it is damaged or has none."""
    try:
        data_set = import_dicom("pydicom").dcmread(path)
    except Exception as error:  # damaged bytes make pydicom raise about anything
        raise damaged(path, describe_error(error)) from error
    if "PixelData" not in data_set:
        raise damaged(path, "it holds no pixels")
    return data_set


def check_pixels(data_set: Any) -> None:
    """Decode the pixels of a file that was read; raises `AnomriError` naming it if that fails."""
    try:
        data_set.pixel_array  # noqa: B018 - decodes
    except Exception as error:  # each decoder has its own errors
        reason = describe_error(error)
        syntax = data_set.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            raise damaged(Path(data_set.filename), reason) from error
        raise AnomriError(
            f"{data_set.filename}: its pixels are compressed as {syntax.name} and cannot be "
            f"decoded ({reason}). Decompress the series (gdcmconv --raw, or dcmdjpeg), or copy it "
            f"again if the file is damaged."
        ) from error


def describe_error(error: Exception) -> str:
    """The text of a DICOM library's error, without quoted header values, maybe a patient's.

    >>> describe_error(ValueError("cannot read '19010203' as a number"))
    "cannot read '...' as a number"
    """
    text = first_line(error)
    # The quotes of an attribute error hold the name of the attribute.
    return text if isinstance(error, AttributeError) else re.sub(r"(['\"]).*\1", "'...'", text)


def damaged(path: Path, reason: str) -> AnomriError:
    """The error for a file that cannot be read."""
    return AnomriError(
        f"{path}: cannot be read as DICOM, it is damaged or cut short ({reason}); copy it again."
    )


def read_text(header: Any, keyword: str) -> str:
    """A header value as text, empty if there is none; several values are joined by spaces."""
    try:
        value = header.get(keyword)
    except Exception:  # values are parsed when asked for; this one cannot be
        return ""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(str(part) for part in value).strip()
    return str(value or "").strip()


def read_number(header: Any, keyword: str) -> float | None:
    """A header value as a number; ``None`` if it is not one."""
    try:
        return float(read_text(header, keyword))
    except ValueError:
        return None
