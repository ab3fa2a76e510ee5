"""Which score to take, without a label: the one that finds synthetic anomalies in held-out healthy slices.

The anomalies are not those of a training (`anomalies.plant_anomalies`): smooth balls in three dimensions, of one
brightness each and without texture, so that a network that knows its own blobs by heart has no advantage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Generator, Tensor

from anomri.anomalies import log_between, typical_shifts
from anomri.detector import Detector
from anomri.metrics import precision_recall
from anomri.packing import PackedCase, spread_healthy
from anomri.residual import anomaly_score, describe, score_of
from anomri.slices import SliceStack
from anomri.spec import ModelSpec, Score

MAX_CASES = 8
SEED = 2022
BALLS = 3
RADIUS_MM = (4.0, 35.0)
BRIGHT = ("flair", "t2")
"""Channels on which most lesions are bright."""
SMOOTHING_MM = 1.7


def candidates(spec: ModelSpec, marks: bool) -> list[Score]:
    """The scores that are tried for a model: the paper's, signed ones, and with marks those."""
    bright = tuple(name for name in BRIGHT if name in spec.channels)
    scores = [replace(spec.score, kind=kind) for kind in ("absolute", "positive", "standardised", "ssim")]
    scores += [replace(spec.score, kind="positive", channels=(name,)) for name in bright]
    if len(bright) > 1:
        scores.append(replace(spec.score, kind="positive", channels=bright))
    if marks:
        scores += [replace(spec.score, kind="mark"), replace(spec.score, kind="mark_positive", channels=bright)]
    return [*scores, *(replace(score, smoothing_mm=SMOOTHING_MM) for score in scores)]


def choose_score(detector: Detector, held_out: Sequence[PackedCase]) -> Score:
    """The score of a model: its own unless its kind is ``auto``, else the best of `candidates` on healthy slices.

    Its ``chosen_by`` says how each did. The healthy residual's mean and spread are filled in where they are needed.
    """
    spec = detector.spec
    if spec.score.kind not in ("auto", "standardised"):
        return spec.score
    healthy = [case.stack(spec.scaling).take(case.healthy) for case in spread_healthy(held_out, MAX_CASES)]
    mean, spread = _residual_statistics(detector, healthy)
    base = replace(spec.score, healthy_mean=mean, healthy_spread=spread)
    if spec.score.kind == "standardised":
        return base
    generator = Generator().manual_seed(SEED)
    planted = [plant_balls(stack, spec.channels, generator) for stack in healthy]
    outputs = [detector.output(stack) for stack, _ in planted]
    marks = outputs[0].shape[1] > len(spec.channels)
    found = {}
    for score in candidates(replace(spec, score=base), marks):
        maps = [
            anomaly_score(score_of(stack.x, output, spec.channels, score), stack.foreground, score, stack.spacing_mm)
            for (stack, _), output in zip(planted, outputs, strict=True)
        ]
        truth = [where.numpy() for _, where in planted]
        inside = [stack.foreground.numpy() for stack, _ in planted]
        curve = precision_recall(
            np.concatenate([one[there] for one, there in zip(maps, inside, strict=True)]),
            np.concatenate([one[there] for one, there in zip(truth, inside, strict=True)]),
        )
        found[score] = curve.average_precision
    best = max(found, key=lambda score: found[score])
    table = ", ".join(f"{describe(score)} {value:.3f}" for score, value in sorted(found.items(), key=lambda x: -x[1]))
    slices = sum(len(stack.x) for stack in healthy)
    why = (
        f"highest average precision on synthetic balls in {slices} healthy slices of {len(healthy)} held-out cases, "
        f"no lesion label used: {table}"
    )
    if best.kind != "standardised":
        best = replace(best, healthy_mean=(), healthy_spread=())
    return replace(best, chosen_by=why)


def plant_balls(stack: SliceStack, channels: Sequence[str], generator: Generator) -> tuple[SliceStack, Tensor]:
    """Shift the brightness in a few smooth balls of a scan; returns the scan and where it changed (n, h, w) bool."""
    x, inside = stack.x, stack.foreground
    where = torch.zeros_like(inside)
    axes = [torch.arange(size) * mm for size, mm in zip(inside.shape, stack.spacing_mm, strict=True)]
    places = torch.nonzero(inside)
    for _ in range(BALLS):
        centre = places[torch.randint(len(places), (1,), generator=generator)[0]]
        radius = float(log_between(*RADIUS_MM, (1,), generator))
        offsets = [axis - float(centre[k]) * stack.spacing_mm[k] for k, axis in enumerate(axes)]
        away = sum(offset.square().reshape([-1 if k == j else 1 for j in range(3)]) for k, offset in enumerate(offsets))
        blob = torch.sigmoid((radius - torch.as_tensor(away).sqrt()) / 2) * inside
        shift = typical_shifts(1, channels, generator, typical=1.0)
        # A channel that the scan does not cover stays empty.
        x = torch.where(x > 0, (x + blob[:, None] * shift[..., None, None]).clamp_min(0.01), x)
        where = where | (blob > 0.5)
    return replace(stack, x=x), where


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
