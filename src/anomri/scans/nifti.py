"""NIfTI files: read to a verified end with care for what they claim, written whole or not at all."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.files import whole_file

MAX_VOXELS = 1024**3
"""Larger images than this (1024 x 1024 x 1024) are refused before memory is taken."""
HEADER_BYTES = 1024**2
_UNPACKING_ERROR: Any = isal_zlib.error
_NIBABEL_ERRORS = (
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.spatialimages.HeaderTypeError,
)


def read_image(path: Path) -> nib.Nifti1Image:
    """Read a 3D NIfTI file to its end; raises `AnomriError` naming the file and what is wrong with it.

    Nothing larger than `MAX_VOXELS` is unpacked, and the checksum of a ``.nii.gz`` is verified, which nibabel
    alone does not do. A fourth axis of length one is dropped.
    """
    try:
        header = _header(path)
        image = type_of(header).from_bytes(_unpack(path, _expected_bytes(path, header)))
        if image.ndim > 3:
            image = nib.funcs.squeeze_image(image)
        if image.ndim != 3:
            raise AnomriError(
                f"{path}: has {image.ndim} axes {image.shape}; one 3D image a file is expected."
            )
        return image
    except (
        OSError,
        EOFError,
        ValueError,
        OverflowError,
        MemoryError,
        _UNPACKING_ERROR,
        *_NIBABEL_ERRORS,
    ) as error:
        reason = getattr(error, "strerror", None) or error
        raise AnomriError(
            f"{path}: cannot be read as NIfTI, it is damaged or cut short ({reason})."
        ) from error


def values_of(image: nib.Nifti1Image) -> NDArray[Any]:
    """What nibabel would read, of an image that `read_image` gave; whole numbers, most of what there is, take less.

    They are not copied, and so read-only; those that the header scales become float32, not float64.
    """
    values, slope = stored_values_of(image)
    return values if slope == 1 else np.multiply(values, np.float32(slope), dtype=np.float32)


def stored_values_of(image: nib.Nifti1Image) -> tuple[NDArray[Any], float]:
    """`values_of` an image before they are multiplied by a slope > 0, and the slope: scaled later, fewer need be."""
    proxy: Any = image.dataobj
    if not nib.is_proxy(proxy) or proxy.dtype.kind not in "iu":
        return np.asanyarray(proxy), 1.0
    content = proxy.file_like.getvalue()
    stored = np.frombuffer(content, proxy.dtype, math.prod(proxy.shape), proxy.offset).reshape(
        proxy.shape, order="F"
    )
    # A damaged header may say anything: only what float32 can hold is left for later.
    if not proxy.inter and 0 < proxy.slope * np.iinfo(stored.dtype).max < np.finfo(np.float32).max:
        return stored, float(proxy.slope)
    values: NDArray[np.float32] = np.multiply(stored, np.float32(proxy.slope), dtype=np.float32)
    values += np.float32(proxy.inter)
    # The stored number closest to zero stands for it: what lies around a brain is nothing, not half a step.
    values[stored == np.rint(-proxy.inter / proxy.slope)] = 0
    return values, 1.0


@contextmanager
def as_files(images: Mapping[str, str | Path | SpatialImage]) -> Iterator[dict[str, str | Path]]:
    """A file for each of some files and images of nibabel, which go the way of all files, with all its checks."""
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, str | Path] = {}
        for name, image in images.items():
            if isinstance(image, SpatialImage):
                files[name] = Path(folder) / f"scan_{re.sub(r'[^a-z0-9]', '', name.lower())}.nii"
                nib.save(nib.Nifti1Image.from_image(image), files[name])
            else:
                files[name] = image
        yield files


def type_of(header: nib.Nifti1Header) -> type[nib.Nifti1Image]:
    """The image class that reads a header's format (NIfTI-1 or NIfTI-2)."""
    return nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image


def write_image_file(path: Path, image: nib.Nifti1Image) -> None:
    """Write an image, packed if the name ends in ``.gz``, without a name or a time in the packing."""
    with whole_file(path) as partial, partial.open("wb") as raw:
        if path.name.endswith(".gz"):
            # Level 1: maps are mostly zero, so higher levels take longer for a few percent.
            with igzip.IGzipFile(
                filename="", mode="wb", fileobj=raw, compresslevel=1, mtime=0
            ) as packed:  # type: ignore[no-untyped-call]
                packed.write(image.to_bytes())  # type: ignore[no-untyped-call]
        else:
            raw.write(image.to_bytes())


def _header(path: Path) -> nib.Nifti1Header:
    # Whatever text may follow it is read with the image.
    start = _unpack(path, nib.Nifti2Header.sizeof_hdr, whole=False)
    if not start:
        raise AnomriError(f"{path}: the file is empty.")
    for image_class in (nib.Nifti1Image, nib.Nifti2Image):
        header_class = image_class.header_class
        if header_class.may_contain_header(start[: header_class.sizeof_hdr]):
            return header_class(start[: header_class.sizeof_hdr])  # type: ignore[no-untyped-call]
    raise AnomriError(f"{path}: is not a NIfTI image.")


def _expected_bytes(path: Path, header: nib.Nifti1Header) -> int:
    shape = header.get_data_shape()
    voxels = int(np.prod(shape, dtype=object)) if shape else 0
    if voxels <= 0 or min(shape) <= 0:
        raise AnomriError(f"{path}: its header gives the size {shape}; there is nothing to read.")
    if voxels > MAX_VOXELS:
        raise AnomriError(
            f"{path}: its header claims {voxels:,} voxels {shape}, more than {MAX_VOXELS:,}; refused."
        )
    offset = float(header["vox_offset"])
    if not header.sizeof_hdr <= offset <= HEADER_BYTES:
        raise AnomriError(
            f"{path}: its header places the image {offset:g} bytes into the file; it is damaged."
        )
    return int(offset) + voxels * header.get_data_dtype().itemsize


def _unpack(path: Path, size: int, *, whole: bool = True) -> bytes:
    """The first ``size`` bytes of a file, unpacked; all of them, to a verified end, if ``whole``."""
    opener = igzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        content = file.read(size)
        if whole and len(content) < size:
            raise AnomriError(
                f"{path}: is cut short: {len(content):,} bytes of image instead of {size:,}; copy it again."
            )
        # The checksum of a gzip file stands at its end: read on, up to a limit that no honest trailer reaches.
        if whole and file.read(HEADER_BYTES) and file.read(1):
            raise AnomriError(
                f"{path}: goes on for more than {HEADER_BYTES:,} bytes after its image; refused."
            )
    return content
