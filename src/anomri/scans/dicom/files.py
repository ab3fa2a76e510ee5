"""Single DICOM files: their headers and pixels, and errors that reveal nothing about a patient."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError, first_line
from anomri.optional import import_extra
from anomri.scans.dicom.signature import PREAMBLE, PREFIX, find_start
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
    "RepetitionTime",
    "InversionTime",
    "ScanningSequence",
    "SequenceVariant",
    "SequenceName",
    "AngioFlag",
    "DiffusionBValue",
    "BodyPartExamined",
    "NumberOfTemporalPositions",
    "ImageOrientationPatient",
    "FrameOfReferenceUID",
    "Rows",
    "Columns",
]
"""The tags that are read of each file."""
NUMBERS = (
    *("EchoTime", "RepetitionTime", "InversionTime"),
    *("DiffusionBValue", "NumberOfTemporalPositions"),
)
"""Those of the tags that hold a number."""
LOGGERS = ("pydicom", "dicom2nifti", "highdicom")
"""Loggers of DICOM libraries; they quote header values."""
UNREADABLE = "?"
"""What a header has as text for a number that is none."""
Header = Mapping[str, str]
"""Those of the `TAGS` that a file has, as text; several values are joined by spaces."""


def import_dicom(module: str) -> Any:
    """Import a library of the ``dicom`` extra; raises `AnomriError` with how to install it."""
    return import_extra(module, "dicom", "DICOM")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and loggers of DICOM libraries: they quote header values, maybe a patient's.

    Whatever asks a DICOM library for a value runs in it, since values are parsed when asked for.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in LOGGERS:
            logger = logging.getLogger(name)
            if logger.level > logging.CRITICAL:  # silenced already, and setting it takes time
                continue
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        yield


def files_below(folder: Path) -> Iterator[Path]:
    """What lies in a folder and below it, but hidden; raises `AnomriError` if it is no folder.

    Broken links and pipes are among them: reading one would fail or block.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise AnomriError(
            f"{folder}: {what}; name the folder that holds the DICOM series (not a DICOMDIR)."
        )
    for place, names in walk_once(folder):
        for name in names:
            if not name.startswith("."):
                yield Path(place, name)


def read_header(path: Path) -> Header | None:
    """The `TAGS` of a file; ``None`` if the file is not DICOM.

    Raises `AnomriError` for an empty or damaged file, and for one that does not say what it is.
    """
    if not path.stat().st_size:
        raise AnomriError(f"{path}: the file is empty; copy it again, or delete it.")
    with quiet():
        data_set = open_data_set(path, stop_before_pixels=True, specific_tags=TAGS)
        if data_set is None:
            return None
        found = {name: _known_text(data_set, name) for name in TAGS if name in data_set}
        stored_as = read_text(data_set.file_meta, "MediaStorageSOPClassUID")
    if stored_as in REASONS:
        found["SOPClassUID"] = stored_as
    if found.get("SOPClassUID") or (found.get("Rows") and found.get("Columns")):
        return found
    if not has_prefix(path):
        return None
    raise damaged(path, "it does not say what it is")


def _known_text(data_set: Any, keyword: str) -> str:
    """The text of an element, but nothing that does not belong there: it may be a patient's name.

    A UID that is none becomes a hash.
    """
    text = read_text(data_set, keyword)
    if keyword.endswith("UID") and not re.fullmatch(r"([0-2](\.\d+)+)?", text):
        return (
            "" if keyword == "SOPClassUID" else f"invalid-{sha256(text.encode()).hexdigest()[:12]}"
        )
    if keyword in NUMBERS and not re.fullmatch(r"[0-9eE+\-. ]*", text):
        return UNREADABLE
    return text


def open_data_set(path: Path, **options: Any) -> Any:
    """A file as a pydicom data set; ``None`` if it is not DICOM.

    Files without preamble or file meta information are read too. What their meta information does
    not say is taken from how the elements are written: implicit VR little endian is the default of
    the standard (PS3.5, 10.1). ``options`` are those of ``pydicom.dcmread``. Raises `AnomriError`
    if the file is damaged.
    """
    pydicom = import_dicom("pydicom")
    try:
        with quiet():
            if has_prefix(path):
                data_set = pydicom.dcmread(path, **options)
            else:
                content = path.read_bytes()
                start = find_start(content)
                if start is None:
                    return None
                data_set = pydicom.dcmread(BytesIO(content[start:]), force=True, **options)
            data_set.filename = str(path)
            if not read_text(data_set.file_meta, "TransferSyntaxUID"):
                data_set.file_meta.TransferSyntaxUID = _transfer_syntax(data_set)
    except Exception as error:  # damaged bytes make pydicom raise about anything
        raise damaged(path, describe_error(error)) from None
    return data_set


def has_prefix(path: Path) -> bool:
    """Whether a file has a preamble and ``DICM``."""
    with path.open("rb") as file:
        return file.read(PREAMBLE + len(PREFIX)).endswith(PREFIX)


def _transfer_syntax(data_set: Any) -> str:
    """How the elements of a data set are written, whose meta information does not say so."""
    uid = import_dicom("pydicom").uid
    implicit, little_endian = data_set.original_encoding
    if implicit:
        return str(uid.ImplicitVRLittleEndian)
    return str(uid.ExplicitVRLittleEndian if little_endian else uid.ExplicitVRBigEndian)


def read_whole(path: Path) -> Any:
    """A file with its pixels, not decoded; raises `AnomriError` if it is damaged or has none."""
    data_set = open_data_set(path)
    if data_set is None:
        raise damaged(path, "it is not DICOM any more")
    if "PixelData" not in data_set:
        raise damaged(path, "it holds no pixels")
    is_compressed = data_set["PixelData"].is_undefined_length
    if is_compressed and not data_set.file_meta.TransferSyntaxUID.is_compressed:
        raise AnomriError(
            f"{path}: its pixels are compressed, and it has no meta information that says how; "
            f"export the series again."
        )
    return data_set


def read_headers(path: Path) -> Any:
    """All headers of a file, as a pydicom data set; raises `AnomriError` if it cannot be read."""
    data_set = open_data_set(path, stop_before_pixels=True)
    if data_set is None:
        raise damaged(path, "it is not DICOM any more")
    return data_set


def check_pixels(data_set: Any) -> None:
    """Decode the pixels of a file that was read; raises `AnomriError` naming it if that fails."""
    try:
        data_set.pixel_array  # noqa: B018 - decodes
    except Exception as error:  # each decoder has its own errors
        reason = describe_error(error)
        syntax = data_set.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            raise damaged(Path(data_set.filename), reason) from None
        raise AnomriError(
            f"{data_set.filename}: its pixels are compressed as {syntax.name} and cannot be "
            f"decoded ({reason}). Decompress the series (gdcmconv --raw, or dcmdjpeg), or copy it "
            f"again if the file is damaged."
        ) from None


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
    """A header value as text, empty if there is none; several values are joined by spaces.

    ``header`` is a pydicom data set.
    """
    try:
        value = header.get(keyword)
    except Exception:  # values are parsed when asked for; this one cannot be
        return ""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(str(part) for part in value).strip()
    # Zero is a value.
    return "" if value is None else str(value).strip()


def read_number(header: Header, keyword: str) -> float | None:
    """A header value as a number; ``None`` if it is not one."""
    try:
        number = float(header.get(keyword, ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None
