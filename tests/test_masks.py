"""Brain masks, labels and maps by their values: what is taken, how many ml, and what is refused."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from anomri.cli import main
from anomri.errors import AnomriError
from anomri.evaluation.evaluate import evaluate
from anomri.scans.case import Case
from anomri.scans.read import read_label, read_volume
from phantom import thresholding

SHAPE, AFFINE = (50, 56, 46), np.diag([-4.0, -4, 4, 1])
VOXEL_ML = 0.064
PLACE = np.stack(np.meshgrid(*[np.arange(n) - n / 2 + 0.5 for n in SHAPE], indexing="ij"))
BRAIN = (PLACE / np.array([17, 20, 16])[:, None, None, None]) ** 2
BRAIN = BRAIN.sum(0) <= 1
LESION = ((PLACE - np.array([6, 4, 3])[:, None, None, None]) ** 2).sum(0) <= 5**2
SCAN = np.random.default_rng(0).normal(500, 60, SHAPE).clip(50, 900).astype(np.float32) * BRAIN
NOISE = 1e-6 * np.random.default_rng(1).random(SHAPE)
HEAD = np.where(BRAIN, SCAN, 300 * np.random.default_rng(2).random(SHAPE)).astype(np.float32)
BRAIN_ML, LESION_ML = VOXEL_ML * BRAIN.sum(), VOXEL_ML * LESION.sum()


def soft(marked: np.ndarray) -> np.ndarray:
    """Shares of a mask that was blurred."""
    return ndimage.gaussian_filter(marked.astype(np.float64), 0.7)


def steps(marked: np.ndarray) -> np.ndarray:
    """A soft mask of five levels, of up to 255."""
    return np.round(np.round(soft(marked) * 4) / 4 * 255)


def save(path: Path, values: np.ndarray, dtype: type | None = np.float32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.astype(dtype), AFFINE), path)
    return path


def save_scaled(path: Path, values: np.ndarray, slope: float) -> Path:
    """Integers with a slope in the header."""
    image = nib.Nifti1Image(np.uint8(values), AFFINE)
    image.header.set_slope_inter(slope, 0)
    nib.save(image, path)
    return path


def read(folder: Path, *, mask: Path | None = None, label: Path | None = None, ignored=()):
    flair = save(folder / "a_flair.nii.gz", SCAN if mask is None else HEAD)
    case = Case("a", {"flair": flair}, label, mask, ignored=ignored)
    return read_volume(case, ["flair"])


def marked_voxels(volume, *, mask: bool) -> np.ndarray:
    return volume.foreground if mask else volume.label


@dataclass(frozen=True)
class Values:
    """Values made of a mask, the voxels that they mark, and what the note says."""

    values: np.ndarray
    marked: np.ndarray
    note: str


def kinds(shape: np.ndarray) -> dict[str, Values]:
    blurred, stepped = soft(shape), steps(shape)
    per_cent = np.round(100 * blurred)
    ring = ndimage.binary_dilation(shape) & ~shape
    near_full = np.where(np.indices(SHAPE).sum(0) % 2, 254, 255) * shape
    return {
        "noise of floats": Values(shape + NOISE, shape, "are taken for zero"),
        "noise around zero": Values(shape + NOISE - 5e-7, shape, "are taken for zero"),
        "five levels up to 255": Values(stepped, stepped >= 127.5, "from 127.5 on are taken"),
        "a peak of 0.8": Values(0.8 * blurred, 0.8 * blurred >= 0.5, "from 0.5 on are taken"),
        "a probability": Values(blurred, blurred.astype(np.float32) >= 0.5, "from 0.5 on"),
        "per cent": Values(per_cent, per_cent >= 50, "from 50 on are taken"),
        "shares of 255": Values(255 * blurred, 255 * blurred >= 127.5, "from 127.5 on"),
        "254 and 255": Values(near_full, shape, ""),
        "one value": Values(0.3 * shape, shape, ""),
        "an undershoot": Values(shape - 0.1 * ring, shape, "are taken for zero"),
    }


@pytest.mark.parametrize("what", kinds(BRAIN))
@pytest.mark.parametrize("mask", [True, False])
def test_a_mask_and_a_label_are_understood_alike(tmp_path: Path, what: str, mask: bool) -> None:
    shape = BRAIN if mask else LESION
    given = kinds(shape)[what]
    path = save(tmp_path / "x.nii.gz", given.values)
    volume = read(tmp_path, mask=path) if mask else read(tmp_path, label=path)
    np.testing.assert_array_equal(marked_voxels(volume, mask=mask), given.marked)
    # The right size: of a brain of 1,462 ml, a lesion of 35 ml.
    millilitres = VOXEL_ML * marked_voxels(volume, mask=mask).sum()
    if what != "a peak of 0.8":
        assert millilitres == pytest.approx(BRAIN_ML if mask else LESION_ML, rel=0.07)
    notes = [note for note in volume.notes if "x.nii.gz" in note]
    assert len(notes) == bool(given.note)
    if given.note:
        shown = f"{millilitres:,.0f} ml" if millilitres >= 100 else f"{millilitres:.3g} ml"
        assert given.note in notes[0] and shown in notes[0]


def test_the_phantom_has_the_size_of_a_brain_and_of_a_lesion() -> None:
    assert (round(BRAIN_ML), round(LESION_ML)) == (1462, 35)


@pytest.mark.parametrize("mask", [True, False])
def test_the_scale_of_a_header_is_applied_before_a_soft_mask_is_cut(
    tmp_path: Path, mask: bool
) -> None:
    shape = BRAIN if mask else LESION
    stored = np.round(255 * soft(shape))
    path = save_scaled(tmp_path / "x.nii.gz", stored, 1 / 255)
    volume = read(tmp_path, mask=path) if mask else read(tmp_path, label=path)
    np.testing.assert_array_equal(marked_voxels(volume, mask=mask), stored >= 128)
    path = save_scaled(tmp_path / "x.nii.gz", 255 * shape, 1 / 255)
    volume = read(tmp_path, mask=path) if mask else read(tmp_path, label=path)
    np.testing.assert_array_equal(marked_voxels(volume, mask=mask), shape)
    assert not volume.notes


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(("most", "said"), [(0.3, "0.3"), (20.5, "20.5"), (1000.0, "1e.03")])
def test_shares_of_an_unknown_full_value_are_refused(
    tmp_path: Path, mask: bool, most: float, said: str
) -> None:
    shape = BRAIN if mask else LESION
    blurred = soft(shape)
    path = save(tmp_path / "x.nii.gz", most * blurred / blurred.max())
    with pytest.raises(AnomriError, match=rf"x.nii.gz: has values .* of up to {said}: neither"):
        read(tmp_path, mask=path) if mask else read(tmp_path, label=path)


@pytest.mark.parametrize("mask", [True, False])
def test_negative_values_are_refused_in_a_mask_and_a_label(tmp_path: Path, mask: bool) -> None:
    shape = BRAIN if mask else LESION
    distance = ndimage.distance_transform_edt(shape) - ndimage.distance_transform_edt(~shape)
    for values in (distance, np.where(shape, 1, -1)):
        path = save(tmp_path / "x.nii.gz", values)
        with pytest.raises(AnomriError, match="x.nii.gz: holds (negative values|the values of)"):
            read(tmp_path, mask=path) if mask else read(tmp_path, label=path)


@pytest.mark.parametrize("mask", [True, False])
def test_nan_around_counts_as_zero_with_a_note_and_is_refused_inside(
    tmp_path: Path, mask: bool
) -> None:
    shape = BRAIN if mask else LESION
    around = np.where(ndimage.binary_dilation(shape, iterations=2), shape, np.nan)
    path = save(tmp_path / "x.nii.gz", around)
    volume = read(tmp_path, mask=path) if mask else read(tmp_path, label=path)
    np.testing.assert_array_equal(marked_voxels(volume, mask=mask), shape)
    assert "x.nii.gz has a background of NaN; it was set to zero." in volume.notes
    inside = shape.astype(float)
    inside[tuple(np.argwhere(shape)[len(np.argwhere(shape)) // 2])] = np.nan
    path = save(tmp_path / "x.nii.gz", inside)
    with pytest.raises(AnomriError, match=r"x.nii.gz: 1 of its .* voxels are NaN"):
        read(tmp_path, mask=path) if mask else read(tmp_path, label=path)


def test_classes_of_a_label_are_all_lesion_and_those_of_a_brain_mask_are_named(
    tmp_path: Path,
) -> None:
    core = ndimage.binary_erosion(LESION, iterations=2)
    label = save(tmp_path / "x_seg.nii.gz", LESION * 2 + core * 2, np.uint8)
    volume = read(tmp_path, label=label)
    np.testing.assert_array_equal(volume.label, LESION)
    assert not volume.notes
    tissues = np.where(BRAIN, 1 + (np.indices(SHAPE)[0] // 3) % 3, 0)
    for values, named in ((tissues, "1, 2, 3"), (tissues * 85, "85, 170, 255")):
        volume = read(tmp_path, mask=save(tmp_path / "x.nii.gz", values, np.uint8))
        np.testing.assert_array_equal(volume.foreground, BRAIN)
        assert volume.notes == (
            f"x.nii.gz holds the values {named}; all above zero are taken for the brain "
            f"({BRAIN_ML:,.0f} ml).",
        )


def test_an_interpolated_label_with_ignored_values_is_refused(tmp_path: Path) -> None:
    other = np.roll(LESION, -20, axis=0)
    label = save(tmp_path / "x.nii.gz", soft(LESION) + 2 * soft(other))
    with pytest.raises(AnomriError, match=r"x.nii.gz: has values between whole .* value 2 means"):
        read(tmp_path, label=label, ignored=(2,))
    label = save(tmp_path / "x.nii.gz", LESION + 2 * other + NOISE)
    volume = read(tmp_path, label=label, ignored=(2,))
    np.testing.assert_array_equal(volume.label, LESION)
    np.testing.assert_array_equal(volume.ignored, other)


def test_a_scan_given_as_a_label_is_called_a_scan(tmp_path: Path) -> None:
    label = save(tmp_path / "x.nii.gz", SCAN + NOISE)
    with pytest.raises(AnomriError, match=r"x.nii.gz: holds the values of a scan or of a map"):
        read(tmp_path, label=label)


def test_a_probability_of_lesions_that_is_nowhere_zero_is_a_label(tmp_path: Path) -> None:
    rest = 0.01 * np.random.default_rng(0).gamma(2, 0.5, SHAPE)
    values = soft(LESION) + (1 - soft(LESION)) * rest
    volume = read(tmp_path, label=save(tmp_path / "x.nii.gz", values))
    np.testing.assert_array_equal(volume.label, values.astype(np.float32) >= 0.5)


def test_masks_that_are_no_brain_are_refused_or_noted(tmp_path: Path) -> None:
    air = save(tmp_path / "x.nii.gz", ~BRAIN, np.uint8)
    with pytest.raises(AnomriError, match=r"x.nii.gz: marks [\d,]+ ml and all corners of a_flair"):
        read(tmp_path, mask=air)
    with pytest.raises(AnomriError, match=r"x.nii.gz: no voxel is above zero"):
        read(tmp_path, mask=save(tmp_path / "x.nii.gz", 0 * BRAIN, np.uint8))
    with pytest.raises(AnomriError, match=r"x.nii.gz: marks 35.3 ml, .*not the mask of a brain"):
        read(tmp_path, mask=save(tmp_path / "x.nii.gz", LESION, np.uint8))
    # A name is not believed without a word.
    named = save(tmp_path / "x_brain_mask.nii.gz", LESION, np.uint8)
    (note,) = read(tmp_path, mask=named).notes
    assert "x_brain_mask.nii.gz marks 35.3 ml" in note and "a part of a brain" in note
    everything = save(tmp_path / "x.nii.gz", np.ones(SHAPE), np.uint8)
    (note,) = read(tmp_path, mask=everything).notes
    assert "marks all of a_flair.nii.gz (8,243 ml), and so takes nothing away" in note
    head = ndimage.binary_dilation(BRAIN, iterations=5)
    (note,) = read(tmp_path, mask=save(tmp_path / "x.nii.gz", head, np.uint8)).notes
    assert "x.nii.gz marks" in note and "more than any brain has" in note


@pytest.fixture
def maps(tmp_path: Path) -> Case:
    """A case ``a`` with a map in the folder ``maps`` and a label."""
    scores = np.abs(SCAN - 500) / 60 * BRAIN + 4 * LESION
    save(tmp_path / "maps" / "a_anomaly.nii.gz", scores)
    flair = save(tmp_path / "a_flair.nii.gz", SCAN)
    return Case("a", {"flair": flair}, save(tmp_path / "a_seg.nii.gz", LESION, np.uint8))


def refusal(case: Case, folder: Path) -> str:
    """Why `evaluate` scores no map of the case."""
    evaluation = evaluate([case, *others(folder)], maps=folder / "maps")
    return evaluation.failed["a"]


def others(folder: Path) -> list[Case]:
    """A sound case beside the one that is looked at."""
    save(folder / "maps" / "b_anomaly.nii.gz", SCAN / 500 + LESION)
    return [Case("b", {}, save(folder / "b_seg.nii.gz", LESION, np.uint8))]


def test_a_brain_mask_or_a_scan_is_no_label_of_maps(maps: Case, tmp_path: Path) -> None:
    save(tmp_path / "a_seg.nii.gz", BRAIN, np.uint8)
    assert "a_seg.nii.gz: marks 1,462 ml; that is not a lesion label" in refusal(maps, tmp_path)
    save(tmp_path / "a_seg.nii.gz", SCAN)
    assert "holds the values of a scan or of a map, not of a label" in refusal(maps, tmp_path)
    save(tmp_path / "a_seg.nii.gz", nib.load(tmp_path / "maps/a_anomaly.nii.gz").get_fdata())
    assert "holds the values of a scan or of a map, not of a label" in refusal(maps, tmp_path)


def test_a_large_label_of_maps_is_noted(maps: Case, tmp_path: Path) -> None:
    half = BRAIN & (PLACE[0] > 0)
    save(tmp_path / "a_seg.nii.gz", half, np.uint8)
    said = evaluate([maps], maps=tmp_path / "maps").protocol["labels"]
    assert f"a_seg.nii.gz marks {VOXEL_ML * half.sum():,.0f} ml, much for a lesion" in said


def test_the_label_of_a_case_is_no_map(maps: Case, tmp_path: Path) -> None:
    map_file = tmp_path / "maps" / "a_anomaly.nii.gz"
    map_file.write_bytes((tmp_path / "a_seg.nii.gz").read_bytes())
    assert "a_anomaly.nii.gz: is the label of a, not an anomaly map" in refusal(maps, tmp_path)
    save(map_file, 4 * LESION + ndimage.binary_erosion(LESION))
    assert "a_anomaly.nii.gz: marks exactly the 552 voxels of the label" in refusal(maps, tmp_path)


def test_a_mask_or_a_channel_is_scored_as_a_map_with_a_note(maps: Case, tmp_path: Path) -> None:
    map_file = tmp_path / "maps" / "a_anomaly.nii.gz"
    save(map_file, np.roll(LESION, 1, axis=0), np.uint8)
    evaluation = evaluate([maps], tmp_path / "out", maps=tmp_path / "maps")
    said = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "a_anomaly.nii.gz holds only 1 above zero: it is a mask" in json.dumps(said)
    overlap = (LESION & np.roll(LESION, 1, axis=0)).sum() / LESION.sum()
    assert max(point[3] for point in evaluation.curve) == pytest.approx(overlap)
    map_file.write_bytes((tmp_path / "a_flair.nii.gz").read_bytes())
    evaluation = evaluate([maps], maps=tmp_path / "maps")
    assert "is channel flair of a itself" in json.dumps(evaluation.protocol)


def test_a_mask_on_the_command_line_is_cut_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thresholding().save(tmp_path / "m")
    flair = save(tmp_path / "p_flair.nii.gz", HEAD)
    mask = save(tmp_path / "bet.nii.gz", BRAIN + NOISE)
    arguments = ["-o", str(tmp_path / "out"), "-m", str(tmp_path / "m")]
    arguments += ["--flair", str(flair), "--brain-mask", str(mask)]
    assert main(["detect", *arguments]) == 0
    said = " ".join(" ".join(capsys.readouterr()).split())
    assert "bet.nii.gz has" in said and "the others mark 1,462 ml" in said
    found = nib.load(next((tmp_path / "out").glob("*_anomaly.nii.gz"))).get_fdata()
    assert not found[~BRAIN].any()
    # The scan itself is no mask.
    arguments[-1] = str(flair)
    assert main(["detect", *arguments, "--overwrite"]) == 1
    assert "holds the values of a scan or of a map, not of a brain mask" in " ".join(
        " ".join(capsys.readouterr()).split()
    )


@pytest.mark.parametrize("name", ["brats18/*637*/*_seg", "mslesseg/P39*/*_seg"])
def test_real_labels_that_were_resampled_keep_their_size(
    tmp_path: Path, real_scans: Path, name: str
) -> None:
    path = next(real_scans.glob(f"{name}.nii.gz"))
    image = nib.load(path)
    drawn = np.asanyarray(image.dataobj) > 0
    blurred = ndimage.gaussian_filter(drawn.astype(np.float32), 0.7)
    half = ndimage.zoom(drawn.astype(np.float32), 0.5, order=1)
    finer = [now / before for now, before in zip(drawn.shape, half.shape, strict=True)]
    cubic = ndimage.zoom(half, finer, order=3)
    for values in (blurred, 0.8 * blurred, 255 * blurred, np.round(100 * blurred), cubic):
        label = tmp_path / "x_seg.nii.gz"
        nib.save(nib.Nifti1Image(values.astype(np.float32), image.affine), label)
        found, _ = read_label(Case("x", {}, label))
        assert found.lesion.sum() == pytest.approx(drawn.sum(), rel=0.13)
        (note,) = found.notes
        assert f"{found.lesion.sum() / 1000:.3g} ml)" in note and " on are taken (" in note


def test_real_scans_and_the_brain_itself_are_no_labels(tmp_path: Path, real_scans: Path) -> None:
    path = next(real_scans.glob("brats18/*637*/*_flair.nii.gz"))
    with pytest.raises(AnomriError, match="holds the values of a scan or of a map, not of a label"):
        read_label(Case("x", {}, path))
    image = nib.load(path)
    brain = np.asanyarray(image.dataobj) > 0
    label, drawn = tmp_path / "x_seg.nii.gz", next(path.parent.glob("*_seg.nii.gz"))
    nib.save(nib.Nifti1Image(brain.astype(np.uint8), image.affine), label)
    # A mask that was found may be as large: this is said of labels alone.
    assert read_label(Case("x", {}, label))[0].lesion.sum() == brain.sum()
    for name in ("x", "y"):
        shutil.copy(path, tmp_path / f"{name}_anomaly.nii.gz")
    evaluation = evaluate([Case("x", {}, label), Case("y", {}, drawn)], maps=tmp_path)
    assert list(evaluation.failed) == ["x"]
    assert re.search(r"x_seg.nii.gz: marks 1,\d+ ml; that is not a lesion", evaluation.failed["x"])


def test_values_of_minus_one_may_be_ignored(tmp_path: Path) -> None:
    other = np.roll(LESION, -20, axis=0)
    for lesion in (LESION.astype(float), soft(LESION)):
        label = save(tmp_path / "x.nii.gz", np.where(other, -1, lesion))
        with pytest.raises(AnomriError, match=r"x.nii.gz: holds negative values \(down to -1,"):
            read(tmp_path, label=label)
        volume = read(tmp_path, label=label, ignored=(-1,))
        np.testing.assert_array_equal(volume.label, lesion.astype(np.float32) >= 0.5)
        np.testing.assert_array_equal(volume.ignored, other)


def test_a_map_of_nan_around_the_brain_is_scored_as_zero_there(maps: Case, tmp_path: Path) -> None:
    map_file = tmp_path / "maps" / "a_anomaly.nii.gz"
    scores = nib.load(map_file).get_fdata()
    expected = evaluate([maps], maps=tmp_path / "maps").figures
    save(map_file, np.where(BRAIN | (scores > 0), scores, np.nan))
    evaluation = evaluate([maps], maps=tmp_path / "maps")
    assert evaluation.figures == expected
    assert "has a background of NaN; it was set to zero" in evaluation.protocol["scans"]


def test_noise_alone_marks_nothing(tmp_path: Path) -> None:
    noise = save(tmp_path / "x.nii.gz", NOISE)
    volume = read(tmp_path, label=noise)
    assert not volume.label.any()
    (note,) = volume.notes
    assert "x.nii.gz has 128,800 voxels that are nearly zero" in note and "mark 0 ml" in note
    with pytest.raises(AnomriError, match=r"x.nii.gz: no voxel is above zero"):
        read(tmp_path, mask=noise)
