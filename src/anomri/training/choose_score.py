"""The choice of a score without labels: how well it finds `spheres` in healthy slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from anomri.model.detector import Detector
from anomri.scoring.filters import anomaly_score
from anomri.scoring.metrics import precision_recall
from anomri.scoring.positions import pack_maps, statistics_by_position
from anomri.scoring.registry import SCORES, AutoChannels, find
from anomri.scoring.scores import BRIGHT, describe, raw_score
from anomri.slices import SliceStack
from anomri.spec import ModelSpec, Score
from anomri.training.packing import PackedCase, spread_healthy
from anomri.training.spheres import LARGE, MAX_SCANS, SMALL, Spheres, planted

MAX_TRAINING_CASES = 8
"""Used beside the held-out ones for how residuals differ from one part of the brain to another."""
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
    detector: Detector,
    held_out: Sequence[PackedCase],
    training: Sequence[PackedCase] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """The score of a model: its own unless its kind is ``auto``, else the best of `candidates`.

    The mean and spread of healthy residuals are filled in if the score needs them. Since held-out
    cases are few, how residuals differ over the brain is measured on ``training`` cases too.
    ``chosen_by`` of the result says how each candidate did. ``on_progress`` gets how many scans
    went through the network, and of how many.
    """
    spec = detector.spec
    kind, auto = find(spec.score.kind), spec.score.kind == "auto"
    if not auto and not kind.needs_healthy_slices:
        return spec.score
    held_out = spread_healthy(held_out, MAX_SCANS)
    training = spread_healthy(training, MAX_TRAINING_CASES)
    head = detector.method.segmentation_head
    by_position = kind.needs_healthy_maps or (auto and head)
    output = _CountedOutput(detector, on_progress)
    output.total = len(held_out)
    if by_position:
        output.total += len(held_out) + len(training)
    if auto:
        output.total += len(held_out) * (2 if spec.score.median else 1)

    healthy = [case.stack(spec.scaling).take(case.healthy) for case in held_out]
    mean, spread = _residual_statistics(output, healthy)
    maps = _maps_by_position(output, [*held_out, *training], mean) if by_position else ""
    score = replace(spec.score, healthy_mean=mean, healthy_spread=spread, healthy_maps=maps)
    if not auto:
        return score
    best = _best_candidate(replace(spec, score=score), head, output, healthy)
    if not find(best.kind).needs_healthy_residual:
        best = replace(best, healthy_mean=(), healthy_spread=())
    if not find(best.kind).needs_healthy_maps:
        best = replace(best, healthy_maps="")
    return best


def _best_candidate(
    spec: ModelSpec, head: bool, output: _CountedOutput, healthy: Sequence[SliceStack]
) -> Score:
    """The best of `candidates` on large spheres, then of `FILTERS` on large and small ones."""
    large = _Planted.plant(output, healthy, LARGE)
    found = {score: large.average_precision(score) for score in candidates(spec, head)}
    best = max(found, key=lambda score: found[score])
    slices = sum(len(stack.x) for stack in healthy)
    why = (
        f"highest average precision on synthetic spheres in {slices} healthy slices of "
        f"{len(healthy)} held-out cases, no lesion label used: "
        f"{_ranking({describe(score): value for score, value in found.items()})}"
    )
    if spec.score.median:
        small = _Planted.plant(output, healthy, SMALL)
        both = {}
        for median, smoothing in FILTERS:
            score = replace(best, median=median, smoothing_mm=smoothing)
            on_large = found[score] if score in found else large.average_precision(score)
            both[score] = math.sqrt(on_large * small.average_precision(score))
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


class _CountedOutput:
    """`Detector.output`, which reports how many scans have gone through the network."""

    def __init__(self, detector: Detector, on_progress: Callable[[int, int], None]) -> None:
        self.detector = detector
        self.total = 0
        self._done = 0
        self._on_progress = on_progress

    def __call__(self, stack: SliceStack) -> Tensor:
        self._on_progress(self._done, self.total)
        found = self.detector.output(stack)
        self._done += 1
        self._on_progress(self._done, self.total)
        return found


@dataclass(frozen=True)
class _Planted:
    """Scans with spheres, where these are, and what the method made of the scans."""

    spec: ModelSpec
    stacks: list[SliceStack]
    truth: list[Tensor]
    outputs: list[Tensor]
    raw: dict[tuple[str, tuple[str, ...]], list[Tensor]] = field(default_factory=dict)
    """Scores before filters, by kind and channels: many candidates differ in filters only."""

    @classmethod
    def plant(
        cls, output: _CountedOutput, healthy: Sequence[SliceStack], spheres: Spheres
    ) -> _Planted:
        spec = output.detector.spec
        pairs = list(planted(healthy, spec.channels, spheres))
        stacks, truth = [stack for stack, _ in pairs], [where for _, where in pairs]
        return cls(spec, stacks, truth, [output(stack) for stack in stacks])

    def average_precision(self, score: Score) -> float:
        """Average precision of a score over the foreground of all scans."""
        scores, labels = [], []
        for stack, where, raw in zip(self.stacks, self.truth, self._raw(score), strict=True):
            inside = stack.foreground.numpy()
            scores.append(anomaly_score(raw, stack.foreground, score, stack.spacing_mm)[inside])
            labels.append(where.numpy()[inside])
        return precision_recall(np.concatenate(scores), np.concatenate(labels)).average_precision

    def _raw(self, score: Score) -> list[Tensor]:
        key = score.kind, score.channels
        if key not in self.raw:
            self.raw[key] = [
                raw_score(stack.x, output, self.spec.channels, score, stack.position)
                for stack, output in zip(self.stacks, self.outputs, strict=True)
            ]
        return self.raw[key]


def _residual_statistics(
    output: _CountedOutput, stacks: Sequence[SliceStack]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel's absolute residual in healthy foreground."""
    residuals = []
    for stack in stacks:
        residual = (stack.x - output(stack)[:, : stack.x.shape[1]]).abs().movedim(1, -1)
        residuals.append(residual[stack.foreground])
    pooled = torch.cat(residuals).double()
    return tuple(pooled.mean(0).tolist()), tuple(pooled.std(0).clamp_min(1e-6).tolist())


def _maps_by_position(
    output: _CountedOutput, cases: Sequence[PackedCase], mean: Sequence[float]
) -> str:
    """`positions.statistics_by_position` of the absolute residual, packed.

    Their level is that of the held-out scans, ``mean``.
    """

    def residuals() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for case in cases:
            stack = case.stack(output.detector.spec.scaling)
            counted = torch.zeros(len(stack.x), dtype=torch.bool)
            counted[list(case.healthy)] = True
            residual = (stack.x - output(stack)[:, : stack.x.shape[1]]).abs()
            yield residual, stack.foreground, counted

    by_cell, spread = statistics_by_position(residuals())
    # Residuals of slices that were trained on are smaller.
    level = (torch.tensor(mean) / by_cell.mean((1, 2, 3)).clamp_min(1e-6))[:, None, None, None]
    return pack_maps(by_cell * level, spread * level)
