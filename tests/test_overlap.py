"""Images of a case that do not lie on each other: refused, noted, or left alone."""

import re
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from anomri.errors import AnomriError
from anomri.evaluation.evaluate import evaluate
from anomri.scans.align import align
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.overlap import PlacedImage, measure_overlap
from anomri.scans.prepare import Preparation, prepare
from anomri.scans.read import read_volume
from anomri.scans.resample import VoxelGrid
from conftest import write
from phantom import LESION_MM, places, scan, thresholding

SHAPE = (80, 96, 72)
AFFINE = np.array([[-2.5, 0, 0, 98], [0, -2.5, 0, 118], [0, 0, 2.5, -88], [0, 0, 0, 1]])


def shifted(mm: tuple[float, float, float]) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:3, 3] += mm
    return affine


def two_channels(folder: Path, mm: tuple[float, float, float] = (0, 0, 0)) -> Case:
    """FLAIR, and T1 whose header places it beside by so many mm."""
    flair = write(folder / "a_flair.nii.gz", scan(SHAPE, AFFINE).astype(np.float32), AFFINE)
    t1 = write(folder / "a_t1.nii.gz", scan(SHAPE, AFFINE, seed=1).astype(np.float32), shifted(mm))
    return Case("a", {"flair": flair, "t1": t1})


def ball(centre_mm: tuple[float, float, float], radius_mm: float = 14) -> np.ndarray:
    inside = ((places(SHAPE, AFFINE) - centre_mm) ** 2).sum(-1) < radius_mm**2
    return inside.astype(np.uint8)


def notes(case: Case) -> str:
    return " ".join(thresholding(*case.channels).read(case).notes)


# Channels.


def test_the_overlap_of_an_ellipsoid_moved_along_its_axis_is_the_formula_s() -> None:
    # Two ellipsoids moved by the share d of their axis share 1 - 3/4 d + d^3 / 16.
    first = PlacedImage(Path("a.nii"), scan(SHAPE, AFFINE), VoxelGrid(SHAPE, AFFINE))
    for mm in (0, 10, 30, 65, 120):
        for axis, half in enumerate((65, 82, 60)):
            shift = np.zeros(3)
            shift[axis] = mm
            second = replace(first, grid=VoxelGrid(SHAPE, shifted(tuple(shift))))
            found, d = measure_overlap(first, second), mm / half
            expected = 1 - 3 / 4 * d + d**3 / 16 if d < 2 else 0
            assert found.shared == pytest.approx(expected, abs=0.02)
            assert found.apart_mm == pytest.approx(mm, abs=0.1)


@pytest.mark.parametrize(
    ("mm", "found"),
    [
        ((0, 50, 0), "hardly overlaps with a_flair.nii.gz: 56% of the tissue is in both"),
        ((100, 0, 0), "hardly overlaps with a_flair.nii.gz: 7% of the tissue is in both"),
        ((0, 0, -900), "does not overlap with a_flair.nii.gz: 0% of the tissue is in both"),
    ],
)
def test_channels_that_lie_elsewhere_are_refused_with_share_and_mm(
    tmp_path: Path, mm: tuple[float, float, float], found: str
) -> None:
    with pytest.raises(AnomriError) as caught:
        thresholding("flair", "t1").detect(two_channels(tmp_path, mm))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a_t1.nii.gz'}: {found}")
    assert f"their middles lie {max(map(abs, mm))} mm apart" in message
    assert message.endswith("Give the files of one scan, or align them with --register.")


def test_a_channel_that_lies_a_little_aside_is_noted(tmp_path: Path) -> None:
    assert "may not lie on" not in notes(two_channels(tmp_path, (0, 3, 0)))
    said = notes(two_channels(tmp_path, (25, 0, 0)))
    # The two ellipsoids share 71.5%.
    assert re.search("a_t1.nii.gz may not lie on a_flair.nii.gz: 7[12]% of the tissue", said)
    assert "their middles lie 25 mm apart" in said


def test_every_road_refuses_them(tmp_path: Path) -> None:
    case = two_channels(tmp_path, (100, 0, 0))
    images = {name: nib.load(path) for name, path in case.channels.items()}
    message = "hardly overlaps with .*flair.nii.* 100 mm apart"
    for given in (tmp_path, dict(case.channels), images):
        with pytest.raises(AnomriError, match=message):
            thresholding("flair", "t1").detect(given)
    bids = tmp_path / "bids"
    (bids / "sub-1" / "anat").mkdir(parents=True)
    (bids / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    for kind, path in {"FLAIR": case.channels["flair"], "T1w": case.channels["t1"]}.items():
        (bids / "sub-1" / "anat" / f"sub-1_{kind}.nii.gz").write_bytes(path.read_bytes())
    with pytest.raises(AnomriError, match="hardly overlaps with sub-1_FLAIR.nii.gz"):
        thresholding("flair", "t1").detect(bids)
    # To train, on one grid, where the content alone lies elsewhere.
    rolled = np.roll(np.asanyarray(images["t1"].dataobj), 40, axis=0)
    write(case.channels["t1"], rolled, AFFINE)
    with pytest.raises(AnomriError, match="hardly overlaps .* register one to the other before"):
        prepare(case, ["flair", "t1"], resampled=False)


def test_a_part_that_is_empty_is_noted(tmp_path: Path) -> None:
    case = two_channels(tmp_path)
    data = np.asanyarray(nib.load(case.channels["t1"]).dataobj).copy()
    data[:, :, 42:] = 0
    write(case.channels["t1"], data, AFFINE)
    share = (data > 0).sum() / (scan(SHAPE, AFFINE) > 0).sum()
    assert (
        f"a_t1.nii.gz covers {share:.0%} of what a_flair.nii.gz shows; the rest is empty in "
        "a_t1.nii.gz." in notes(case)
    )
    # A slab on a grid of its own is the same.
    write(case.channels["t1"], data[:, :, :42], AFFINE)
    said = notes(case)
    assert f"a_t1.nii.gz covers {share:.0%} of what" in said
    assert "lies on another grid" in said
    assert "may not lie" not in said


def test_an_empty_channel_and_one_beside_the_brain_mask_have_messages_of_their_own(
    tmp_path: Path,
) -> None:
    case = two_channels(tmp_path)
    left = np.where(places(SHAPE, AFFINE)[..., 0] < 0, 1, 0)
    brain = scan(SHAPE, AFFINE)
    write(case.channels["t1"], (brain * left).astype(np.float32), AFFINE)
    mask = write(tmp_path / "a_mask.nii.gz", ((brain > 0) * (1 - left)).astype(np.uint8), AFFINE)
    with pytest.raises(AnomriError, match="t1.nii.gz: no voxel above zero lies in the brain mask"):
        thresholding("flair", "t1").read(replace(case, mask=mask))
    write(case.channels["t1"], 0 * brain, AFFINE)
    with pytest.raises(AnomriError, match="a_t1.nii.gz: no voxel is above zero; the image is"):
        thresholding("flair", "t1").read(case)


# Brain masks.


@pytest.mark.parametrize("given", ["beside the scan", "as an option"])
def test_a_brain_mask_that_lies_elsewhere_is_refused_or_noted(tmp_path: Path, given: str) -> None:
    flair = Case("a", {"flair": two_channels(tmp_path).channels["flair"]})
    brain = (scan(SHAPE, AFFINE) > 0).astype(np.uint8)

    def read(mm: tuple[float, float, float]) -> str:
        mask = write(tmp_path / "mask.nii.gz", brain, shifted(mm))
        case, preparation = replace(flair, mask=mask), Preparation()
        if given == "as an option":
            case, preparation = flair, Preparation(brain_mask=mask)
        return " ".join(thresholding().read(case, preparation).notes)

    assert read((0, 0, 0)) == ""
    assert re.search("mask.nii.gz may not lie on a_flair.nii.gz: 7[12]% of the", read((25, 0, 0)))
    with pytest.raises(AnomriError, match=r"mask.nii.gz: hardly overlaps .*: 7% .* 100 mm apart"):
        read((100, 0, 0))
    with pytest.raises(AnomriError, match=r"mask.nii.gz: does not overlap .* 900 mm apart"):
        read((0, 900, 0))


# Labels and maps.


def test_a_label_in_air_is_left_out_of_a_detection_and_refused_elsewhere(tmp_path: Path) -> None:
    scan_only = Case("a", {"flair": two_channels(tmp_path).channels["flair"]})
    label = write(tmp_path / "a_seg.nii.gz", ball((-84, 95, 70)), AFFINE)
    case, detector = replace(scan_only, label=label), thresholding()
    volume = detector.read(case)
    millilitres = ball((-84, 95, 70)).sum() * 2.5**3 / 1000
    assert volume.label is None
    message = f"a_seg.nii.gz: 100% of it ({millilitres:.3g} ml) lies outside the brain"
    assert "its label was left out" in volume.notes[-1]
    assert message in volume.notes[-1]
    with pytest.raises(AnomriError, match="a_seg.nii.gz: 100% of it"):
        prepare(case, ["flair"], resampled=False)
    with pytest.raises(AnomriError, match="a_seg.nii.gz: 100% of it"):
        evaluate([case], model=detector)


def test_a_label_half_in_air_is_noted_with_its_ml_and_an_empty_one_is_right(
    tmp_path: Path,
) -> None:
    scan_only = Case("a", {"flair": two_channels(tmp_path).channels["flair"]})
    label = tmp_path / "a_seg.nii.gz"
    marked, brain = ball((65, 0, 0)), scan(SHAPE, AFFINE) > 0
    write(label, marked, AFFINE)
    outside_ml = (marked * ~brain).sum() * 2.5**3 / 1000
    volume = thresholding().read(replace(scan_only, label=label))
    assert volume.label is not None
    assert (
        f"a_seg.nii.gz: {outside_ml:.3g} of its {marked.sum() * 2.5**3 / 1000:.3g} ml"
        in (volume.notes[-1])
    )
    for right in (ball(LESION_MM), 0 * marked):
        write(label, right, AFFINE)
        volume = thresholding().read(replace(scan_only, label=label))
        assert volume.label is not None
        assert volume.notes == ()


def test_a_map_that_does_not_lie_on_its_scan_is_refused(tmp_path: Path) -> None:
    two_channels(tmp_path / "scans")
    write(tmp_path / "scans" / "a_seg.nii.gz", ball(LESION_MM), AFFINE)
    (case,) = find_cases(tmp_path / "scans")
    brain = scan(SHAPE, AFFINE).astype(np.float32)
    maps = tmp_path / "maps"
    write(maps / "a_anomaly.nii.gz", brain, AFFINE)
    assert evaluate([case], maps=maps).failed == {}
    # The map of another space, with this one's header.
    write(maps / "a_anomaly.nii.gz", np.roll(brain, 40, axis=0), AFFINE)
    with pytest.raises(AnomriError, match="a_anomaly.nii.gz: hardly overlaps with a_flair.nii.gz"):
        evaluate([case], maps=maps)
    # The label of another patient, and a map that is zero where it lies.
    write(maps / "a_anomaly.nii.gz", brain, AFFINE)
    write(tmp_path / "scans" / "a_seg.nii.gz", ball((-84, 95, 70)), AFFINE)
    with pytest.raises(AnomriError, match="a_seg.nii.gz: 100% of it .* lies outside the brain"):
        evaluate([case], maps=maps)
    # A map that misses the lesion is no error.
    write(maps / "a_anomaly.nii.gz", brain * (1 - ball(LESION_MM)), AFFINE)
    write(tmp_path / "scans" / "a_seg.nii.gz", ball(LESION_MM), AFFINE)
    evaluation = evaluate([case], maps=maps)
    assert "no voxel of the label has a score above zero" in evaluation.protocol["scans"]


# Registration of the channels to the first.


def real_channels(real_scans: Path) -> dict[str, Path]:
    folder = real_scans / "brats18" / "Brats18_TCIA10_639_1"
    return {name: next(folder.glob(f"*_{name}.nii.gz")) for name in ("flair", "t1")}


def moved_header(path: Path, to: Path, mm: tuple[float, float, float], degrees: float) -> Path:
    """A copy of an image whose header places it turned about its middle, and moved."""
    image = nib.load(path)
    middle = nib.affines.apply_affine(image.affine, (np.array(image.shape) - 1) / 2)
    turn = Rotation.from_rotvec(np.radians(degrees) * np.array([2, 1, 2]) / 3).as_matrix()
    move = nib.affines.from_matvec(turn, middle - turn @ middle + mm)
    return write(to, np.asanyarray(image.dataobj), move @ image.affine)


@pytest.mark.slow
@pytest.mark.parametrize(("mm", "degrees"), [((20, -10, 5), 8), ((100, 0, 0), 0)])
def test_a_moved_channel_is_registered_to_within_half_a_voxel(
    real_scans: Path, tmp_path: Path, mm: tuple[float, float, float], degrees: float
) -> None:
    pytest.importorskip("SimpleITK", reason="needs anomri[register]")
    true = real_channels(real_scans)
    moved = moved_header(true["t1"], tmp_path / "a_t1.nii.gz", mm, degrees)
    paths = {"flair": true["flair"], "t1": moved}
    case = Case("a", paths, mask=write_mask(moved, tmp_path / "a_mask.nii.gz"))
    first, second = (
        PlacedImage(path, np.asanyarray(nib.load(path).dataobj), grid_of(path))
        for path in paths.values()
    )
    found, note = align(first, second)
    voxels = np.argwhere(second.values[::8, ::8, ::8] > 0) * 8
    truth = nib.affines.apply_affine(nib.load(true["t1"]).affine, voxels)
    apart = np.linalg.norm(nib.affines.apply_affine(found.grid.affine, voxels) - truth, axis=1)
    assert apart.mean() < 0.5
    assert apart.max() < 1
    by_mm, by_degrees = map(float, re.findall(r"([\d.]+) (?:mm|degrees)", note))
    assert by_degrees == pytest.approx(degrees, abs=0.7)
    assert 15 < by_mm < 110
    # The whole road; a brain mask on the grid of T1 is moved with it.
    volume = read_volume(case, ["flair", "t1"], resampled=True, aligned=True)
    right = read_volume(Case("a", true), ["flair", "t1"])
    assert note in volume.notes
    brain = right.data[1] > 0
    both = (volume.data[1] > 0) & brain
    assert 2 * both.sum() / ((volume.data[1] > 0).sum() + brain.sum()) > 0.98
    assert np.corrcoef(volume.data[1][both], right.data[1][both])[0, 1] > 0.97


def write_mask(path: Path, to: Path) -> Path:
    image = nib.load(path)
    return write(to, (np.asanyarray(image.dataobj) > 0).astype(np.uint8), image.affine)


def grid_of(path: Path) -> VoxelGrid:
    image = nib.load(path)
    return VoxelGrid(image.shape, image.affine)


@pytest.mark.slow
def test_channels_of_one_session_on_grids_of_their_own_stay_where_headers_place_them(
    real_scans: Path,
) -> None:
    pytest.importorskip("SimpleITK", reason="needs anomri[register]")
    folder = real_scans / "whole_head" / "ms01"
    case = Case("a", {name: folder / f"ms01_{name}.nii.gz" for name in ("flair", "t1")})
    plain, aligned = (
        read_volume(case, ["flair", "t1"], resampled=True, aligned=on) for on in (False, True)
    )
    np.testing.assert_array_equal(plain.inside, aligned.inside)
    (note,) = set(aligned.notes) - set(plain.notes)
    assert "a registration would move it by 0.7 mm, less than half a voxel" in note


def test_channels_that_share_a_grid_and_lie_on_each_other_stay_as_they_are(
    real_scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("nothing is to be registered")

    monkeypatch.setattr("anomri.scans.read.align", never)
    case = Case("a", real_channels(real_scans))
    plain, aligned = (
        read_volume(case, ["flair", "t1"], resampled=True, aligned=on) for on in (False, True)
    )
    np.testing.assert_array_equal(plain.inside, aligned.inside)
    assert plain.notes == aligned.notes == ()


@pytest.mark.slow
def test_a_channel_that_shares_the_grid_but_lies_aside_is_registered(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK", reason="needs anomri[register]")
    case = two_channels(tmp_path)
    t1 = np.asanyarray(nib.load(case.channels["t1"]).dataobj)
    write(case.channels["t1"], np.roll(t1, 12, axis=0), AFFINE)
    volume = read_volume(case, ["flair", "t1"], resampled=True, aligned=True)
    (note,) = volume.notes
    assert note.startswith("a_t1.nii.gz was registered to a_flair.nii.gz: moved by")
    assert float(re.findall(r"([\d.]+) mm", note)[0]) == pytest.approx(30, abs=0.7)
    flair, t1_on = volume.data > 250
    assert 2 * (flair & t1_on).sum() / (flair.sum() + t1_on.sum()) > 0.97
