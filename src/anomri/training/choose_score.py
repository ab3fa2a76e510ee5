"""The choice of a score without labels: how well it finds `spheres` in healthy slices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from anomri.scoring.positions import pack_maps, statistics_by_position
from anomri.scoring.registry import SCORES, AutoChannels, find
from anomri.scoring.scores import BRIGHT, describe
from anomri.slices import SliceStack
from anomri.spec import ModelSpec, Score
from anomri.training.evidence import Evidence, Planted, Seen, plant_slabs
from anomri.training.packing import PackedCase, spread_healthy
from anomri.training.passes import Passes, SlabCounts, cases_within, every_nth, slab_heights
from anomri.training.spheres import MAX_SCANS, Slab

MAX_TRAINING_CASES = 8
"""Used beside the held-out ones for how residuals differ from one part of the brain to another."""
MAX_TRAINING_SLICES = 32
"""Of each of them, at even distances: cells of the brain are larger than a slice."""
SLABS = SlabCounts(96, 48)
"""Slabs with spheres. Another planting moves the threshold by a fifteenth (docs/notes)."""
TRIALS_COST = 1.5
"""What it costs to try all candidates on a slice, in passes of a narrow network."""
STEPS = 501
"""Thresholds of the curves that candidates are compared by."""
SMOOTHING_MM = 1.7
"""Each candidate is tried without smoothing and with a Gaussian of this standard deviation."""
FILTERS = ((5, 1.7), (5, 0.0), (3, 1.7), (3, 1.0), (3, 0.0), (0, 1.7), (0, 1.3))
"""Medians (pixels; 0: none) and smoothings (mm), tried on small and on large spheres."""


def candidates(spec: ModelSpec, segmentation_head: bool) -> list[Score]:
    """The scores that ``auto`` tries, as `SCORES` says, each with and without smoothing."""
    bright = tuple(name for name in BRIGHT if name in spec.channels)
    looks: list[tuple[AutoChannels, tuple[str, ...]]] = [
        ("all", spec.score.channels),
        *(("each bright", (name,)) for name in bright),
        ("bright", bright),
    ]
    scores = [
        replace(spec.score, kind=name, channels=channels)
        for look, channels in looks
        for name, kind in SCORES.items()
        if look in kind.auto and (segmentation_head or not kind.needs_segmentation_head)
    ]
    # With one bright channel, or none, some of them are the same.
    scores = list(dict.fromkeys(scores))
    return [*scores, *(replace(score, smoothing_mm=SMOOTHING_MM) for score in scores)]


def choose_score(
    passes: Passes, held_out: Sequence[PackedCase], training: Sequence[PackedCase] = ()
) -> tuple[Score, Evidence | None]:
    """The score of a model: its own unless its kind is ``auto``, else the best of `candidates`.

    The mean and spread of healthy residuals are filled in if the score needs them. Since held-out
    cases are few, how residuals differ over the brain is measured on ``training`` cases too.
    ``chosen_by`` of the result says how each candidate did. What they were tried on comes with it.
    """
    spec, head = passes.detector.spec, passes.detector.method.segmentation_head
    kind, auto = find(spec.score.kind), spec.score.kind == "auto"
    if not auto and not kind.needs_healthy_slices:
        return spec.score, None
    passes.cost += TRIALS_COST if auto else 0
    affordable = passes.affordable_slices
    by_position = kind.needs_healthy_maps or (auto and head)
    taken = [
        (case, case.stack(spec.scaling).take(case.healthy))
        for case in cases_within(held_out, MAX_SCANS, affordable / 3)
    ]
    # A scan may show none of the channels.
    taken = [(case, scan) for case, scan in taken if scan.foreground.any()]
    held_out, scans = [case for case, _ in taken], [scan for _, scan in taken]
    others = _training_slices(training, affordable / 8) if by_position else []
    looked_at = sum(len(scan.x) for scan in scans) + sum(len(some) for _, some in others)
    large: list[Slab] = []
    small: list[Slab] = []
    if auto:
        counts = SLABS.within(affordable - looked_at, *slab_heights(held_out))
        large, small = plant_slabs(scans, spec.channels, counts)
    passes.expect(looked_at + sum(len(slab.stack.x) for slab in (*large, *small)))

    healthy = Seen.look(passes, scans)
    mean, spread = _residual_statistics(healthy)
    score = replace(spec.score, healthy_mean=mean, healthy_spread=spread)
    if by_position:
        maps = _maps_by_position(passes, held_out, healthy, others, mean)
        score = replace(score, healthy_maps=maps)
    if not large:
        return score, None
    evidence = Evidence(
        replace(spec, score=score),
        healthy,
        Planted.look(passes, large),
        Planted.look(passes, small),
    )
    best = _best_candidate(evidence, head)
    if not find(best.kind).needs_healthy_residual:
        best = replace(best, healthy_mean=(), healthy_spread=())
    if not find(best.kind).needs_healthy_maps:
        best = replace(best, healthy_maps="")
    return best, evidence


def _best_candidate(evidence: Evidence, segmentation_head: bool) -> Score:
    """The best of `candidates` on large spheres, then of `FILTERS` on large and small ones."""
    large, small = evidence.large, evidence.small
    found = {
        score: evidence.average_precision(score, large, STEPS)
        for score in candidates(evidence.spec, segmentation_head)
    }
    best = max(found, key=lambda score: found[score])
    scans = evidence.healthy.stacks
    why = (
        f"highest average precision on synthetic spheres in {sum(len(scan.x) for scan in scans)} "
        f"healthy slices of {len(scans)} held-out cases, no lesion label used: "
        f"{_ranking({describe(score): value for score, value in found.items()})}"
    )
    if evidence.spec.score.median:
        both = {}
        for median, smoothing in FILTERS:
            score = replace(best, median=median, smoothing_mm=smoothing)
            if score not in found:
                found[score] = evidence.average_precision(score, large, STEPS)
            both[score] = math.sqrt(found[score] * evidence.average_precision(score, small, STEPS))
        best = max(both, key=lambda score: both[score])
        names = {
            f"median {score.median}, smoothed {score.smoothing_mm:g} mm": value
            for score, value in both.items()
        }
        why += (
            f"; then the filters, geometric mean of that and the same on spheres of 2 to 6 mm: "
            f"{_ranking(names)}"
        )
    return replace(best, chosen_by=why)


def _ranking(found: Mapping[str, float]) -> str:
    falling = sorted(found.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value:.3f}" for name, value in falling)


def _absolute_residual(stack: SliceStack, output: Tensor) -> Tensor:
    return (stack.x - output[:, : stack.x.shape[1]]).abs()


def _residual_statistics(healthy: Seen) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel's absolute residual in healthy foreground."""
    residuals = [
        _absolute_residual(stack, output).movedim(1, -1)[stack.foreground]
        for stack, output in zip(healthy.stacks, healthy.outputs, strict=True)
    ]
    pooled = torch.cat(residuals).double()
    return tuple(pooled.mean(0).tolist()), tuple(pooled.std(0).clamp_min(1e-6).tolist())


def _training_slices(
    cases: Sequence[PackedCase], most: float
) -> list[tuple[PackedCase, list[int]]]:
    """Healthy slices of some training cases, at even distances; ``most`` in all."""
    chosen = spread_healthy(cases, MAX_TRAINING_CASES)
    each = min(most / max(len(chosen), 1), MAX_TRAINING_SLICES)
    return [(case, every_nth(case.healthy, each)) for case in chosen]


def _maps_by_position(
    passes: Passes,
    held_out: Sequence[PackedCase],
    healthy: Seen,
    training: Sequence[tuple[PackedCase, list[int]]],
    mean: Sequence[float],
) -> str:
    """`positions.statistics_by_position` of the absolute residual, packed.

    Their level is that of the held-out scans, ``mean``.
    """
    scaling = passes.detector.spec.scaling

    def residuals() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for case, stack, output in zip(held_out, healthy.stacks, healthy.outputs, strict=True):
            yield (
                _absolute_residual(stack, output),
                case.stack(scaling).foreground,
                _counted(case, case.healthy),
            )
        for case, numbers in training:
            whole = case.stack(scaling)
            stack = whole.take(numbers)
            residual = _absolute_residual(stack, passes.output(stack))
            yield residual, whole.foreground, _counted(case, numbers)

    by_cell, spread = statistics_by_position(residuals())
    # Residuals of slices that were trained on are smaller.
    level = (torch.tensor(mean) / by_cell.mean((1, 2, 3)).clamp_min(1e-6))[:, None, None, None]
    return pack_maps(by_cell * level, spread * level)


def _counted(case: PackedCase, numbers: Sequence[int]) -> Tensor:
    """Which slices of a case are among ``numbers``, (n,) bool."""
    counted = torch.zeros(case.slices, dtype=torch.bool)
    counted[list(numbers)] = True
    return counted
