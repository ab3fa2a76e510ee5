"""DICOM files one by one: what is one, its headers and pixels, and errors that tell nothing of a patient."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError, first_line
from anomri.optional import import_extra

REASONS = {
    "1.2.840.10008.5.1.4.1.1.4.1": "enhanced multi-frame MR; convert it to NIfTI with dcm2niix",
    "1.2.840.10008.1.3.10": "a DICOMDIR, an index only; the images it lists are looked for in this folder itself",
}
"""Why an object of this SOP class is left out, where its name does not say it."""
TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesDescription",
]
TAGS += [
    "ProtocolName",
    "ImageType",
    "ContrastBolusAgent",
    "EchoTime",
    "InversionTime",
    "ScanningSequence",
]
TAGS += ["FrameOfReferenceUID"]


def import_dicom(module: str) -> Any:
    """Import a library of the ``dicom`` extra; raises `AnomriError` with the command to install it."""
    return import_extra(module, "dicom", "DICOM")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of the DICOM libraries, which quote header values that may be a patient's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def regular_files(folder: Path) -> Iterator[Path]:
    """The files in a folder and below it, less hidden ones and what is no plain file; `AnomriError` if it is none."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise AnomriError(
            f"{folder}: {what}; name the folder that holds the DICOM series (not a DICOMDIR)."
        )
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place, name) for name in sorted(names) if not name.startswith(".")):
            # Nothing else can be read without waiting: a pipe would block.
            if path.is_file():
                yield path


def read_header(path: Path) -> Any:
    """The tags of `TAGS` in a file; ``None`` if it is not DICOM."""
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
        raise cut_short(path, error) from error
    if not text_of(header, "SOPClassUID"):
        raise cut_short(path, "it does not say what it is")
    return header


def read_whole(path: Path) -> Any:
    """A file with its pixels, not decoded; raises `AnomriError` naming it if it is damaged or has none."""
    try:
        one = import_dicom("pydicom").dcmread(path)
    except Exception as error:  # damaged bytes make pydicom raise about anything
        raise cut_short(path, error) from error
    if "PixelData" not in one:
        raise cut_short(path, "it holds no pixels")
    return one


def check_pixels(one: Any) -> None:
    """Decode the pixels of a file that was read; raises `AnomriError` naming it if that fails."""
    try:
        one.pixel_array  # noqa: B018 - decodes
    except Exception as error:  # each decoder has its own errors
        syntax = one.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            raise cut_short(Path(one.filename), error) from error
        reason = reason_of(error)
        raise AnomriError(
            f"{one.filename}: its pixels are compressed as {syntax.name} and cannot be decoded ({reason}). Decompress "
            f"the series (gdcmconv --raw, or dcmdjpeg), or copy it again if the file is damaged."
        ) from error


def reason_of(error: Exception) -> str:
    """What an error of a DICOM library says, without the header values it quotes: they may be a patient's."""
    text = first_line(error)
    # The quotes of an attribute error hold the name of the attribute.
    return text if isinstance(error, AttributeError) else re.sub(r"(['\"]).*\1", "'...'", text)


def cut_short(path: Path, error: Exception | str) -> AnomriError:
    """What to raise for a file that cannot be read."""
    reason = error if isinstance(error, str) else reason_of(error)
    return AnomriError(
        f"{path}: cannot be read as DICOM, it is damaged or cut short ({reason}); copy it again."
    )


def text_of(header: Any, keyword: str) -> str:
    """A value of a header as text, empty if there is none; several values with spaces between them."""
    try:
        value = header.get(keyword)
    except Exception:  # a value is parsed when asked for; one that cannot be says nothing
        return ""
    many = isinstance(value, Sequence) and not isinstance(value, str)
    return " ".join(str(part) for part in value).strip() if many else str(value or "").strip()


def number_of(header: Any, keyword: str) -> float | None:
    """A value of a header as a number; ``None`` if it is none."""
    try:
        return float(text_of(header, keyword))
    except ValueError:
        return None
