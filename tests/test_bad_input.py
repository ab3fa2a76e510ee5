"""Bad input, one named case after the other, through `Detector.detect` and `save`: a clear
error, no crash, no half file."""

import bz2
import gzip
import lzma
import os
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anomri.errors import AnomriError
from anomri.scans.nifti import read_image
from anomri.scans.prepare import Preparation
from phantom import scan, thresholding

SHAPE, AFFINE = (20, 24, 18), nib.affines.from_matvec(np.diag([-9.0, -9, 9]), [85, 103, -76])
BRAIN = scan(SHAPE, AFFINE).astype(np.float32)
Writer = Callable[[Path], object]
AIR = np.random.default_rng(1).uniform(5, 9, BRAIN.shape).astype(np.float32)


def image(data: np.ndarray = BRAIN, affine: np.ndarray = AFFINE) -> bytes:
    return nib.Nifti1Image(data, affine).to_bytes()


def patched(offset: int, form: str, *values: float) -> bytes:
    """A whole NIfTI file with a field of its header changed."""
    content = bytearray(image())
    struct.pack_into(form, content, offset, *values)
    return bytes(content)


def spoilt(value: float, where: tuple[int, ...] = (10, 12, 9)) -> np.ndarray:
    data = BRAIN.copy()
    data[where] = value
    return data


FILES: dict[str, tuple[str, bytes, str]] = {
    "empty file": ("a_flair.nii", b"", "the file is empty"),
    "empty gzip file": ("a_flair.nii.gz", b"", "the file is empty"),
    "gzip of nothing": ("a_flair.nii.gz", gzip.compress(b""), "the file is empty"),
    "text": ("a_flair.nii", b"not an image\n" * 80, "is not a NIfTI image"),
    "text called gz": ("a_flair.nii.gz", b"not an image\n" * 80, "is not a gzip file"),
    "plain NIfTI called gz": (
        "a_flair.nii.gz",
        image(),
        "is not compressed, but its name ends in .gz; rename it to a_flair.nii",
    ),
    "gzip called nii": (
        "a_flair.nii",
        gzip.compress(image()),
        "is compressed with gzip, .* rename it to a_flair.nii.gz",
    ),
    "gzip of gzip": (
        "a_flair.nii.gz",
        gzip.compress(gzip.compress(image())),
        "is compressed twice with gzip; unpack it once",
    ),
    "Git LFS pointer": (
        "a_flair.nii.gz",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "is a Git LFS pointer .*git lfs pull",
    ),
    "git-annex pointer": (
        "a_flair.nii.gz",
        b"/annex/objects/MD5E-s12345--1f0c.nii.gz\n",
        "is a git-annex pointer .*git annex get",
    ),
    "web page": ("a_flair.nii.gz", b"\n<!DOCTYPE html>\n<html>", "is a web page"),
    "web page called nii": ("a_flair.nii", b"<HTML><body>404", "is a web page"),
    "ZIP archive": ("a_flair.nii.gz", b"PK\x03\x04" + bytes(400), "is a ZIP archive; unpack it"),
    "bzip2": ("a_flair.nii", bz2.compress(image()), "is compressed with bzip2; unpack it"),
    "xz in gzip": ("a_flair.nii.gz", gzip.compress(lzma.compress(image())), "compressed with xz"),
    "DICOM": ("a_flair.nii", bytes(128) + b"DICM" + bytes(400), "is a DICOM file; give the folder"),
    "NRRD": ("a_flair.nii", b"NRRD0004\ntype: short\n", "is an NRRD image; convert it"),
    "cut in the header": ("a_flair.nii", image()[:200], "is not a NIfTI image|cut short"),
    "cut in the image": ("a_flair.nii", image()[:-7], "is cut short"),
    "cut in the stream": ("a_flair.nii.gz", gzip.compress(image())[:-500], "damaged or cut short"),
    "wrong checksum": (
        "a_flair.nii.gz",
        gzip.compress(image())[:-8] + bytes(8),
        "damaged or cut short",
    ),
    "gzip bomb": (
        "a_flair.nii.gz",
        gzip.compress(image() + bytes(20 * 1024**2)),
        "goes on for more than",
    ),
    "10^12 voxels": (
        "a_flair.nii",
        patched(40, "<4h", 3, 10_000, 10_000, 10_000),
        "1,000,000,000,000 voxels",
    ),
    "more axes than seven": ("a_flair.nii", patched(40, "<h", 9), "cannot be read|not a NIfTI"),
    "no axes": ("a_flair.nii", patched(40, "<h", 0), "cannot be read|nothing to read|not a NIfTI"),
    "a side of zero": ("a_flair.nii", patched(42, "<h", 0), "nothing to read|cannot be read"),
    "a side of minus five": (
        "a_flair.nii",
        patched(42, "<h", -5),
        "nothing to read|cannot be read",
    ),
    "data type 999": ("a_flair.nii", patched(70, "<h", 999), "cannot be read"),
    "offset beyond the end": ("a_flair.nii", patched(108, "<f", 1e12), "places the image"),
    "offset not a number": (
        "a_flair.nii",
        patched(108, "<f", float("nan")),
        "places the image|cannot be read",
    ),
    "singular affine": ("a_flair.nii", patched(280, "<4f", 0, 0, 0, 0), "no usable position"),
    "affine not finite": (
        "a_flair.nii",
        patched(280, "<4f", float("inf"), 0, 0, 0),
        "no usable position",
    ),
    "several frames": ("a_flair.nii", image(np.stack([BRAIN] * 3, -1)), "4 axes"),
    "one slice": ("a_flair.nii", image(BRAIN[..., 9]), "2 axes"),
    "complex numbers": ("a_flair.nii", image(BRAIN.astype(np.complex64)), "real numbers"),
    "colours": (
        "a_flair.nii",
        image(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "real numbers",
    ),
    "NaN": ("a_flair.nii", image(spoilt(np.nan)), "1 of its 8,640 voxels are NaN or infinite"),
    "infinite": ("a_flair.nii", image(spoilt(np.inf)), "NaN or infinite"),
    "beyond float32": (
        "a_flair.nii",
        image(spoilt(0).astype(np.float64) * 1e300),
        "NaN or infinite",
    ),
    "all zero": ("a_flair.nii", image(BRAIN * 0), "no voxel is above zero"),
    "all negative": ("a_flair.nii", image(-BRAIN), "looks standardised|no voxel is above zero"),
    "z-scores": (
        "a_flair.nii",
        image(np.where(BRAIN > 0, BRAIN / 100 - 5, 0).astype(np.float32)),
        "looks standardised",
    ),
    "a head": ("a_flair.nii", image(BRAIN + AIR), "still has its skull"),
    "other channel": ("a_t1.nii", image(), "flair is missing|has t1"),
}


@pytest.fixture(autouse=True)
def _quiet_headers() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, on casts of what the checks then refuse
        yield


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    file, content, message = FILES[name]
    (tmp_path / file).write_bytes(content)
    # Two channels: one file alone is whatever channel the model wants.
    detector = thresholding("flair") if file.startswith("a_flair") else thresholding("flair", "t2")
    with pytest.raises(AnomriError, match=message) as caught:
        detector.detect({file[2:].split(".")[0]: tmp_path / file}).save(tmp_path / "out")
    assert "a" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_link_to_nowhere_is_named_with_its_target(tmp_path: Path) -> None:
    path = tmp_path / "a_flair.nii.gz"
    for target, advice in (
        ("../elsewhere.nii.gz", "mend the link"),
        (".git/annex/objects/aa/MD5E-s1.nii.gz", "fetch it with: git annex get"),
    ):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        with pytest.raises(AnomriError) as caught:
            read_image(path)
        assert str(caught.value) == (
            f"{path}: is a link to {target}, which does not exist; {advice}."
        )
    path.unlink()
    path.mkdir()
    with pytest.raises(AnomriError, match=r"a_flair.nii.gz: cannot be read \(Is a directory\)"):
        read_image(path)


def moved(mm: float) -> bytes:
    affine = AFFINE.copy()
    affine[1, 3] += mm
    return image(affine=affine)


PAIRS: dict[str, tuple[str, bytes | None, str]] = {
    "second channel gone": ("t1", None, "no such file"),
    "second channel elsewhere": ("t1", moved(5000), "does not overlap with a_flair.nii"),
    "second channel damaged": ("t1", image()[:-3], "is cut short"),
    "mask empty": ("mask", image(BRAIN * 0), "no voxel is above zero"),
    "mask elsewhere": ("mask", moved(-5000), "does not overlap with a_flair.nii"),
    "mask damaged": ("mask", b"x", "is not a NIfTI|cut short"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_bad_file_beside_the_scan_is_named(tmp_path: Path, name: str) -> None:
    kind, content, message = PAIRS[name]
    (tmp_path / "a_flair.nii").write_bytes(image())
    second = tmp_path / f"a_{kind}.nii"
    if content is not None:
        second.write_bytes(content)
    detector = thresholding("flair", "t1") if kind == "t1" else thresholding("flair")
    with pytest.raises(AnomriError, match=message) as caught:
        detector.detect({"flair": tmp_path / "a_flair.nii", kind: second})
    assert ("a_" if kind != "mask" else "a") in str(caught.value)


def test_a_bad_label_is_left_out_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "a_flair.nii").write_bytes(image())
    (tmp_path / "a_seg.nii").write_bytes(image(spoilt(np.nan)))
    detection = thresholding().detect(tmp_path)
    assert detection.volume.label is None
    assert (
        "its label was left out" in detection.volume.notes[-1]
        and "NaN or infinite" in detection.volume.notes[-1]
    )


def test_a_brain_mask_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / "a_flair.nii").write_bytes(image())
    with pytest.raises(AnomriError, match="gone.nii: no such file"):
        thresholding().detect(
            tmp_path / "a_flair.nii", Preparation(brain_mask=tmp_path / "gone.nii")
        )


# Memory.


@pytest.mark.parametrize("name", ["gzip bomb", "10^12 voxels"])
def test_a_refused_file_takes_no_memory(tmp_path: Path, name: str) -> None:
    file, content, message = FILES[name]
    (tmp_path / file).write_bytes(content)
    detector = thresholding()
    tracemalloc.start()
    try:
        with pytest.raises(AnomriError, match=message):
            detector.detect(tmp_path / file)
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024**2
    finally:
        tracemalloc.stop()


LIMITED = """
import resource, sys
from anomri.errors import AnomriError
from anomri.scans.nifti import read_image
from pathlib import Path
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 1024**2,) * 2)
try:
    read_image(Path(sys.argv[1]))
except AnomriError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's limits on memory")
def test_a_compressed_file_of_320_mib_is_refused_within_64_mib_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "a_flair.nii.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(image())
        for _ in range(40):
            file.write(bytes(8 * 1024**2))
    assert path.stat().st_size < 2 * 1024**2
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "goes on for more than" in done.stdout, done.stderr


# Anything at all: an image comes out, or `AnomriError`.

HEADER_FIELDS = [
    (40, "<8h"),
    (70, "<h"),
    (72, "<h"),
    (76, "<8f"),
    (108, "<f"),
    (112, "<2f"),
    (252, "<2h"),
    (256, "<6f"),
]
HEADER_FIELDS += [(280, "<12f"), (344, "<4s"), (0, "<i")]


def outcome(content: bytes, suffix: str) -> str:
    """Detect in a file of this content; what became of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / f"a_flair{suffix}").write_bytes(content)
        try:
            written = DETECTOR.detect(folder / f"a_flair{suffix}").save(folder / "out")
        except AnomriError as error:
            assert f"a_flair{suffix}" in str(error) or str(error).startswith("a:")
            # A failure is clean: no map, nothing half-written.
            assert not list(folder.rglob(".partial-*")) and not list(folder.glob("out/*"))
            return "refused"
        assert nib.load(written[0]).shape == nib.load(folder / f"a_flair{suffix}").shape[:3]
        assert np.isfinite(nib.load(written[0]).get_fdata()).all()
        return "done"


DETECTOR = thresholding()
FUZZ = settings(
    max_examples=40,
    deadline=20_000,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


@FUZZ
@given(field=st.sampled_from(HEADER_FIELDS), data=st.data())
def test_a_random_header_field_is_read_or_refused_clearly(
    field: tuple[int, str], data: st.DataObject
) -> None:
    offset, form = field
    width = struct.calcsize(form)
    content = bytearray(image())
    content[offset : offset + width] = data.draw(st.binary(min_size=width, max_size=width))
    outcome(bytes(content), ".nii")


@FUZZ
@given(
    places=st.lists(st.integers(0, 20_000), min_size=1, max_size=6),
    byte=st.integers(0, 255),
    packed=st.booleans(),
)
def test_a_random_wrong_byte_is_read_or_refused_clearly(
    places: list[int], byte: int, packed: bool
) -> None:
    content = bytearray(gzip.compress(image(), 1, mtime=0) if packed else image())
    for place in places:
        content[place % len(content)] ^= byte
    outcome(bytes(content), ".nii.gz" if packed else ".nii")


@FUZZ
@given(content=st.binary(max_size=600), head=st.integers(0, 400), packed=st.booleans())
def test_random_bytes_are_refused_clearly(content: bytes, head: int, packed: bool) -> None:
    whole = image()[:head] + content
    outcome(gzip.compress(whole) if packed else whole, ".nii.gz" if packed else ".nii")


@FUZZ
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    spacing=st.tuples(*[st.floats(0.05, 80)] * 3),
    gain=st.floats(1e-6, 1e6),
)
def test_a_scan_of_random_shape_and_spacing_is_done_or_refused(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], gain: float
) -> None:
    data = np.zeros(shape, np.float32)
    data[tuple(slice(n // 4, n - n // 4) for n in shape)] = gain
    outcome(image(data, nib.affines.from_matvec(np.diag(spacing))), ".nii")


def test_the_fuzz_test_accepts_good_files_and_finds_bad_ones() -> None:
    assert outcome(image(), ".nii") == "done"
    assert outcome(image()[:-9], ".nii") == "refused"
    assert len(FILES) + len(PAIRS) >= 25
    assert os.sep not in "".join(FILES)
