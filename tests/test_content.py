"""A file's name may be wrong: masks, labels and maps are not scans, and scans are not masks."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from anomri.cli import main
from anomri.errors import AnomriError
from anomri.scans.case import Case
from anomri.scans.content import check_scan, is_scan
from anomri.scans.prepare import prepare
from anomri.scans.read import read_volume
from phantom import places, scan, thresholding

SHAPE, AFFINE = (64, 80, 40), nib.affines.from_matvec(np.diag([-2.2, -2.2, 3]), [69, 87, -58])
BRAIN = scan(SHAPE, AFFINE)
INSIDE = BRAIN > 0
LESION = INSIDE & (((places(SHAPE, AFFINE) - [28.0, -14, 22]) ** 2).sum(-1) < 14**2)
# Regions of about 20 mm, as in an atlas.
PARTS = INSIDE * (1 + np.einsum("ixyz,i", np.indices(SHAPE) // 10, [1, 7, 61]))
LEAKY = np.clip(ndimage.gaussian_filter(LESION.astype(float), 0.7), 1e-6, 1) * INSIDE


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, AFFINE), path)
    return path


NOT_SCANS = {
    "brain mask": (INSIDE.astype(np.uint8), "holds only one value above zero"),
    "brain mask of 255": (255.0 * INSIDE.astype(np.float32), "holds only one value"),
    "lesion label": (LESION.astype(np.uint8), "holds only one value"),
    "classes": (np.digitize(BRAIN, [1, 500, 560]), "holds only 3 different values"),
    "parcels": (np.uint16(PARTS), "equal the ones beside them"),
    "soft mask": (ndimage.gaussian_filter(INSIDE.astype(np.float32), 1), "at its maximum"),
    "mask in per cent": (
        np.uint8(ndimage.gaussian_filter(100.0 * INSIDE, 1)),
        "are at its maximum|equal the ones beside them",
    ),
    "probability of a lesion": (
        ndimage.gaussian_filter(LESION.astype(np.float32), 1),
        "are at its maximum",
    ),
    "probability that leaks": (LEAKY.astype(np.float32), "are at its maximum"),
}


@pytest.mark.parametrize("what", NOT_SCANS)
def test_an_image_that_is_not_a_scan_is_refused_by_its_values(tmp_path: Path, what: str) -> None:
    values, message = NOT_SCANS[what]
    values = values.astype(np.float32) if values.dtype == np.int64 else values
    path = save(tmp_path / "p_flair.nii.gz", values)
    with pytest.raises(AnomriError, match=rf"p_flair.nii.gz: .*({message}).*, not a scan"):
        read_volume(Case("p", {"flair": path}), ["flair"])
    assert not is_scan(values)
    # Also as the second channel.
    paths = {"t1": save(tmp_path / "p_t1.nii.gz", BRAIN.astype(np.float32)), "flair": path}
    with pytest.raises(AnomriError, match=r"p_flair.nii.gz: .* not a scan"):
        thresholding("t1", "flair").detect(paths)


def test_a_mask_beside_the_scan_is_not_searched_for_lesions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "p_flair.nii.gz", BRAIN.astype(np.float32))
    # HD-BET 2 calls the mask so, and stripped images are called so, too.
    save(tmp_path / "in" / "p_flair_bet.nii.gz", INSIDE.astype(np.uint8))
    thresholding().save(tmp_path / "m")
    arguments = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(tmp_path / "m")]
    assert main(["detect", *arguments]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "p_flair_bet.nii.gz: holds only one value above zero; it is a mask or a label" in said
    assert not list((tmp_path / "out").glob("*_anomaly.nii.gz"))


@pytest.mark.parametrize("kind", ["anomaly", "mask", "lesions"])
def test_a_result_is_not_searched_again(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "p_flair.nii.gz", BRAIN.astype(np.float32))
    thresholding().detect(path).save(tmp_path / "out")
    with pytest.raises(AnomriError, match="is a result that anomri wrote, not a scan"):
        thresholding().detect({"flair": tmp_path / "out" / f"p_{kind}.nii.gz"})


@pytest.mark.parametrize("levels", [16, 32, 255])
def test_scans_of_few_grey_levels_clipped_or_thresholded_are_scans(levels: int) -> None:
    grey = np.random.default_rng(0).normal(500, 150, SHAPE)
    coarse = np.clip(np.ceil(INSIDE * grey / 800 * levels), 0, levels)
    cut = np.where(coarse > 0.3 * levels, coarse, 0).astype(np.uint8)
    for values in (coarse.astype(np.uint8), cut, (coarse * 3.7).astype(np.float32)):
        check_scan(Path("p_flair.nii.gz"), values)


def test_real_scans_are_scans_and_real_labels_are_not(real_scans: Path) -> None:
    scans = [*(real_scans / "stroke").glob("*.nii.gz"), *real_scans.glob("brats18/*2013*/*_t*.gz")]
    scans += [*real_scans.glob("mslesseg/P14*/*_flair.nii.gz"), *real_scans.glob("*/ms0*/*.gz")]
    assert len(scans) > 20
    for path in scans:
        values = np.asanyarray(nib.load(path).dataobj)
        check_scan(path, values)
        assert is_scan(values), path
    labels = [*real_scans.glob("mslesseg/*/*_seg.nii.gz"), *real_scans.glob("label_maps/*.gz")]
    assert len(labels) > 15
    for path in labels[::2]:
        with pytest.raises(AnomriError, match="not a scan"):
            check_scan(path, np.asanyarray(nib.load(path).dataobj))


def test_a_real_scan_of_16_grey_levels_is_one(real_scans: Path) -> None:
    path = real_scans / "whole_head/ms01/ms01_flair.nii.gz"
    values = np.asanyarray(nib.load(path).dataobj)
    top = np.percentile(values[values > 0], 99.9)
    check_scan(path, np.clip(np.rint(values / top * 16), 0, 16).astype(np.uint8))


@pytest.mark.parametrize(("scale", "dtype"), [(1, np.float32), (100, np.uint8), (255, np.uint8)])
def test_a_soft_brain_mask_is_cut_at_a_half_with_a_note(
    tmp_path: Path, scale: int, dtype: type
) -> None:
    place = np.stack(np.meshgrid(*[np.linspace(-1, 1, 48)] * 3, indexing="ij"))
    distance = np.sqrt((place**2).sum(0))
    values = np.random.default_rng(0).normal(500, 60, distance.shape).clip(50, 900)
    affine = np.diag([4.0, 4, 4, 1])
    soft = (0.5 + 5 * (0.7 - distance)).clip(0, 1) * scale  # half of the full value at 0.7
    flair = tmp_path / "a_flair.nii.gz"
    mask = tmp_path / "a_mask.nii.gz"
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), flair)
    nib.save(nib.Nifti1Image(soft.astype(dtype), affine), mask)
    volume = read_volume(Case("a", {"flair": flair}, mask=mask), ("flair",))
    stored = np.asanyarray(nib.load(mask).dataobj)
    expected = np.count_nonzero(stored >= (0.5 if scale == 1 else stored.max() / 2))
    assert 0.9 < expected / np.count_nonzero(distance <= 0.7) < 1.1
    assert np.count_nonzero(volume.data) == expected
    assert any("a_mask.nii.gz has values" in note and "are taken" in note for note in volume.notes)


def test_a_brain_mask_of_the_whole_head_does_not_let_the_skull_in(tmp_path: Path) -> None:
    shape, affine = (60, 70, 60), np.diag([3.5, 3.5, 3.5, 1])
    head = np.random.default_rng(0).normal(400, 60, shape).clip(50, 900).astype(np.float32)
    flair, mask = tmp_path / "a_flair.nii.gz", tmp_path / "a_mask.nii.gz"
    nib.save(nib.Nifti1Image(head, affine), flair)
    nib.save(nib.Nifti1Image(np.ones(shape, np.uint8), affine), mask)
    with pytest.raises(AnomriError, match=r"a_mask.nii.gz: takes in more than the brain of a"):
        prepare(Case("a", {"flair": flair}, mask=mask), ("flair",))


def test_a_scan_given_as_a_brain_mask_is_refused(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(500, 60, (40, 40, 40)).clip(50, 900)
    image = nib.Nifti1Image(values.astype(np.float32), np.diag([4.0, 4, 4, 1]))
    files = [tmp_path / f"a_{kind}.nii.gz" for kind in ("flair", "mask")]
    for path in files:
        nib.save(image, path)
    case = Case("a", {"flair": files[0]}, mask=files[1])
    with pytest.raises(AnomriError, match=r"a_mask.nii.gz: holds the values of a scan"):
        read_volume(case, ("flair",))
