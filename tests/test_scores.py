"""Scores as settings of a model, how one is chosen without labels, and scans with a part of the
channels."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

import anomri
from anomri.cli import main
from anomri.cli.options import parse_channels
from anomri.errors import AnomriError
from anomri.methods.draws import log_between
from anomri.scans.find import find_cases
from anomri.scans.read import read_volume
from anomri.scoring import registry
from anomri.scoring.filters import anomaly_score, erode_foreground
from anomri.scoring.positions import CELLS, pack_maps
from anomri.scoring.registry import SCORES
from anomri.scoring.scores import raw_score, structural_similarity
from anomri.slices import SliceStack, Window, find_foreground, intensity_scale, slice_volume
from anomri.spec import FLOOR, LEVEL, SPREAD, ModelSpec, Scaling, Score, Training
from anomri.training.choose_score import TRIALS_COST, candidates, choose_score
from anomri.training.packing import PackedCase, pack_cohort
from anomri.training.passes import Passes, affordable_passes
from anomri.training.spheres import (
    LARGE_IN_A_SCAN,
    LARGE_RADII_MM,
    SMALL_IN_A_SCAN,
    SMALL_RADII_MM,
    Slab,
    Sphere,
    large_spheres,
    plant,
    small_spheres,
)
from anomri.training.thresholds import healthy_thresholds, subset_thresholds
from anomri.training.train import train

CHANNELS = ("flair", "t1")
STANDARD = Scaling("standard")
FORMULAS = [kind for kind in SCORES if SCORES[kind].place]


def case_of(cohort: Path, name: str) -> Any:
    """One case of the small cohort."""
    return next(case for case in find_cases(cohort) if case.name == name)


@pytest.mark.parametrize("corner", [(0, 0), (9, 14), (20, 16)])
def test_filters_on_the_brain_box_equal_filters_on_the_whole_grid(corner: tuple[int, int]) -> None:
    """A brain at an edge of the grid, in the middle and in a corner: as with filters over all of
    the grid."""
    raw = torch.rand((6, 40, 36), generator=torch.Generator().manual_seed(0))
    foreground = torch.zeros(raw.shape, dtype=torch.bool)
    foreground[:, corner[0] : corner[0] + 20, corner[1] : corner[1] + 20] = True
    score = Score(erosion=3, median=3, smoothing_mm=1.5)
    eroded = erode_foreground(foreground, 3, score.erosion_level)
    filtered = ndimage.median_filter((raw * eroded).numpy(), (1, 3, 3), mode="mirror")
    expected = ndimage.gaussian_filter(filtered, (0.5, 1.5, 2.0), truncate=3.0)
    found = anomaly_score(raw, foreground, score, (3.0, 1.0, 0.75))
    assert expected[:, 25:].max() > 0.1 or corner[0] == 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_each_score_is_its_formula() -> None:
    x, reconstruction = torch.full((2, 2, 16, 16), 0.5), torch.full((2, 2, 16, 16), 0.5)
    x[:, 0, 8], x[:, 1, 8] = 0.9, 0.2
    output = torch.cat([reconstruction, torch.full((2, 1, 16, 16), 0.25)], 1)

    def at(kind: str, **settings: Any) -> float:
        return float(raw_score(x, output, CHANNELS, Score(kind, **settings))[0, 8, 4])

    assert at("absolute") == pytest.approx(0.35)
    assert at("positive") == pytest.approx(0.2)
    assert at("positive", channels=("flair",)) == pytest.approx(0.4)
    assert at("negative") == pytest.approx(0.15)
    assert at("standardised", healthy_mean=(0.1, 0.1), healthy_spread=(0.1, 0.4)) == pytest.approx(
        (3 + 0.5) / 2
    )
    assert at("anomaly_probability") == pytest.approx(0.25)
    assert at("probability_with_residual") == pytest.approx(0.5 * 0.22)
    maps = pack_maps(
        torch.full((2, CELLS, CELLS, CELLS), 0.1), torch.full((2, CELLS, CELLS, CELLS), 0.2)
    )
    assert at("standardised_by_position", healthy_maps=maps) == pytest.approx(
        (1.5 + 1) / 2, abs=2e-3
    )
    assert at("positive_by_position", healthy_maps=maps) == pytest.approx(0.75, abs=2e-3)
    assert at("probability_with_residual_by_position", healthy_maps=maps) == pytest.approx(
        0.5 * 0.95, abs=2e-3
    )
    # No channel of this scan is one of the score's: dark counts as much as bright.
    assert at("positive_by_position", channels=("t2",), healthy_maps=maps) == pytest.approx(
        1.25, abs=2e-3
    )
    assert at("probability_with_residual", channels=("t2",)) == pytest.approx(0.5 * 0.37)
    assert at("ssim") > 0.1 > float(raw_score(x, x, CHANNELS, Score("ssim")).abs().max())
    with pytest.raises(AnomriError, match="no score 'best'"):
        at("best")
    with pytest.raises(AnomriError, match="has no segmentation head"):
        raw_score(x, reconstruction, CHANNELS, Score("anomaly_probability"))
    with pytest.raises(AnomriError, match="mean and spread"):
        at("standardised")


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_missing_channel_does_not_count(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, output = (
        torch.rand((2, 2, 16, 16), generator=generator),
        torch.rand((2, 3, 16, 16), generator=generator),
    )
    mean, spread = torch.rand((2, 2, CELLS, CELLS, CELLS), generator=generator)
    score = Score(
        kind,
        healthy_mean=(0.1, 0.2),
        healthy_spread=(0.1, 0.2),
        healthy_maps=pack_maps(mean, spread),
    )
    x[:, 1] = 0
    with_both = raw_score(x, output, CHANNELS, score)
    alone = replace(
        score,
        healthy_mean=(0.1,),
        healthy_spread=(0.1,),
        healthy_maps=pack_maps(mean[:1], spread[:1]),
    )
    assert torch.equal(with_both, raw_score(x[:, :1], output[:, [0, 2]], ("flair",), alone))


@pytest.mark.parametrize("kind", [kind for kind in FORMULAS if SCORES[kind].without_flair])
@pytest.mark.parametrize("looked_at", [(), ("flair", "t2")])
def test_without_flair_the_anomaly_probability_counts_alone(
    kind: str, looked_at: tuple[str, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, output = (
        torch.rand((2, 2, 16, 16), generator=generator),
        torch.rand((2, 3, 16, 16), generator=generator),
    )
    mean, spread = torch.rand((2, 2, CELLS, CELLS, CELLS), generator=generator)
    score = Score(kind, looked_at, healthy_maps=pack_maps(mean, spread))
    names, marks = ("flair", "t2"), Score("anomaly_probability", looked_at)
    assert not torch.equal(raw_score(x, output, names, score), raw_score(x, output, names, marks))
    x[:, 0] = 0
    assert torch.equal(raw_score(x, output, names, score), raw_score(x, output, names, marks))
    # A model without FLAIR has its residual as it is.
    other = ("t1", "t2")
    score = replace(score, channels=tuple(name for name in looked_at if name in other))
    assert not torch.equal(raw_score(x, output, other, score), raw_score(x, output, other, marks))


def test_the_names_of_scores_are_known_without_torch() -> None:
    program = "import sys; from anomri.scoring import registry; print(len(registry.names()), 'torch' in sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert printed == f"{len(SCORES)} False\n"


def test_every_score_has_a_function_and_auto_tries_what_the_table_says() -> None:
    assert all(registry.load(name).__name__ == name for name in FORMULAS)
    for name in ("own", "auto"):
        with pytest.raises(AnomriError, match=f"the score '{name}' stands for another one"):
            registry.load(name)
    spec = ModelSpec(("t1", "flair", "t2"))
    tried = [(score.kind, score.channels) for score in candidates(spec, True)]
    assert tried[: len(tried) // 2] == [
        ("absolute", ()),
        ("positive", ()),
        ("standardised", ()),
        ("ssim", ()),
        ("positive", ("flair",)),
        ("positive", ("t2",)),
        ("positive", ("flair", "t2")),
        ("probability_with_residual", ("flair", "t2")),
        ("probability_with_residual_by_position", ("flair", "t2")),
    ]
    without = candidates(replace(spec, channels=("t1", "flair")), False)
    assert [(score.kind, score.channels) for score in without[:5]] == [
        *tried[:4],
        ("positive", ("flair",)),
    ]
    assert len(without) == 10


def test_structural_similarity_is_that_of_torchmetrics() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = torch.rand((2, 1, 2, 32, 32), generator=torch.Generator().manual_seed(0)).double()
    ours = structural_similarity(x, y, 7)
    _, theirs = structural_similarity_index_measure(
        x, y, gaussian_kernel=False, kernel_size=7, data_range=1.0, return_full_image=True
    )
    assert float((ours - theirs)[..., 4:-4, 4:-4].abs().max()) < 1e-6


def test_smoothing_is_in_mm_and_the_median_slice_by_slice() -> None:
    raw, foreground = torch.zeros(9, 31, 31), torch.ones(9, 31, 31, dtype=torch.bool)
    raw[4, 15, 15] = 1.0
    blurred = anomaly_score(
        raw, foreground, Score(erosion=0, median=0, smoothing_mm=2.0), (4.0, 1.0, 1.0)
    )
    assert blurred.sum() == pytest.approx(1.0, abs=0.01)
    assert (
        blurred[4, 15, 17] > 10 * blurred[4, 15, 21] and blurred[4, 15, 17] > 2 * blurred[5, 15, 15]
    )
    raw[4] = 1.0  # one slice among dark ones
    assert anomaly_score(raw, foreground, Score(erosion=0))[4, 15, 15] == 1.0


def test_standard_scaling_ignores_a_lesion_and_is_inverted() -> None:
    rng = np.random.default_rng(0)
    data = np.zeros((2, 30, 30, 30), np.float32)
    data[:, 5:25, 5:25, 5:25] = rng.normal(500, 40, (2, 20, 20, 20))
    lesion = data.copy()
    lesion[0, 6:12, 6:12, 6:16] = 1500
    clean, other = (intensity_scale(one, STANDARD) for one in (data, lesion))
    scaled = clean[0](data[0])
    inside = scaled[data[0] > 0]
    assert np.median(inside) == pytest.approx(LEVEL, abs=1e-3)
    assert np.subtract(*np.percentile(inside, [75, 25])) == pytest.approx(SPREAD, abs=1e-3)
    assert not scaled[data[0] == 0].any() and inside.min() >= FLOOR
    assert np.abs(other[0](data[0]) - scaled).max() < 0.1
    moved = np.abs(
        data[0] / intensity_scale(lesion, Scaling())[0].scale
        - data[0] / intensity_scale(data, Scaling())[0].scale
    )
    assert moved.max() > 0.5  # what the 99th percentile does
    inverse = clean[0].inverse(torch.from_numpy(scaled), torch.from_numpy(data[0] > 0)).numpy()
    assert np.abs(inverse - data[0]).max() < 2
    assert (
        intensity_scale(np.zeros((1, 4, 4, 4), np.float32), STANDARD)[0](
            np.zeros(3, np.float32)
        ).max()
        == 0
    )
    flat = np.full((1, 4, 4, 4), 7, np.float32)
    assert np.isfinite(intensity_scale(flat, STANDARD)[0](flat[0])).all()


def test_the_score_is_chosen_on_healthy_slices_and_says_why(
    model_with_head: Path, cohort: Path
) -> None:
    spec = anomri.load(model_with_head).spec
    assert spec.score.kind in FORMULAS
    assert "held-out cases, no lesion label used" in spec.score.chosen_by
    assert spec.score.chosen_by.count("smoothed") >= 6
    assert spec.thresholds is not None and set(spec.subset_thresholds) == {"flair", "t1"}
    stored = json.loads((model_with_head / "model.json").read_text())
    assert stored["score"]["chosen_by"] == spec.score.chosen_by


def test_planted_spheres_lie_in_the_brain_and_a_fixed_score_stays(
    model_with_head: Path, cohort: Path
) -> None:
    detector = anomri.load(model_with_head)
    stack = slice_volume(
        detector.read(case_of(cohort, "case0")), detector.spec.grid, detector.spec.scaling
    )
    slabs = [*large_spheres([stack], CHANNELS, 4), *small_spheres([stack], CHANNELS, 4)]
    shifts = []
    for slab in slabs:
        before = stack.take(range(slab.slices.start, slab.slices.stop))
        assert slab.where.any() and not (slab.where & ~before.foreground).any()
        change = (slab.stack.x - before.x)[:, 0]
        shifts.append(float(change[slab.where].mean()))
        assert not change[~before.foreground].any()
    assert min(shifts) > 0 and np.mean(shifts) > 0.05
    fixed = detector.with_score(kind="absolute")
    assert choose_score(Passes(fixed), []) == (fixed.spec.score, None)


def test_slabs_stand_for_whole_scans() -> None:
    # All of a ball of 60 mm is found where it is bright: what counts is known without a network.
    places = torch.stack(torch.meshgrid(*[torch.arange(n) for n in (40, 48, 48)], indexing="ij"))
    middle = torch.tensor([20.0, 24.0, 24.0])[:, None, None, None]
    foreground = ((places - middle) * 3).square().sum(0) < 60**2
    x = foreground[:, None] * torch.full((40, 2, 48, 48), 0.6)
    scan = SliceStack(x, foreground, range(40), (), None, Window(0, 0, 48, 48), (3.0, 3.0, 3.0))
    generator = torch.Generator().manual_seed(0)

    def voxels(radii: tuple[float, float], count: int) -> float:
        """Voxels in spheres in a mean scan, planted whole."""
        found = []
        for _ in range(60):
            spheres = []
            for _ in range(count):
                inside = foreground.nonzero()
                centre = inside[int(torch.randint(len(inside), (1,), generator=generator))]
                radius = float(log_between(*radii, (1,), generator))
                z, row, column = centre.tolist()
                spheres.append(Sphere((z, row, column), radius, torch.tensor([0.2, 0.1])))
            found.append(float(plant(scan, spheres)[1].sum()))
        return float(np.mean(found))

    for slabs, radii, count in (
        (large_spheres([scan], CHANNELS, 400), LARGE_RADII_MM, LARGE_IN_A_SCAN),
        (small_spheres([scan], CHANNELS, 100), SMALL_RADII_MM, SMALL_IN_A_SCAN),
    ):
        mean = np.mean([slab.weight * float(slab.where.sum()) for slab in slabs])
        assert mean == pytest.approx(voxels(radii, count), rel=0.2)
        assert all(len(slab.stack.x) <= 6 for slab in slabs)


def test_what_follows_a_training_is_bounded_by_it(
    model_with_head: Path, cohort: Path, cache: Path
) -> None:
    detector = anomri.load(model_with_head)
    assert affordable_passes(replace(detector.spec, training=None)) == math.inf
    training = Training(steps=1000, batch_size=16)
    assert affordable_passes(replace(detector.spec, training=training)) == 0.1 * 5 * 16_000
    held_out = [case for case in find_cases(cohort) if case.split == "val"]
    packed = pack_cohort(held_out, CHANNELS, detector.spec.grid, STANDARD, cache)
    detector.spec = replace(detector.spec, score=Score("auto", flips=True))
    counted: list[tuple[int, int]] = []
    passes = Passes(detector, lambda done, total: counted.append((done, total)), 2000)
    _, evidence = choose_score(passes, packed, packed)
    assert evidence is not None and 0 <= passes.left < 2000
    done, total = counted[-1]
    # Two passes for the mirror images, and what it costs to try the candidates.
    assert done == total and passes.left == 2000 - done * (2 + TRIALS_COST)
    # Even where nothing can be afforded, some slabs are looked at, but no subsets.
    assert choose_score(Passes(detector, affordable=0), packed)[1] is not None
    assert subset_thresholds(Passes(detector, affordable=0), packed) is None


def test_flips_average_the_scan_and_its_mirror_image(model_with_head: Path, cohort: Path) -> None:
    detector = anomri.load(model_with_head)
    stack = slice_volume(
        detector.read(case_of(cohort, "case7")), detector.spec.grid, detector.spec.scaling
    )
    once = detector.with_score(flips=False).output(stack)
    mirrored = replace(stack, x=stack.x.flip(2), foreground=stack.foreground.flip(1))
    other = detector.with_score(flips=False).output(mirrored).flip(2)
    assert torch.allclose(
        detector.with_score(flips=True).output(stack), (once + other) / 2, atol=1e-5
    )
    without_t1 = replace(stack, x=stack.x * torch.tensor([1.0, 0.0])[:, None, None])
    for flips in (False, True):
        output = detector.with_score(flips=flips).output(without_t1)
        assert output[:, 0].any() and output[:, 2].any() and not output[:, 1].any()


def test_an_impossible_score_is_refused_before_the_training(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(AnomriError, match="the score's erosion is 0 or more; found -1"):
        train(cohort, tmp_path / "model", score={"erosion": -1}, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_model_with_channel_dropout_takes_any_subset_of_its_channels(
    model_with_head: Path, model: Path, cohort: Path, tmp_path: Path
) -> None:
    detector, case = anomri.load(model_with_head), case_of(cohort, "case7")
    alone = replace(case, channels={"flair": case.channels["flair"]})
    found = detector.detect(alone)
    assert found.volume.missing == ("t1",) and found.summary()["channels"] == ["flair"]
    assert "the scan has no t1" in found.volume.notes[-1]
    assert found.spec.thresholds is not None
    assert found.spec.thresholds.value == detector.spec.subset_thresholds["flair"].value
    asked = detector.with_channels(["flair"]).detect(case)
    assert np.array_equal(asked.anomaly_map, found.anomaly_map)
    assert asked.spec.thresholds == found.spec.thresholds
    assert not np.array_equal(detector.detect(case).anomaly_map, found.anomaly_map)
    assert len(found.reconstruction) == 1  # of the channels that there are
    found.save(tmp_path)
    with pytest.raises(AnomriError, match="t2 is not a subset of these"):
        detector.with_channels(["t2"])
    with pytest.raises(AnomriError, match="needs all of flair, t1"):
        anomri.load(model).with_channels(["flair"])
    with pytest.raises(AnomriError, match="t1 is missing"):
        anomri.load(model).detect(alone)


def test_the_commands_take_a_score_and_channels(
    model_with_head: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "-i", str(cohort), "-m", str(model_with_head), "-o"]
    assert main([*arguments, str(tmp_path / "paper"), "--score", "paper"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "score absolute" in printed and "threshold: none" in printed
    assert main([*arguments, str(tmp_path / "flair"), "--channels", "flair"]) == 0
    assert "channels flair, score" in " ".join(capsys.readouterr().out.split())
    out = tmp_path / "detected"
    assert (
        main(
            [
                "detect",
                "-i",
                str(cohort / "case7"),
                "-m",
                str(model_with_head),
                "-o",
                str(out),
                "--channels",
                "flair",
            ]
        )
        == 0
    )
    assert json.loads((out / "case7.json").read_text())["channels"] == ["flair"]
    assert main([*arguments, str(tmp_path / "x"), "--channels", "adc"]) == 2


def test_the_average_of_the_weights_is_kept(cohort: Path, cache: Path, tmp_path: Path) -> None:
    common = {"preset": "tiny", "cache": cache, "settings": {"widths": [4, 8, 16, 32]}}
    training = {"steps": 6, "validate_every": 3, "batch_size": 4}
    last = train(cohort, tmp_path / "last", training=training, **common)  # type: ignore[arg-type]
    mean = train(cohort, tmp_path / "mean", training={**training, "average": 0.9}, **common)  # type: ignore[arg-type]
    weights = [one.method.state_dict()["network.head.bias"] for one in (last, mean)]
    assert not torch.equal(*weights)


@pytest.fixture(scope="module")
def fine(cohort: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few steps on a finer working grid; by the command."""
    folder = tmp_path_factory.mktemp("fine") / "model"
    chosen = [
        "--preset",
        "accurate",
        "--steps",
        "6",
        "--batch-size",
        "4",
        "--grid",
        "192",
        "--set",
        "widths=[4,8,16,32]",
    ]
    assert main(["train", "-i", str(cohort), "-o", str(folder), *chosen]) == 0
    return folder


@pytest.mark.slow
def test_a_finer_grid_is_evaluated_on_the_published_one(
    fine: Path, cohort: Path, tmp_path: Path
) -> None:
    """As many pixels count as for a model of the published grid, and the label is the same."""
    detection = anomri.load(fine).detect(case_of(cohort, "case0"))
    assert detection.scores.shape[1:] == (192, 192)
    result = anomri.evaluate(cohort, tmp_path / "result", model=fine)
    stacks = [
        slice_volume(anomri.load(fine).read(case_of(cohort, one.case)), scaling=STANDARD)
        for one in result.patients
    ]
    slices = sum(len(stack.index) for stack in stacks)
    assert result.protocol["voxels"].endswith(f"{slices * 128 * 128:,}")


def test_thresholds_of_channel_subsets_use_all_healthy_slices(
    model_with_head: Path, cohort: Path, cache: Path
) -> None:
    detector = anomri.load(model_with_head)
    whole, part = detector.spec.thresholds, detector.spec.subset_thresholds["flair"]
    assert whole is not None and part.healthy is not None
    assert (part.healthy_slices, part.healthy_cases) == (whole.healthy_slices, whole.healthy_cases)
    scores = []
    for packed in pack_cohort(
        [case for case in find_cases(cohort) if case.split == "val"],
        CHANNELS,
        detector.spec.grid,
        STANDARD,
        cache,
    ):
        stack = packed.stack(STANDARD)
        x = stack.x * torch.tensor([1, 0])[:, None, None]
        seen = replace(stack, x=x, foreground=find_foreground(x, STANDARD))
        healthy = list(packed.healthy)
        scores.append(detector.score(seen)[0][healthy][seen.foreground[healthy].numpy()])
    for rate, value in zip(part.false_positive_rate, part.value, strict=True):
        assert np.mean(np.concatenate(scores) > value) == pytest.approx(rate, rel=0.2, abs=2e-4)


def test_the_threshold_of_a_chosen_score_is_the_best_on_spheres(
    model_with_head: Path, cohort: Path, cache: Path
) -> None:
    detector = anomri.load(model_with_head)
    thresholds, spec = detector.spec.thresholds, detector.spec
    assert (
        thresholds is not None
        and spec.score.chosen_by
        and "Dice of synthetic spheres" in thresholds.chosen_by
    )
    assert thresholds.default_rate <= 0.01 and "+".join(spec.channels) not in spec.subset_thresholds
    held_out = [case for case in find_cases(cohort) if case.split == "val"]
    packed = pack_cohort(held_out, CHANNELS, spec.grid, STANDARD, cache)
    scans = [case.stack(STANDARD).take(case.healthy) for case in packed]
    auto = copy(detector)
    auto.spec = replace(spec, score=replace(spec.score, kind="auto"))
    score, evidence = choose_score(Passes(auto), packed)
    assert evidence is not None
    detector.spec = replace(spec, score=score)
    chosen = healthy_thresholds(Passes(detector), packed, evidence)
    assert chosen is not None
    healthy = [detector.score(scan)[0] for scan in scans]
    spheres = [
        [(slab, detector.score(slab.stack)[0]) for slab in planted.slabs]
        for planted in (evidence.large, evidence.small)
    ]

    def dice_of(scored: list[tuple[Slab, Any]], threshold: float) -> float:
        """Dice of a mean scan with spheres, voxel by voxel."""
        outside = [one > threshold for one in healthy]
        false = np.mean(
            [
                (over & scan.foreground.numpy()).sum()
                for over, scan in zip(outside, scans, strict=True)
            ]
        )
        found = positives = 0.0
        for slab, scores in scored:
            weight, where = slab.weight / len(scored), slab.where.numpy()
            brain = slab.stack.foreground.numpy()
            found += weight * ((scores > threshold) & where).sum()
            positives += weight * where.sum()
            false += weight * ((scores > threshold) & brain & ~where).sum()
            false -= weight * (outside[slab.scan][slab.slices] & brain).sum()
        return float(2 * found / (found + false + positives))

    def goodness(threshold: float) -> float:
        return math.prod(dice_of(scored, threshold) for scored in spheres)

    allowed = [
        value
        for rate, value in zip(chosen.false_positive_rate, chosen.value, strict=True)
        if rate <= 0.01
    ]
    assert goodness(chosen.threshold) >= 0.94 * max(map(goodness, allowed)) > 0


@pytest.mark.slow
def test_a_held_out_scan_without_foreground_does_not_stop_the_choice_of_a_threshold(
    model_with_head: Path, cohort: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = anomri.load(model_with_head)
    held_out = [case for case in find_cases(cohort) if case.split == "val"]
    lacking, other = pack_cohort(held_out, CHANNELS, detector.spec.grid, STANDARD, cache)
    alone = subset_thresholds(Passes(detector), [other], always=True)
    auto = copy(detector)
    auto.spec = replace(detector.spec, score=Score("auto"))
    score_alone, _ = choose_score(Passes(auto), [other])
    stack_of = PackedCase.stack

    def stack(case: PackedCase, scaling: Scaling) -> SliceStack:
        found = stack_of(case, scaling)
        shown = float(case.name != lacking.name)
        return replace(found, x=shown * found.x, foreground=found.foreground & bool(shown))

    monkeypatch.setattr(PackedCase, "stack", stack)
    both = subset_thresholds(Passes(detector), [lacking, other], always=True)
    assert alone is not None and both is not None
    assert both["flair"].threshold == alone["flair"].threshold
    assert both["flair"].chosen_by == alone["flair"].chosen_by != ""
    assert choose_score(Passes(auto), [lacking, other])[0] == score_alone
    assert healthy_thresholds(Passes(detector), [lacking]) is None


def test_a_chosen_sensitivity_holds_for_channel_subsets_too(
    model_with_head: Path, cohort: Path, tmp_path: Path
) -> None:
    detector, case = anomri.load(model_with_head), case_of(cohort, "case7")
    alone = replace(case, channels={"flair": case.channels["flair"]})
    part = detector.spec.subset_thresholds["flair"]
    lowest = detector.with_threshold("lowest")
    assert (
        lowest.detect(alone).threshold
        == part.value[-1]
        == lowest.with_channels(["flair"]).detect(case).threshold
    )
    # What is asked for is what there is for the channels that are looked at; others that have no
    # such rate keep theirs.
    rare = replace(
        part, false_positive_rate=(*part.false_positive_rate[:-1], 7e-5), default_rate=7e-5
    )
    narrow, own = detector.with_channels(["flair"]), "0.007%"
    narrow.spec = replace(
        narrow.spec, subset_thresholds={**narrow.spec.subset_thresholds, "flair": rare}
    )
    assert narrow.with_threshold(own).detect(case).threshold == rare.threshold
    assert (
        narrow.with_threshold(own).with_channels(CHANNELS).detect(case).threshold
        == detector.detect(case).threshold
    )
    low, high = detector.detect(case).display_range
    assert (low, high) == detector.with_threshold("highest").detect(
        case
    ).display_range and high > low
    most = min(one.healthy.false_positive_ml[0] for one in (detector.spec.thresholds, part)) / 4  # type: ignore[union-attr]
    sparing = detector.with_threshold(false_positive_ml=most)
    for found in (sparing.detect(alone), sparing.with_channels(["flair"]).detect(case)):
        summary = found.summary()
        assert (
            summary["voxel_false_positive_rate"] is None
            and 0 <= summary["false_positive_ml"] <= most
        )
        assert summary["threshold"] == sparing.spec.subset_thresholds["flair"].threshold
    # What is looked at may be widened again, and is no part of what is saved.
    narrow = detector.with_channels(["flair"])
    assert narrow.with_channels(CHANNELS).channels == CHANNELS
    narrow.save(tmp_path)
    assert anomri.load(tmp_path).spec == detector.spec
    given = detector.detect(alone, threshold=0.5).summary()
    assert (given["threshold"], given["voxel_false_positive_rate"]) == (0.5, None)


def test_a_volume_must_have_the_channels_of_the_model_and_may_show_fewer(
    model_with_head: Path, cohort: Path
) -> None:
    detector, case = anomri.load(model_with_head), case_of(cohort, "case7")
    with pytest.raises(
        AnomriError, match="the volume's channels are t1, flair, the model's flair, t1"
    ):
        detector.detect(read_volume(case, ["t1", "flair"]))
    narrow, volume = detector.with_channels(["flair"]), read_volume(case, CHANNELS)
    found = narrow.detect(volume)
    assert found.channels == ("flair",) and np.array_equal(
        found.anomaly_map, narrow.detect(case).anomaly_map
    )
    assert volume.inside.all(axis=0).any()  # the scan itself is as it was


@pytest.mark.parametrize(("channels", "counted"), [(("t1",), True), (("flair", "t1"), False)])
def test_dark_lesions_count_where_no_bright_channel_is_seen(
    channels: tuple[str, ...], counted: bool
) -> None:
    x = torch.full((1, len(channels), 40, 40), 0.6)
    healthy = torch.cat([x, torch.ones(1, 1, 40, 40)], 1)
    x[:, :, 15:25, 15:25] = 0.3
    score = raw_score(x, healthy, channels, Score("probability_with_residual"))[0]
    assert bool(score[20, 20] > 2 * score[5, 5]) == counted


def test_a_model_may_name_channels_in_another_common_way(
    model_with_head: Path, cohort: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_with_head, tmp_path / "m")
    text = (model_with_head / "model.json").read_text()
    (tmp_path / "m" / "model.json").write_text(text.replace('"t1"', '"t1w"'))
    old, new = anomri.load(tmp_path / "m"), anomri.load(model_with_head)
    assert old.spec == new.spec
    assert old.with_channels(["T1w"]).channels == ("t1",) == parse_channels("T1w")


def test_channel_subsets_without_a_threshold_have_no_mask(
    model_with_head: Path, cohort: Path, tmp_path: Path
) -> None:
    """As of models that an earlier anomri trained, or of many channels."""
    detector, case = anomri.load(model_with_head), case_of(cohort, "case7")
    alone = replace(case, channels={"flair": case.channels["flair"]})
    parts = {
        name: replace(one, healthy=None) for name, one in detector.spec.subset_thresholds.items()
    }
    detector.spec = replace(detector.spec, subset_thresholds=parts)
    found = detector.with_threshold(false_positive_ml=0).detect(alone)
    assert found.mask is None and found.threshold is None
    detector.spec = replace(detector.spec, subset_thresholds={})
    assert (
        "it has no threshold for that, so there is no mask"
        in detector.detect(alone).volume.notes[-1]
    )
    evaluation = anomri.evaluate([alone, case_of(cohort, "case8")], tmp_path, model=detector)
    assert [row.dice is None for row in evaluation.patients] == [True, False]
    assert evaluation.protocol["threshold"].endswith(
        "for 1 that lack channels, the one for the channels they have, if there is one"
    )
