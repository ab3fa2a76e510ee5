"""Which score to take, without a label: the one that finds synthetic anomalies (`spheres`) in held-out healthy slices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from anomri.model.detector import Detector
from anomri.scoring.metrics import precision_recall
from anomri.scoring.positions import packed_maps, statistics_by_position
from anomri.scoring.registry import SCORES, AutoChannels, find
from anomri.scoring.scores import BRIGHT, anomaly_score, describe, score_of
from anomri.slices import SliceStack
from anomri.spec import ModelSpec, Score
from anomri.training.packing import PackedCase, spread_healthy
from anomri.training.spheres import LARGE, MAX_SCANS, SMALL, Spheres, planted

MAX_TRAINING_CASES = 8
"""Beside the held-out ones, to tell how residuals differ from one part of the brain to another."""
SMOOTHING_MM = 1.7
FILTERS = ((5, 1.7), (5, 0.0), (3, 1.7), (3, 1.0), (3, 0.0), (0, 1.7), (0, 1.3))
"""Medians (pixels; 0: none) and smoothings (mm) between which small anomalies decide as much as large ones."""


def candidates(spec: ModelSpec, segmentation_head: bool) -> list[Score]:
    """The scores that are tried for a model, as the table of scores says, each with and without smoothing."""
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
    detector: Detector, held_out: Sequence[PackedCase], training: Sequence[PackedCase] = ()
) -> Score:
    """The score of a model: its own unless its kind is ``auto``, else the best of `candidates` on healthy slices.

    Its ``chosen_by`` says how each did. The healthy residual's mean and spread are filled in where they are needed;
    how they differ over the brain is seen on ``training`` cases too, since held-out ones are few.
    """
    spec = detector.spec
    kind, auto = find(spec.score.kind), spec.score.kind == "auto"
    if not auto and not kind.needs_healthy_slices:
        return spec.score
    healthy = [
        case.stack(spec.scaling).take(case.healthy) for case in spread_healthy(held_out, MAX_SCANS)
    ]
    mean, spread = _residual_statistics(detector, healthy)
    head, maps = detector.method.segmentation_head, ""
    if kind.needs_healthy_maps or (auto and head):
        seen = [*spread_healthy(held_out, MAX_SCANS), *spread_healthy(training, MAX_TRAINING_CASES)]
        maps = _maps_by_position(detector, seen, mean)
    base = replace(spec.score, healthy_mean=mean, healthy_spread=spread, healthy_maps=maps)
    if not auto:
        return base
    large = _Planted.of(detector, healthy, LARGE)
    found = {
        score: large.found_by(score, spec) for score in candidates(replace(spec, score=base), head)
    }
    best = max(found, key=lambda score: found[score])
    slices = sum(len(stack.x) for stack in healthy)
    why = (
        f"highest average precision on synthetic spheres in {slices} healthy slices of {len(healthy)} held-out cases, "
        f"no lesion label used: {_ranked({describe(score): value for score, value in found.items()})}"
    )
    if base.median:
        small = _Planted.of(detector, healthy, SMALL)
        filters = [
            replace(best, median=median, smoothing_mm=smoothing) for median, smoothing in FILTERS
        ]
        found |= {score: large.found_by(score, spec) for score in filters if score not in found}
        both = {score: math.sqrt(found[score] * small.found_by(score, spec)) for score in filters}
        best = max(both, key=lambda score: both[score])
        names = {
            f"median {score.median}, smoothed {score.smoothing_mm:g} mm": value
            for score, value in both.items()
        }
        why += f"; then the filters, geometric mean of that and the same on spheres of 2 to 6 mm: {_ranked(names)}"
    if not find(best.kind).needs_healthy_residual:
        best = replace(best, healthy_mean=(), healthy_spread=())
    if not find(best.kind).needs_healthy_maps:
        best = replace(best, healthy_maps="")
    return replace(best, chosen_by=why)


def _ranked(found: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.3f}" for name, value in sorted(found.items(), key=lambda one: -one[1])
    )


@dataclass(frozen=True)
class _Planted:
    """Scans with spheres, where they are, and what a method made of the scans."""

    stacks: list[SliceStack]
    truth: list[Tensor]
    outputs: list[Tensor]
    raw: dict[tuple[str, tuple[str, ...]], list[Tensor]] = field(default_factory=dict)
    """Scores before their filters, by kind and channels: filters are many, and do not change them."""

    @classmethod
    def of(cls, detector: Detector, healthy: Sequence[SliceStack], spheres: Spheres) -> _Planted:
        stacks, truth = map(
            list, zip(*planted(healthy, detector.spec.channels, spheres), strict=True)
        )
        return cls(stacks, truth, [detector.output(stack) for stack in stacks])

    def found_by(self, score: Score, spec: ModelSpec) -> float:
        """Average precision of a score over the foreground of all scans."""
        scores, labels = [], []
        key = score.kind, score.channels
        if key not in self.raw:
            pairs = zip(self.stacks, self.outputs, strict=True)
            self.raw[key] = [
                score_of(stack.x, output, spec.channels, score, stack.position)
                for stack, output in pairs
            ]
        for stack, where, raw in zip(self.stacks, self.truth, self.raw[key], strict=True):
            inside = stack.foreground.numpy()
            scores.append(anomaly_score(raw, stack.foreground, score, stack.spacing_mm)[inside])
            labels.append(where.numpy()[inside])
        return precision_recall(np.concatenate(scores), np.concatenate(labels)).average_precision


def _residual_statistics(
    detector: Detector, stacks: Sequence[SliceStack]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the absolute residual of each channel in the foreground of healthy scans."""
    c = len(detector.spec.channels)
    residuals = []
    for stack in stacks:
        residual = (stack.x - detector.output(stack)[:, :c]).abs().movedim(1, -1)
        residuals.append(residual[stack.foreground])
    pooled = torch.cat(residuals).double()
    return tuple(pooled.mean(0).tolist()), tuple(pooled.std(0).clamp_min(1e-6).tolist())


def _maps_by_position(
    detector: Detector, cases: Sequence[PackedCase], mean: Sequence[float]
) -> str:
    """`positions.statistics_by_position` of the absolute residual, its level that of the held-out scans, ``mean``."""
    c = len(detector.spec.channels)

    def residuals() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for case in cases:
            stack = case.stack(detector.spec.scaling)
            counted = torch.zeros(len(stack.x), dtype=torch.bool)
            counted[list(case.healthy)] = True
            yield (stack.x - detector.output(stack)[:, :c]).abs(), stack.foreground, counted

    by_cell, spread = statistics_by_position(residuals())
    # Residuals of slices that were trained on are smaller.
    level = (torch.tensor(mean) / by_cell.mean((1, 2, 3)).clamp_min(1e-6))[:, None, None, None]
    return packed_maps(by_cell * level, spread * level)
