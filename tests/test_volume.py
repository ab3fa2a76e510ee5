"""Geometry and bad files: every error names its file, every map lies on its scan's own grid."""

import gzip
import itertools
import os
import struct
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from isal import igzip
from scipy import ndimage

from anomri.errors import AnomriError
from anomri.scans.case import Case
from anomri.scans.nifti import MAX_VOXELS, read_image, write_image
from anomri.scans.read import read_volume
from anomri.scans.volume import Volume
from conftest import AFFINE, SHAPE, write

ORIENTATIONS = [
    "".join(p)
    for axes in itertools.permutations(("LR", "AP", "SI"))
    for p in itertools.product(*axes)
]


def image_of_ones(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.ones(shape, np.float32)


def noise(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A scan that fills its field: values from 1 to 2."""
    return np.random.default_rng(0).uniform(1, 2, shape).astype(np.float32)


def test_only_the_box_around_the_brain_is_kept_and_nothing_is_lost(tmp_path: Path) -> None:
    data = np.zeros((9, 8, 7, 2), np.float32)
    data[2:5, 3:6, 1, 0] = 1 + np.arange(9).reshape(3, 3)
    data[4:7, 2:4, 2:4, 1] = 1 + np.arange(12).reshape(3, 2, 2)
    paths = {}
    for number, name in enumerate(("t1", "t2")):
        paths[name] = tmp_path / f"a_{name}.nii.gz"
        nib.save(nib.Nifti1Image(data[..., number], np.diag([-1.0, -1, 1, 1])), paths[name])
    volume = read_volume(Case("a", paths), ["t1", "t2"])
    assert volume.brain == (slice(2, 7), slice(2, 6), slice(1, 4))
    assert volume.inside.shape == (2, 5, 4, 3)
    np.testing.assert_array_equal(volume.data, np.moveaxis(data, -1, 0))
    np.testing.assert_array_equal(volume.foreground, data.any(axis=-1))
    moved = volume.with_data(np.roll(volume.data, 1, axis=1), "it was moved.")
    np.testing.assert_array_equal(moved.data, np.roll(volume.data, 1, axis=1))
    assert moved.notes == ("it was moved.",)
    again = Volume.from_array("a", volume.channels, volume.data, None, volume.geometry)
    assert again.brain == volume.brain
    np.testing.assert_array_equal(again.inside, volume.inside)


@pytest.mark.parametrize("axes", ORIENTATIONS)
def test_every_orientation_is_turned_and_turned_back(tmp_path: Path, axes: str) -> None:
    data = np.random.default_rng(0).random((6, 5, 4)).astype(np.float32)
    affine = np.array([[-2.0, 0, 0, 9], [0, -3, 0, 8], [0, 0, 4, -7], [0, 0, 0, 1]])
    lps = nib.Nifti1Image(data, affine)
    to = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes)
    )
    turned = lps.as_reoriented(to)
    path = tmp_path / "a_t1.nii.gz"
    nib.save(turned, path)
    volume = read_volume(Case("a", {"t1": path}), ["t1"])
    np.testing.assert_array_equal(volume.data[0], data)
    assert volume.geometry.spacing_mm == pytest.approx((2, 3, 4))
    np.testing.assert_allclose(volume.geometry.canonical_affine, affine, atol=1e-5)
    write_image(tmp_path / "out.nii.gz", volume.geometry.to_image(volume.data[0]))
    back = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(
        back.get_fdata(dtype=np.float32), turned.get_fdata(dtype=np.float32)
    )
    np.testing.assert_array_equal(back.affine, turned.affine)


@pytest.mark.parametrize("codes", [(0, 2), (1, 0), (3, 1), (0, 0)])
@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
def test_both_header_forms_and_their_codes_are_kept(
    tmp_path: Path, codes: tuple[int, int], image_class: type
) -> None:
    sform = nib.affines.from_matvec(np.diag([-1.5, -2, 2.5]), [5, 6, 7])
    sform[0, 1] = 0.3
    image = image_class(noise(), None)
    image.header["pixdim"][1:4] = 1.5, 2, 2.5
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_qform(
        nib.affines.from_matvec(np.diag([-1.5, -2, 2.5]), [1, 2, 3]), code=codes[0]
    )
    image.header.set_sform(sform, code=codes[1])
    path = tmp_path / "a_t1.nii.gz"
    image = image_class(noise(), None, image.header)
    nib.save(image, path)
    volume = read_volume(Case("a", {"t1": path}), ["t1"])
    write_image(tmp_path / "out.nii.gz", volume.geometry.to_image(volume.data[0], (0.1, 0.6)))
    before, after = nib.load(path).header, nib.load(tmp_path / "out.nii.gz").header
    assert type(before) is type(after)
    for field in ("dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
                  "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"):  # fmt: skip
        np.testing.assert_array_equal(before[field], after[field], err_msg=field)
    assert (float(after["cal_min"]), float(after["cal_max"])) == pytest.approx((0.1, 0.6))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64, np.int32])
def test_data_types_and_slopes_are_read(tmp_path: Path, dtype: type) -> None:
    image = nib.Nifti1Image(np.arange(60, dtype=dtype).reshape(5, 4, 3, 1), AFFINE)
    image.header.set_slope_inter(*((1, 0) if dtype is np.float64 else (0.5, 2)))
    nib.save(image, tmp_path / "a.nii")
    expected = nib.load(tmp_path / "a.nii").get_fdata()[..., 0]
    np.testing.assert_allclose(np.asanyarray(read_image(tmp_path / "a.nii").dataobj), expected)


def test_a_reconstruction_is_written_with_channels_last(tmp_path: Path) -> None:
    path = write(tmp_path / "a_t1.nii.gz", noise())
    volume = read_volume(Case("a", {"t1": path}), ["t1"])
    both = np.stack([volume.data[0], 2 * volume.data[0]])
    write_image(tmp_path / "out.nii.gz", volume.geometry.to_image(both))
    assert nib.load(tmp_path / "out.nii.gz").shape == (*SHAPE, 2)


def test_the_same_map_gives_the_same_bytes(tmp_path: Path) -> None:
    volume = read_volume(Case("a", {"t1": write(tmp_path / "a_t1.nii.gz", noise())}), ["t1"])
    for name in ("one.nii.gz", "two.nii.gz"):
        write_image(tmp_path / name, volume.geometry.to_image(volume.data[0]))
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()


def test_voxels_outside_the_brain_mask_are_zero(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, np.uint8)
    mask[20:40, 10:40, 3:9] = 1
    case = Case(
        "a",
        {"t1": write(tmp_path / "a_t1.nii.gz", noise())},
        mask=write(tmp_path / "m.nii.gz", mask),
    )
    np.testing.assert_array_equal(read_volume(case, ["t1"]).data[0] > 0, mask > 0)


def test_an_interpolated_label_is_cut_at_one_half(tmp_path: Path) -> None:
    image = write(tmp_path / "a_t1.nii.gz", noise())
    for most, cut in ((1.0, 0.5), (1.15, 0.5), (255.0, 127.5), (100.0, 50.0), (4.0, 0.5)):
        soft = np.zeros(SHAPE, np.float32)
        soft[20:40] = np.linspace(0.001, 1, 20, dtype=np.float32)[:, None, None] * most
        label = write(tmp_path / "a_seg.nii.gz", soft)
        volume = read_volume(Case("a", {"t1": image}, label=label), ["t1"])
        assert volume.label is not None
        assert volume.label.sum() == (soft >= cut).sum() < (soft > 0).sum()
        marked_ml = (soft >= cut).sum() * abs(np.linalg.det(AFFINE[:3, :3])) / 1000
        assert volume.notes == (
            f"a_seg.nii.gz has values between whole numbers (up to {most:.3g}); those from {cut:g} on are taken ({marked_ml:,.0f} ml).",
        )
    # Nobody knows the half of this one.
    low = np.zeros(SHAPE, np.float32)
    low[20:30] = np.linspace(0.01, 0.06, 10, dtype=np.float32)[:, None, None]
    label = write(tmp_path / "a_seg.nii.gz", low)
    expect(
        Case("a", {"t1": image}, label=label),
        r"a_seg.nii.gz: has values between whole numbers, of up to 0.06: neither classes nor shares",
    )
    # Whole numbers that a header scales, and a single value, are taken as they are.
    scaled = np.zeros(SHAPE, np.float32)
    scaled[20:30] = np.arange(1, 11, dtype=np.float32)[:, None, None] * np.float32(1.00001)
    one = np.where(low > 0, np.float32(0.3), 0)
    for values in (scaled, one):
        volume = read_volume(
            Case("a", {"t1": image}, label=write(tmp_path / "a_seg.nii.gz", values)), ["t1"]
        )
        assert (
            volume.label is not None
            and volume.label.sum() == (values > 0).sum()
            and volume.notes == ()
        )
    classes = (
        np.random.default_rng(0).integers(0, 5, SHAPE) * (np.arange(SHAPE[0]) < 20)[:, None, None]
    ).astype(np.float32)
    volume = read_volume(
        Case("a", {"t1": image}, label=write(tmp_path / "a_seg.nii.gz", classes)), ["t1"]
    )
    assert (
        volume.label is not None and volume.label.sum() == (classes > 0).sum() and not volume.notes
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_whole_label_values_that_differ_between_neighbours_are_shares(
    tmp_path: Path, dtype: type
) -> None:
    image = write(tmp_path / "a_t1.nii.gz", noise())
    lesions = np.zeros(SHAPE, np.float32)
    lesions[20:26, 20:25, 4:7] = lesions[30:36, 12:20, 3:8] = lesions[22:24, 30:33, 6] = 1
    for most in (100, 255):
        soft = np.round(ndimage.gaussian_filter(lesions, 0.8) * most).astype(dtype)
        label = write(tmp_path / "a_seg.nii.gz", soft)
        volume, cut = read_volume(Case("a", {"t1": image}, label=label), ["t1"]), soft.max() / 2
        assert volume.label is not None
        assert 0 < volume.label.sum() == (soft >= cut).sum() < (soft > 0).sum()
        (note,) = volume.notes
        assert (
            f"up to {soft.max():g} that differ from voxel to voxel; those from {cut:g} on are taken"
            in note
        )
    # Numbers of lesions, two of which touch, and of classes.
    numbers = ndimage.label(lesions)[0] * 7
    numbers[20:26, 25:28, 4:7] = 100
    numbers[40, 20, 4] = 30
    grey = np.zeros(SHAPE)
    grey[20:26, 20:26, 3:9] = 85
    grey[21:25, 21:25, 4:8] = 255
    for values in (
        numbers,
        grey,
        np.where(lesions > 0, 77, 0),
        np.where(numbers > 20, 12, numbers),
    ):
        label = write(tmp_path / "a_seg.nii.gz", values.astype(dtype))
        volume = read_volume(Case("a", {"t1": image}, label=label), ["t1"])
        assert (
            volume.label is not None
            and volume.label.sum() == (values > 0).sum()
            and not volume.notes
        )


def test_an_unusable_label_is_left_out_in_detection_and_refused_in_training(
    tmp_path: Path,
) -> None:
    image = write(tmp_path / "a_t1.nii.gz", noise())
    case = Case(
        "a", {"t1": image}, label=write(tmp_path / "a_seg.nii.gz", image_of_ones((5, 5, 5)))
    )
    expect(case, "lie on one grid")
    volume = read_volume(case, ["t1"], resampled=True)
    (note,) = volume.notes
    assert (
        volume.label is None
        and note.startswith("its label was left out: ")
        and "a_seg.nii.gz: has (5, 5, 5)" in note
    )


def test_headers_that_differ_by_rounding_share_a_grid(tmp_path: Path) -> None:
    image = write(tmp_path / "a_t1.nii.gz", noise())
    near, far = AFFINE.copy(), AFFINE.copy()
    near[0, 3] += 0.1  # of voxels of 3.75 mm
    far[0, 3] += 0.3
    lesion = image_of_ones() * (np.arange(SHAPE[0]) < 20)[:, None, None]
    label = write(tmp_path / "a_seg.nii.gz", lesion, near)
    assert read_volume(Case("a", {"t1": image}, label=label), ["t1"]).label is not None
    expect(
        Case("a", {"t1": image}, label=write(tmp_path / "a_seg.nii.gz", lesion, far)), "0.3 mm away"
    )


# Bad input: each names the file, what was found and what to do.


def expect(case: Case, message: str, channels: tuple[str, ...] = ("t1",)) -> None:
    with pytest.raises(AnomriError, match=message) as caught:
        read_volume(case, channels)
    assert "a_" in str(caught.value)


def single(path: Path) -> Case:
    return Case("a", {"t1": path})


def test_empty_zero_and_not_finite_images_are_refused(tmp_path: Path) -> None:
    expect(single(write(tmp_path / "a_t1.nii.gz", 0 * noise())), "no voxel is above zero")
    data = noise()
    data[3, 3, 3], data[4, 4, 4] = np.nan, np.inf
    expect(
        single(write(tmp_path / "a_t1.nii.gz", data)), r"2 of its 53,760 voxels are NaN or infinite"
    )
    (tmp_path / "a_empty.nii.gz").touch()
    expect(single(tmp_path / "a_empty.nii.gz"), "the file is empty")
    expect(single(tmp_path / "a_gone.nii.gz"), "no such file")
    (tmp_path / "a_text.nii").write_text("no image " * 100)
    expect(single(tmp_path / "a_text.nii"), "is not a NIfTI image")
    (tmp_path / "a_text.nii.gz").write_text("no image " * 100)
    expect(single(tmp_path / "a_text.nii.gz"), "is not a gzip file")


def test_truncated_files_and_flipped_bits_are_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    path = write(tmp_path / "a_t1.nii.gz", noise)
    whole = path.read_bytes()
    for length in (1, 20, 400, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        expect(single(path), "cut short")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    path.write_bytes(bytes(flipped))
    expect(single(path), "damaged")
    plain = write(tmp_path / "a_t1.nii", noise)
    plain.write_bytes(plain.read_bytes()[:-100])
    expect(single(plain), "is cut short: 215,292 bytes of image instead of 215,392")


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "a_t1.nii", noise((4, 4, 4)))
    content = bytearray(path.read_bytes())
    struct.pack_into("<4h", content, 40, 3, 10_000, 10_000, 10_000)
    path.write_bytes(bytes(content))
    expect(single(path), rf"claims 1,000,000,000,000 voxels .*more than {MAX_VOXELS:,}")
    bomb = tmp_path / "a_bomb.nii.gz"
    small = write(tmp_path / "a_small.nii", noise((4, 4, 4))).read_bytes()
    with gzip.open(bomb, "wb", compresslevel=9) as file:
        file.write(small)
        for _ in range(64):
            file.write(bytes(1024**2))
    expect(single(bomb), "goes on for more than")
    struct.pack_into("<4h", content, 40, 3, -5, 10, 10)
    path.write_bytes(bytes(content))
    expect(single(path), "cannot be read|nothing to read")


def test_several_volumes_and_colours_are_refused(tmp_path: Path) -> None:
    expect(
        single(write(tmp_path / "a_t1.nii.gz", noise((5, 5, 5, 2)))),
        r"4 axes \(5, 5, 5, 2\)",
    )
    colour = np.zeros((5, 5, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    expect(single(write(tmp_path / "a_t1.nii.gz", colour)), "real numbers")


def test_a_lesion_label_is_refused_as_a_brain_mask(tmp_path: Path) -> None:
    lesion = np.zeros(SHAPE, np.uint8)
    lesion[20:25, 20:25, 3:9] = 1
    case = Case(
        "a",
        {"t1": write(tmp_path / "a_t1.nii.gz", noise())},
        mask=write(tmp_path / "a_m.nii.gz", lesion),
    )
    expect(
        case,
        r"a_m.nii.gz: marks 16.9 ml, 0.3% of the tissue in a_t1.nii.gz; that is not the mask of a brain",
    )


def test_a_brain_mask_is_recognised_over_noisy_air_and_by_its_name(tmp_path: Path) -> None:
    draw, place = np.random.default_rng(0), np.indices(SHAPE)
    brain = (
        (place - np.array([32, 30, 7])[:, None, None, None]) ** 2
        * np.array([1, 1, 16])[:, None, None, None]
    ).sum(0) < 64
    values = np.where(brain, noise(), 0.03 * draw.random(SHAPE)).astype(np.float32)
    image = write(tmp_path / "a_t1.nii.gz", values)
    mask = write(tmp_path / "a_mask.nii.gz", brain.astype(np.uint8))
    assert (
        brain.mean() < 0.1
        and read_volume(Case("a", {"t1": image}, mask=mask), ["t1"]).foreground.sum() == brain.sum()
    )
    slab = write(
        tmp_path / "a_brain_mask.nii.gz",
        (brain & (place[2] == 7) & (place[0] < 27)).astype(np.uint8),
    )
    assert read_volume(Case("a", {"t1": image}, mask=slab), ["t1"]).foreground.any()


def test_a_brain_mask_is_refused_as_a_lesion_label(tmp_path: Path) -> None:
    image = write(tmp_path / "a_t1.nii.gz", noise())
    label = write(tmp_path / "a_seg.nii.gz", image_of_ones())
    expect(
        Case("a", {"t1": image}, label=label),
        "a_seg.nii.gz: marks 6,048 ml, 100% of the tissue in a_t1.nii.gz",
    )
    half = write(
        tmp_path / "a_seg.nii.gz", image_of_ones() * (np.arange(SHAPE[0]) < 35)[:, None, None]
    )
    expect(Case("a", {"t1": image}, label=half), "a_seg.nii.gz: marks 3,307 ml, 55% of")


def test_channels_and_labels_on_other_grids_are_refused(tmp_path: Path) -> None:
    t1 = write(tmp_path / "a_t1.nii.gz", noise())
    smaller = write(tmp_path / "a_t2.nii.gz", noise((10, 10, 10)))
    moved_affine = AFFINE.copy()
    moved_affine[2, 3] += 3
    moved = write(tmp_path / "a_flair.nii.gz", noise(), moved_affine)
    both = ("t1", "other")
    expect(
        Case("a", {"t1": t1, "other": smaller}),
        r"a_t2.nii.gz: has \(10, 10, 10\) voxels, but a_t1.nii.gz",
        both,
    )
    expect(
        Case("a", {"t1": t1, "other": moved}),
        r"a_flair.nii.gz: its header places it up to 3 mm away",
        both,
    )
    expect(Case("a", {"t1": t1}, label=moved), "3 mm away")
    expect(Case("a", {"t1": t1}, mask=smaller), "resample")


def test_damaged_headers_always_end_in_a_clear_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a_t1.nii", noise((6, 6, 6)))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for place in rng.integers(0, 348, rng.integers(1, 4)):
            content[place] = rng.integers(0, 256)
        path.write_bytes(bytes(content))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_volume(single(path), ["t1"])
            except AnomriError as error:
                assert "a_t1.nii" in str(error)
                refused += 1
    assert 40 < refused < 400
    content = bytearray(whole)
    for offset in (1e12, float("inf"), -5.0):
        struct.pack_into("<f", content, 108, offset)  # vox_offset
        path.write_bytes(bytes(content))
        expect(single(path), "places the image|cannot be read")


def test_only_geometry_is_copied_from_headers(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Patient John Doe"))
    image.header["db_name"] = image.header["intent_name"] = b"John Doe"
    nib.save(image, tmp_path / "a_t1.nii.gz")
    volume = read_volume(single(tmp_path / "a_t1.nii.gz"), ["t1"])
    write_image(tmp_path / "out.nii", volume.geometry.to_image(volume.data[0]))
    assert b"John" not in (tmp_path / "out.nii").read_bytes()


def test_an_unusable_affine_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a_t1.nii", noise())
    content = bytearray(path.read_bytes())
    for row in ([0, 0, 0, 0], [np.nan, 0, 0, 0]):
        struct.pack_into("<4f", content, 280, *row)  # srow_x
        path.write_bytes(bytes(content))
        expect(single(path), "no usable position")


def test_an_interrupted_or_failed_write_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = read_volume(single(write(tmp_path / "a_t1.nii.gz", noise())), ["t1"])
    out = tmp_path / "out"
    out.mkdir()
    for failure in (KeyboardInterrupt, MemoryError):

        def fail(*args: object, failure: type[BaseException] = failure) -> None:
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(igzip.IGzipFile, "write", fail)
            with pytest.raises(failure):
                write_image(out / "map.nii.gz", volume.geometry.to_image(volume.data[0]))
        assert os.listdir(out) == []


@pytest.mark.parametrize("size", [2.0, 0.5])
def test_two_voxel_sizes_in_one_header_are_refused(tmp_path: Path, size: float) -> None:
    values = np.random.default_rng(0).normal(500, 60, (20, 20, 20)).clip(50, 900)
    image = nib.Nifti1Image(values.astype(np.float32), np.diag([1.0, 1, 1, 1]))
    image.header["pixdim"][1:4] = size
    path = tmp_path / "a_t1.nii"
    path.write_bytes(image.to_bytes())
    stored = nib.load(path)
    assert stored.header["pixdim"][1] == size and stored.affine[0, 0] == 1
    with pytest.raises(AnomriError, match=r"a_t1.nii: its header has two voxel sizes: 1 x 1 x 1"):
        read_volume(Case("a", {"t1": path}), ("t1",))


def test_rounding_of_the_voxel_size_is_no_disagreement(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(500, 60, (20, 20, 20)).clip(50, 900)
    image = nib.Nifti1Image(values.astype(np.float32), np.diag([0.9375, 0.9375, 1.2, 1]))
    image.header["pixdim"][1:4] = 0.94, 0.94, 1.2
    path = tmp_path / "a_t1.nii"
    path.write_bytes(image.to_bytes())
    volume = read_volume(Case("a", {"t1": path}), ("t1",))
    assert volume.geometry.voxel_mm3 == pytest.approx(0.9375**2 * 1.2)
