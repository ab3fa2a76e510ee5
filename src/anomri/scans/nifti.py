"""NIfTI files: read completely, checked against their headers, and written atomically."""

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
from anomri.scans.dicom.signature import find_start
from anomri.scans.headers import check_header, quiet_nibabel

MAX_VOXELS = 1024**3
"""Larger images than this (1024 x 1024 x 1024) are refused before memory is taken."""
MAX_HEADER_BYTES = 1024**2
"""The most that may lie before the image in a file, or behind it."""
GZIP = b"\x1f\x8b"
FOREIGN_FILES = {
    b"version https://git-lfs": "is a Git LFS pointer without the image; fetch it: git lfs pull",
    b"/annex/objects/": "is a git-annex pointer without the image; fetch it: git annex get",
    b"<!doctype html": "is a web page, perhaps a login or error page; download the file again",
    b"<html": "is a web page, perhaps a login or error page; download the file again",
    b"pk\x03\x04": "is a ZIP archive; unpack it",
    b"bzh": "is compressed with bzip2; unpack it",
    b"\xfd7zxz": "is compressed with xz; unpack it",
    b"nrrd": "is an NRRD image; convert it to NIfTI",
    b"\x89hdf": "is an HDF5 file (MINC?); convert it to NIfTI",
}
"""First bytes (in lower case) of files that are taken for NIfTI, and what to do about them."""
_ZLIB_ERROR: Any = isal_zlib.error
_DAMAGE = (
    EOFError,
    ValueError,
    OverflowError,
    _ZLIB_ERROR,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.spatialimages.HeaderTypeError,
)
"""What reading a damaged file raises."""


def read_image(path: Path) -> nib.Nifti1Image:
    """Read a 3D NIfTI file to its end, as `read_noted_image` does, without its notes."""
    return read_noted_image(path)[0]


def read_noted_image(path: Path) -> tuple[nib.Nifti1Image, list[str]]:
    """Read a 3D NIfTI file to its end, with notes on its header.

    Images larger than `MAX_VOXELS` are not unpacked. The checksum of a ``.nii.gz`` is verified,
    which nibabel alone does not do. A fourth axis of length one is dropped. Raises `AnomriError`
    naming the file and what is wrong, also if its header does not say how large a voxel is.
    """
    try:
        _check_content(path)
        stored = _read_header(path)
        with quiet_nibabel():
            header = stored.copy()
            header.check_fix()
            content = _read_content(path, _image_end(path, header))
            _check_axes(path, header.get_data_shape())
            checked, notes = check_header(path, stored)
            if checked.binaryblock != stored.binaryblock:
                content = checked.binaryblock + content[checked.sizeof_hdr :]
            image = image_class(checked).from_bytes(content)
            if image.ndim > 3:
                image = nib.funcs.squeeze_image(image)
    except MemoryError as error:
        raise AnomriError(f"{path}: memory does not suffice to read it.") from error
    except (OSError, *_DAMAGE) as error:
        raise _reading_error(path, error) from error
    return image, notes


def _check_axes(path: Path, shape: tuple[int, ...]) -> None:
    """Raise `AnomriError` unless an image has three axes, apart from ones of length one behind."""
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise AnomriError(
            f"{path}: has {len(shape)} axes {shape}; a file has to hold one 3D image."
        )


def read_values(image: nib.Nifti1Image) -> NDArray[Any]:
    """The voxel values of an image from `read_image`; equal to nibabel's, but with less memory.

    Unscaled integers are not copied, and so are read-only. Integers with a slope become float32.
    """
    values, slope = read_unscaled(image)
    return values if slope == 1 else np.multiply(values, np.float32(slope), dtype=np.float32)


def read_unscaled(image: nib.Nifti1Image) -> tuple[NDArray[Any], float]:
    """The values of an image, and a slope > 0 that they still have to be multiplied by.

    This saves time where only part of an image is used.
    """
    proxy: Any = image.dataobj
    if not nib.is_proxy(proxy) or proxy.dtype.kind not in "iu":
        return np.asanyarray(proxy), 1.0
    content = proxy.file_like.getvalue()
    flat = np.frombuffer(content, proxy.dtype, math.prod(proxy.shape), proxy.offset)
    stored = flat.reshape(proxy.shape, order="F")
    # A damaged header may hold any slope: only values that float32 can hold are scaled later.
    largest = proxy.slope * np.iinfo(stored.dtype).max
    if not proxy.inter and 0 < largest < np.finfo(np.float32).max:
        return stored, float(proxy.slope)
    values: NDArray[np.float32] = np.multiply(stored, np.float32(proxy.slope), dtype=np.float32)
    values += np.float32(proxy.inter)
    # The stored number closest to zero is zero: otherwise the background would be half a step.
    values[stored == np.rint(-proxy.inter / proxy.slope)] = 0
    return values, 1.0


@contextmanager
def as_files(images: Mapping[str, str | Path | SpatialImage]) -> Iterator[dict[str, str | Path]]:
    """Paths for files and nibabel images alike: images are saved to a temporary folder.

    Raises `AnomriError` if the header of the file that an image was loaded from is unusable.
    """
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, str | Path] = {}
        for name, image in images.items():
            if isinstance(image, SpatialImage):
                files[name] = Path(folder) / f"scan_{re.sub(r'[^a-z0-9]', '', name.lower())}.nii"
                with quiet_nibabel():
                    _check_loaded(image)
                    nib.save(nib.Nifti1Image.from_image(image), files[name])
            else:
                files[name] = image
        yield files


def _check_loaded(image: SpatialImage) -> None:
    """Raise `AnomriError` for an image in whose file nibabel found no size of a voxel.

    nibabel made one up on loading it, and its affine does not tell.
    """
    if not isinstance(image, nib.Nifti1Pair):
        return
    holder = image.file_map.get("header", image.file_map["image"])
    if holder.filename is None:
        return
    path = Path(holder.filename)
    try:
        stored = _read_header(path)
        loaded = stored.copy()
        loaded.check_fix()
        # Whoever corrects the unit in memory leaves the affine as it is.
        stored["xyzt_units"] = image.header["xyzt_units"]
        untouched = np.array_equal(loaded.get_best_affine(), image.affine)
    except (OSError, AnomriError, *_DAMAGE):
        return  # The file is not there any more, but the image is.
    if untouched:
        check_header(path, stored)


def image_class(header: nib.Nifti1Header) -> type[nib.Nifti1Image]:
    """The image class for a header's format (NIfTI-1 or NIfTI-2)."""
    return nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image


def write_image(path: Path, image: nib.Nifti1Image) -> None:
    """Write an image, compressed if the name ends in ``.gz``; equal images give equal bytes."""
    with whole_file(path) as partial, partial.open("wb") as raw:
        if path.name.endswith(".gz"):
            # Level 1: maps are mostly zero, and higher levels take longer to save a few percent.
            with igzip.IGzipFile(
                filename="", mode="wb", fileobj=raw, compresslevel=1, mtime=0
            ) as packed:  # type: ignore[no-untyped-call]
                packed.write(image.to_bytes())  # type: ignore[no-untyped-call]
        else:
            raw.write(image.to_bytes())


def _check_content(path: Path) -> None:
    """Raise `AnomriError` if the first bytes of a file are not what its name says."""
    with path.open("rb") as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr)
    if not start:
        raise AnomriError(f"{path}: the file is empty; copy or download it again.")
    named_gz, is_gz = path.name.lower().endswith(".gz"), start.startswith(GZIP)
    if is_gz and not named_gz:
        raise AnomriError(
            f"{path}: is compressed with gzip, but its name does not say so; rename it to "
            f"{path.name}.gz, or unpack it."
        )
    if named_gz and not is_gz:
        _refuse_foreign(path, start)
        if _find_header(start) is not None:
            raise AnomriError(
                f"{path}: is not compressed, but its name ends in .gz; rename it to {path.stem}."
            )
        # A single byte may be the rest of a file that was cut short.
        if len(start) > 1:
            raise AnomriError(f"{path}: is not a gzip file; copy or download it again.")


def _refuse_foreign(path: Path, start: bytes) -> None:
    """Raise `AnomriError` with advice if ``start``, a file's first bytes, is of another format."""
    text = start.lstrip().lower()
    for signature, advice in FOREIGN_FILES.items():
        if text.startswith(signature):
            raise AnomriError(f"{path}: {advice}.")
    if find_start(start) is not None:
        raise AnomriError(f"{path}: is a DICOM file; give the folder that holds its series.")
    if start.startswith(GZIP):
        raise AnomriError(f"{path}: is compressed twice with gzip; unpack it once.")


def _reading_error(path: Path, error: Exception) -> AnomriError:
    if path.is_symlink() and not path.exists():
        target = str(path.readlink())
        advice = "fetch it with: git annex get" if "annex" in target else "mend the link"
        return AnomriError(f"{path}: is a link to {target}, which does not exist; {advice}.")
    if isinstance(error, FileNotFoundError):
        return AnomriError(f"{path}: no such file.")
    if isinstance(error, OSError) and error.errno:
        return AnomriError(f"{path}: cannot be read ({error.strerror}).")
    return AnomriError(
        f"{path}: cannot be read as NIfTI, it is damaged or cut short ({error}); copy or download "
        f"it again."
    )


def _find_header(start: bytes) -> nib.Nifti1Header | None:
    """The NIfTI header in the first bytes of an image, as it stands there, if there is one."""
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        content = start[: kind.sizeof_hdr]
        if kind.may_contain_header(content):
            return kind(content, check=False)  # type: ignore[no-untyped-call]
    return None


def _open(path: Path) -> Any:
    if path.name.lower().endswith(".gz"):
        return igzip.open(path, "rb")  # type: ignore[no-untyped-call]
    return path.open("rb")


def _read_header(path: Path) -> nib.Nifti1Header:
    with _open(path) as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr)
    if not start:
        raise AnomriError(f"{path}: the file is empty; copy or download it again.")
    header = _find_header(start)
    if header is None:
        _refuse_foreign(path, start)
        raise AnomriError(f"{path}: is not a NIfTI image; convert it, or choose another file.")
    return header


def _image_end(path: Path, header: nib.Nifti1Header) -> int:
    """The number of bytes from the start of a file to the end of its image."""
    shape = header.get_data_shape()
    # Exact: a damaged header may claim more voxels than an integer of 64 bits can hold.
    voxels = math.prod(int(length) for length in shape) if shape else 0
    if voxels <= 0 or min(shape) <= 0:
        raise AnomriError(f"{path}: its header gives the size {shape}; there is nothing to read.")
    if voxels > MAX_VOXELS:
        raise AnomriError(
            f"{path}: its header claims {voxels:,} voxels {shape}, more than {MAX_VOXELS:,}; it is "
            f"not read."
        )
    offset = float(header["vox_offset"])
    if not header.sizeof_hdr <= offset <= MAX_HEADER_BYTES:
        raise AnomriError(
            f"{path}: its header places the image {offset:g} bytes into the file; it is damaged."
        )
    return int(offset) + voxels * header.get_data_dtype().itemsize


def _read_content(path: Path, size: int) -> bytes:
    """The first ``size`` bytes of a file, unpacked; the rest of the file is read and checked."""
    with _open(path) as file:
        content: bytes = file.read(size)
        if len(content) < size:
            raise AnomriError(
                f"{path}: is cut short: {len(content):,} bytes of image instead of {size:,}; copy "
                f"it again."
            )
        # The checksum of a gzip file stands at its end. Read on, but not without limit.
        if file.read(MAX_HEADER_BYTES) and file.read(1):
            raise AnomriError(
                f"{path}: goes on for more than {MAX_HEADER_BYTES:,} bytes after its image; it is "
                f"not read."
            )
    return content
