"""The synthetic cohort: its layout, its reproducibility, and that it resembles brain MRI."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from anomri.demo import cohort as synthetic
from anomri.scans.find import find_cases

COARSE_MM = 5.0
CHANNELS = ("flair", "t1", "t1ce", "t2")
Subject = tuple[synthetic.Images, synthetic.Mask, np.ndarray]


def subject(number: int, *, lesions: bool) -> Subject:
    """A coarse subject of its own seed."""
    return synthetic.make_subject(
        np.random.default_rng(number), lesions=lesions, spacing_mm=COARSE_MM
    )


def load(path: Path) -> np.ndarray:
    """The voxels of a NIfTI file."""
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three healthy cases and two with lesions, on disk."""
    folder = tmp_path_factory.mktemp("cohort")
    synthetic.make_cohort(folder, healthy=3, lesioned=2, seed=7, spacing_mm=COARSE_MM)
    return folder


@pytest.fixture(scope="module")
def diseased() -> list[Subject]:
    """Four subjects with lesions."""
    return [subject(number, lesions=True) for number in range(4)]


def test_synthetic_cohorts_have_the_brats_layout(cohort: Path) -> None:
    cases = {case.name: case for case in find_cases(cohort)}
    healthy = [f"synthetic_healthy_{number:03d}" for number in (1, 2, 3)]
    lesioned = [f"synthetic_lesion_{number:03d}" for number in (1, 2)]
    assert list(cases) == healthy + lesioned
    assert [cases[name].split for name in healthy] == ["train", "val", "val"]
    for name, case in cases.items():
        assert sorted(case.channels) == sorted(CHANNELS)
        assert case.channels["t1"] == cohort / name / f"{name}_t1.nii.gz"
        assert (case.label is not None) == (case.split == "test") == (name in lesioned)
    readme = (cohort / "README.txt").read_text()
    assert "SYNTHETIC" in readme and "Copyright (C) 1993-2004 Louis Collins" in readme


def test_files_have_one_lps_grid_of_240_mm_and_plain_types(cohort: Path) -> None:
    for path in cohort.glob("*/*.nii.gz"):
        image = nib.load(path)
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert image.shape == (48, 48, 34)
        np.testing.assert_allclose(image.header.get_zooms(), (COARSE_MM, COARSE_MM, COARSE_MM))
        assert image.get_data_dtype() == (
            np.uint8 if path.name.endswith("_seg.nii.gz") else np.int16
        )


def test_default_grid_is_128_by_128_pixels_of_2_mm_slices() -> None:
    axes, affine = synthetic.voxel_grid(1.875)
    assert [len(axis) for axis in axes] == [128, 128, 86]
    assert np.abs(np.diag(affine)).tolist() == [1.875, 1.875, 2.0, 1.0]


def test_the_same_seed_gives_the_same_bytes_in_any_cohort_size(
    cohort: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    names = synthetic.make_cohort(
        tmp_path, healthy=1, lesioned=1, seed=7, spacing_mm=COARSE_MM, progress=told.append
    )
    assert told == names == ["synthetic_healthy_001", "synthetic_lesion_001"]
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*/*.nii.gz"))
    assert len(written) == 9
    for path in written:
        # Voxels first: of two packed files that differ, bytes say nothing.
        np.testing.assert_array_equal(load(tmp_path / path), load(cohort / path), err_msg=str(path))
        assert (tmp_path / path).read_bytes() == (cohort / path).read_bytes()


def test_different_subjects_and_seeds_differ() -> None:
    first, second = (subject(number, lesions=False)[0]["t1"] > 0 for number in (0, 1))
    overlap = 2 * (first & second).sum() / (first.sum() + second.sum())
    assert 0.75 < overlap < 0.99


def test_voxels_are_zero_outside_the_brain_and_positive_inside(cohort: Path) -> None:
    for case in find_cases(cohort):
        images = [load(case.channels[channel]) for channel in CHANNELS]
        brain = images[0] > 0
        assert all(np.array_equal(image > 0, brain) and image.min() == 0 for image in images)
        litres = brain.sum() * COARSE_MM**3 / 1e6
        assert 1.0 < litres < 2.3
        assert not any(np.take(brain, edge, axis).any() for axis in (0, 1) for edge in (0, -1))
        assert not brain[..., -1].any()
        if case.label is not None:
            label = load(case.label)
            assert set(np.unique(label)) == {0, 1}
            assert brain[label > 0].all()


def test_lesions_are_inside_the_brain_and_of_plausible_size(diseased: list[Subject]) -> None:
    for images, label, _ in diseased:
        assert (images["flair"] > 0)[label].all()
        assert 1 < label.sum() * COARSE_MM**3 / 1000 < 250


def test_healthy_subjects_have_no_label() -> None:
    assert not subject(3, lesions=False)[1].any()


def test_tissue_contrast_is_that_of_each_sequence() -> None:
    def tissue_means(number: int) -> dict[str, dict[str, float]]:
        rng = np.random.default_rng(number)
        axes, _ = synthetic.voxel_grid(COARSE_MM)
        maps = synthetic.template_maps(synthetic.BLUR * COARSE_MM)
        points = synthetic.warp(rng, axes)
        # The warp comes first in a subject, so the same seed gives the anatomy of its images.
        images, _, _ = subject(number, lesions=False)
        where = {name: synthetic.sample(maps[name], points) > 0.8 for name in ("csf", "gm", "wm")}
        return {
            channel: {
                name: float(np.median(image[voxels & (image > 0)]))
                for name, voxels in where.items()
            }
            for channel, image in images.items()
        }

    for number in range(2):
        means = tissue_means(number)
        assert means["flair"]["csf"] < 0.6 * means["flair"]["wm"] < 0.6 * means["flair"]["gm"]
        for channel in ("t1", "t1ce"):
            assert means[channel]["csf"] < means[channel]["gm"] < means[channel]["wm"]
        assert means["t2"]["wm"] < means["t2"]["gm"] < 0.8 * means["t2"]["csf"]


def test_gains_of_scans_differ_by_an_order_of_magnitude(diseased: list[Subject]) -> None:
    for channel in CHANNELS:
        medians = [np.median(images[channel][images[channel] > 0]) for images, _, _ in diseased]
        assert max(medians) > 5 * min(medians)


def lesion_contrast(image: np.ndarray, label: np.ndarray, quantile: float) -> float:
    """Median intensity of a lesion over a quantile of that of the brain around it."""
    return float(np.median(image[label]) / np.quantile(image[(image > 0) & ~label], quantile))


def test_tumours_are_bright_on_flair_and_t2_and_dark_on_t1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "INFARCT_SHARE", 0.0)
    subjects = [subject(number, lesions=True) for number in range(4)]
    # On T1 lesions lie in the brightest tissue, white matter: the upper quartile of the brain.
    flair, t1, t2 = (
        np.array(
            [lesion_contrast(images[channel], label, quantile) for images, label, _ in subjects]
        )
        for channel, quantile in (("flair", 0.5), ("t1", 0.75), ("t2", 0.5))
    )
    assert (flair > 1.05).all() and flair.mean() > 1.15
    assert (t2 > 1.05).all() and t2.mean() > 1.15
    assert (t1 < 1).all() and t1.mean() < 0.92


def test_old_infarcts_have_a_cavity_as_dark_as_csf_on_flair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(synthetic, "INFARCT_SHARE", 1.0)
    for number in range(2):
        images, label, _ = subject(number, lesions=True)
        flair, t2 = images["flair"], images["t2"]
        dark = label & (flair < 0.6 * np.median(flair[flair > 0]))
        assert dark.sum() > 0.03 * label.sum()
        assert np.median(t2[dark]) > 1.3 * np.median(t2[t2 > 0])


def test_smooth_noise_has_unit_deviation_and_the_given_scale() -> None:
    axes, _ = synthetic.voxel_grid(COARSE_MM)
    fine, coarse = (
        synthetic.smooth_noise(np.random.default_rng(0), axes, scale) for scale in (6, 40)
    )
    assert fine.shape == (48, 48, 34) and fine.dtype == np.float32
    assert fine.std() == pytest.approx(1, abs=0.05)
    assert np.diff(coarse, axis=0).std() < 0.3 * np.diff(fine, axis=0).std()
