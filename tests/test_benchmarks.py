"""What the tables of `benchmarks/` rest on: changed scans, synthetic spheres and their counts."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

import find_cohort
import robustness
import small_lesions
from anomri.evaluation.evaluate import evaluate
from anomri.scans.find import find_cases
from anomri.scans.read import read_volume
from anomri.scans.volume import Volume
from conftest import AFFINE, brain, write


@pytest.fixture
def scan(tmp_path: Path) -> Volume:
    """A small brain with a lesion, on voxels of 1.25 x 1.25 x 1.33 mm."""
    channels, label = brain(np.random.default_rng(7), lesion=True)
    affine = AFFINE @ np.diag([1 / 3, 1 / 3, 1 / 6, 1])
    for name, data in {**channels, "seg": label.astype(np.uint8)}.items():
        write(tmp_path / "scans" / "one" / f"one_{name}.nii.gz", data, affine)
    return read_volume(find_cases(tmp_path / "scans")[0], ("flair", "t1"))


def test_spheres_lie_in_slices_without_a_lesion_and_are_bright_on_flair(scan: Volume) -> None:
    assert scan.label is not None
    planted = robustness.with_spheres(scan, 3, (3.0, 5.0), np.random.default_rng(0))
    assert planted.label is not None
    assert planted.label.any()
    # A sphere's middle is in a healthy slice; nobody counts its part in a slice with the lesion.
    components, count = ndimage.label(planted.label)
    assert 1 <= count <= 3
    healthy = ~scan.label.any((0, 1))
    for middle in ndimage.center_of_mass(planted.label, components, range(1, count + 1)):
        assert healthy[round(middle[2])]
    volumes = np.bincount(components.ravel())[1:] * scan.geometry.voxel_mm3
    radii = np.cbrt(3 * volumes / (4 * np.pi))
    assert radii.max() < 5 * 3 ** (1 / 3) + 1  # three that touch, at most
    flair, t1 = planted.data - scan.data
    assert flair[planted.label].min() > 0 > t1[planted.label].mean()
    assert (
        np.abs(flair[~ndimage.binary_dilation(planted.label, iterations=3)]).max()
        < 5e-3 * scan.data[0].max()
    )
    everywhere = replace(scan, label=np.ones_like(scan.label))
    nothing = robustness.with_spheres(everywhere, 3, (3.0, 5.0), np.random.default_rng(0))
    assert nothing.label is not None
    assert not nothing.label.any()
    assert np.array_equal(nothing.data, scan.data)


@pytest.mark.parametrize("name", robustness.CHANGES)
def test_a_change_alters_the_brain_and_leaves_the_air(scan: Volume, name: str) -> None:
    changed = robustness.CHANGES[name](scan, np.random.default_rng(1))
    before, after = scan.data, changed.data
    assert after.shape == before.shape
    assert np.isfinite(after).all()
    assert after.min() >= 0
    if name == "as it is":
        assert np.array_equal(after, before)
        return
    assert not np.allclose(after, before)
    assert np.array_equal(changed.label, scan.label) == ("turned" not in name)
    if "turned" in name:
        assert changed.label is not None
        assert scan.label is not None
        assert changed.label.sum() == pytest.approx(scan.label.sum(), rel=0.35)
    elif "rim" in name:
        assert 0 < (after > 0).sum() < (before > 0).sum()
    else:
        assert np.array_equal(after > 0, before > 0)
        inside = before[0] > 0
        assert np.corrcoef(after[0][inside], before[0][inside])[0, 1] > 0.5


def test_spheres_and_false_components_of_a_mask_are_counted() -> None:
    spheres, mask = np.zeros((20, 20, 6), bool), np.zeros((20, 20, 6), bool)
    spheres[2:5, 2:5, 1], spheres[10:12, 10:12, 1], spheres[15, 15, 2] = True, True, True
    healthy = np.array([False, True, True, True, True, False])
    mask[4:7, 4:7, 1] = True  # touches the first sphere
    mask[15, 2:4, 3] = True  # nothing of any
    mask[2, 15, 4:] = True  # reaches into a slice with a lesion
    shown, false = small_lesions.counts(mask, spheres, healthy, voxel_mm3=2.0)
    assert [there for _, there in shown] == [True, False, False]
    assert [radius for radius, _ in shown] == pytest.approx(
        [np.cbrt(3 * 2 * n / (4 * np.pi)) for n in (9, 4, 1)]
    )
    assert false == 1


def test_the_first_row_of_the_robustness_table_equals_an_evaluation(
    cohort: Path,
    model_with_head: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [
        "robustness.py",
        str(cohort),
        str(model_with_head),
        "--split",
        "test",
        "--only",
        "as it is",
        "--lesions",
    ]
    monkeypatch.setattr(sys, "argv", given)
    robustness.main()
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.count("|") == row.count("|") == 4
    found = evaluate(cohort, model=model_with_head)
    figures = re.findall(r"\d\.\d{3}", row)
    assert figures[:2] == [f"{found[name]:.3f}" for name in ("AUPRC, pooled", "ceil-Dice, pooled")]
    dice, best = (
        np.mean([getattr(patient, name) for patient in found.patients])
        for name in ("dice_unfiltered", "ceil_dice")
    )
    assert figures[2] == f"{dice / best:.3f}"


def test_the_table_of_small_lesions_has_a_row_for_every_size(
    cohort: Path,
    model_with_head: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [
        "small_lesions.py",
        str(cohort),
        str(model_with_head),
        "--split",
        "test",
        "--repeats",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", given)
    small_lesions.main()
    tables = capsys.readouterr().out.split("\n| ")
    rows = [line for line in tables if re.match(r"\d+(\.\d)? to ", line)]
    assert len(rows) == 2 * (len(small_lesions.RADII_MM) - 1)
    assert sum(int(row.split("|")[1]) for row in rows) > 0
    # The smaller the components that a mask keeps, the more spheres it shows.
    for row in rows:
        shown = [float(share) for share in re.findall(r"\d\.\d\d", row)]
        assert shown[:3] == sorted(shown[:3])


def test_the_time_to_find_a_cohort_is_printed_for_each_layout(
    capsys: pytest.CaptureFixture[str],
) -> None:
    find_cohort.main(["--patients", "3"])  # which checks that all patients are found
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == [*(layout.__name__ for layout in find_cohort.LAYOUTS), "table"]
    assert all(float(line.split()[1]) < 60 and line.endswith(" s") for line in lines)
