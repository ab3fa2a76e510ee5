"""Thresholds without labels: scores that healthy tissue of held-out patients rarely exceeds.

The default of a score that was chosen on synthetic spheres is chosen on them too. It then also
depends on what stands out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from anomri.model.detector import Detector
from anomri.scoring.metrics import drop_small_components, precision_recall_from_sorted
from anomri.scoring.registry import DEFAULT_RATE, find
from anomri.slices import SliceStack, brain_box, find_foreground
from anomri.spec import HealthyScores, Thresholds
from anomri.training.packing import PackedCase, spread_healthy
from anomri.training.spheres import LARGE, MAX_SCANS, SMALL, Spheres, planted

FALSE_POSITIVE_RATES = (0.05, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001)
"""Shares of healthy voxels whose thresholds every model stores."""
MAX_CASES = 64
"""More held-out cases do not move the quantiles. All scores are in memory (5 MB a case)."""
TABLE_RATES = np.geomspace(0.1, 1e-5, 32)
"""Voxel rates whose scores are the steps of the table of volumes, each a quarter below the last."""
BINS = 64
"""Bins of the histogram of healthy scores."""
STEPS = 2001
"""Thresholds that are tried on spheres: so many quantiles of the scores of their voxels."""
PLANTED, SUBSET_PLANTED = 48, 12
"""Planted scans, several of each of `MAX_SCANS` cases, for all channels and for each subset.

With 9, another planting moves the threshold by a fifth. There are 2^n subsets, so fewer for each.
"""
MAX_SUBSET_CASES, MAX_SUBSET_CHANNELS = 8, 5
"""Limits for the thresholds of subsets of the channels."""


@dataclass(frozen=True)
class _Healthy:
    """Scores (n, h, w) of one case, cut to its brain and zero on slices that are not healthy."""

    scores: NDArray[np.float32]
    counted: NDArray[np.bool_]
    """The healthy foreground voxels."""
    ml_per_pixel: float
    """Volume of a pixel, divided by the share of the scan's slices that are healthy."""
    max_dropped: int
    """The largest component of a mask that is dropped, in pixels."""

    def false_positive_ml(self, threshold: float) -> float:
        """The volume above a threshold."""
        mask = drop_small_components(self.scores > threshold, self.max_dropped)
        return float(mask.sum() * self.ml_per_pixel)


@dataclass(frozen=True)
class _Default:
    """The threshold that a training chose: the rate that exceeds it, its score, and why."""

    rate: float
    threshold: float
    reason: str = ""


class _Scorer:
    """`Detector.score`, which reports how many scans of ``total`` have gone through the network."""

    def __init__(
        self, detector: Detector, total: int, on_progress: Callable[[int, int], None]
    ) -> None:
        self.detector = detector
        self._total = total
        self._done = 0
        self._on_progress = on_progress
        on_progress(0, total)

    def __call__(self, stack: SliceStack) -> NDArray[np.float32]:
        scores, _ = self.detector.score(stack)
        self._done += 1
        self._on_progress(self._done, self._total)
        return scores


def healthy_thresholds(
    detector: Detector,
    held_out: Sequence[PackedCase],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Thresholds | None:
    """Thresholds by the scores of the healthy foreground voxels of all ``held_out`` cases.

    ``None`` if there is no such voxel. ``on_progress`` gets how many scans went through the
    network, and of how many.
    """
    cases = spread_healthy(held_out, MAX_CASES)
    scorer = _Scorer(detector, len(cases) + _planted_scans(detector, PLANTED), on_progress)
    return _thresholds(scorer, cases, detector.spec.channels, PLANTED)


def subset_thresholds(
    detector: Detector,
    held_out: Sequence[PackedCase],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Thresholds]:
    """The same for every subset of the model's channels, named as ``flair+t2``.

    Empty if the method takes no subsets, or has more than `MAX_SUBSET_CHANNELS` channels.
    """
    channels = detector.spec.channels
    if not detector.takes_subsets or len(channels) > MAX_SUBSET_CHANNELS:
        return {}
    cases = spread_healthy(held_out, MAX_SUBSET_CASES)
    subsets = [names for size in range(1, len(channels)) for names in combinations(channels, size)]
    scans = len(cases) + _planted_scans(detector, SUBSET_PLANTED)
    scorer = _Scorer(detector, len(subsets) * scans, on_progress)
    found = {names: _thresholds(scorer, cases, names, SUBSET_PLANTED) for names in subsets}
    return {"+".join(names): one for names, one in found.items() if one is not None}


def _planted_scans(detector: Detector, count: int) -> int:
    return 2 * count if detector.spec.score.chosen_by else 0


def _thresholds(
    scorer: _Scorer, cases: Sequence[PackedCase], channels: Sequence[str], planted_scans: int
) -> Thresholds | None:
    scored = [_score(scorer, case, channels) for case in cases]
    if not any(one.counted.any() for one in scored):
        return None
    pooled = np.sort(np.concatenate([one.scores[one.counted] for one in scored]))
    quantiles = np.quantile(pooled, [1 - rate for rate in FALSE_POSITIVE_RATES])
    table = dict(zip(FALSE_POSITIVE_RATES, map(float, quantiles), strict=True))
    default = _default(scorer, cases, channels, planted_scans, pooled, table)
    table[default.rate] = default.threshold
    rates = sorted(table, reverse=True)
    return Thresholds(
        false_positive_rate=tuple(rates),
        value=tuple(table[rate] for rate in rates),
        default_rate=default.rate,
        chosen_by=default.reason,
        healthy_slices=sum(len(case.healthy) for case in cases),
        healthy_cases=len(cases),
        healthy=_describe(scored, pooled),
    )


def _default(
    scorer: _Scorer,
    cases: Sequence[PackedCase],
    channels: Sequence[str],
    planted_scans: int,
    pooled: NDArray[np.float32],
    table: Mapping[float, float],
) -> _Default:
    """The score's own rate or, if the score was chosen on spheres, what is best on them.

    At most `DEFAULT_RATE` of the healthy voxels exceed the latter: where little is found, as on T1
    alone, the mask with the best Dice takes in much healthy tissue.
    """
    score = scorer.detector.spec.score
    best = _best_on_spheres(scorer, cases, channels, planted_scans) if score.chosen_by else None
    if best is None:
        rate = find(score.kind).false_positive_rate
        return _Default(rate, table[rate])
    threshold, reason = best
    rate = float((pooled > threshold).mean())
    if rate <= DEFAULT_RATE:
        return _Default(rate, threshold, reason)
    reason = f"{reason}; raised to what {DEFAULT_RATE:.0%} of healthy voxels exceed"
    return _Default(DEFAULT_RATE, table[DEFAULT_RATE], reason)


def _best_on_spheres(
    scorer: _Scorer, cases: Sequence[PackedCase], channels: Sequence[str], planted_scans: int
) -> tuple[float, str] | None:
    """The threshold with the highest geometric mean of the Dice of large and of small spheres.

    It comes with the reason in words; ``None`` if no case shows one of the channels on its healthy
    slices.
    """
    healthy = [
        _show(scorer.detector, case, channels).take(case.healthy)
        for case in spread_healthy(cases, MAX_SCANS)
    ]
    healthy = [stack for stack in healthy if stack.foreground.any()]
    if not healthy:
        return None
    stacks = (healthy * math.ceil(planted_scans / len(healthy)))[:planted_scans]
    on_large, on_small = (_score_spheres(scorer, stacks, spheres) for spheres in (LARGE, SMALL))
    in_spheres = np.concatenate([on_large[0], on_small[0]])
    steps = np.unique(np.quantile(in_spheres, np.linspace(0, 1, STEPS)))
    large = precision_recall_from_sorted(*on_large, steps).dice[::-1]
    small = precision_recall_from_sorted(*on_small, steps).dice[::-1]
    best = int(np.argmax(large * small))
    # A mask is what lies above its threshold, and a voxel at the step belongs to it.
    threshold = float(np.nextafter(np.float32(steps[best]), np.float32(-np.inf)))
    slices = sum(len(stack.x) for stack in healthy)
    return threshold, (
        f"highest geometric mean of the Dice of synthetic spheres, {large[best]:.3f}, and of those "
        f"of 2 to 6 mm, {small[best]:.3f}, in {slices} healthy slices of {len(healthy)} held-out "
        f"cases"
    )


def _score_spheres(
    scorer: _Scorer, stacks: Sequence[SliceStack], spheres: Spheres
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rising scores of the voxels of planted spheres, and of the rest of the foreground."""
    inside, outside = [], []
    for stack, where in planted(stacks, scorer.detector.spec.channels, spheres):
        scores = scorer(stack)
        inside.append(scores[where.numpy()])
        outside.append(scores[(stack.foreground & ~where).numpy()])
    return np.sort(np.concatenate(inside)), np.sort(np.concatenate(outside))


def _show(detector: Detector, case: PackedCase, channels: Sequence[str]) -> SliceStack:
    """A case as a scan that has only these of the model's channels."""
    spec = detector.spec
    stack = case.stack(spec.scaling)
    if tuple(channels) == spec.channels:
        return stack
    x = stack.x * torch.tensor([name in channels for name in spec.channels])[:, None, None]
    # The brain is where one of the shown channels has it.
    return replace(stack, x=x, foreground=find_foreground(x, spec.scaling))


def _score(scorer: _Scorer, case: PackedCase, channels: Sequence[str]) -> _Healthy:
    # A method may look at a scan as a whole: all of it is scored, and the healthy slices count.
    stack = _show(scorer.detector, case, channels)
    scores = scorer(stack)
    top, bottom, left, right = brain_box(stack.foreground, 1)
    healthy = np.zeros((len(scores), 1, 1), dtype=bool)
    healthy[list(case.healthy)] = True
    counted = stack.foreground.numpy() & healthy
    share = len(case.healthy) / case.slices
    return _Healthy(
        (scores * healthy)[:, top:bottom, left:right].copy(),
        counted[:, top:bottom, left:right],
        ml_per_pixel=math.prod(case.spacing_mm) / 1000 / share,
        max_dropped=scorer.detector.spec.score.max_dropped(case.spacing_mm),
    )


def _describe(scored: Sequence[_Healthy], pooled: NDArray[np.float32]) -> HealthyScores:
    peaks = sorted(float(one.scores.max()) for one in scored)
    steps = np.unique(
        [*np.quantile(pooled, 1 - TABLE_RATES).astype(np.float32), np.float32(peaks[-1])]
    )
    steps = steps[steps > 0] if (steps > 0).any() else steps[-1:]
    volumes = [float(np.mean([one.false_positive_ml(step) for one in scored])) for step in steps]
    top = peaks[-1] or 1.0
    return HealthyScores(
        threshold=tuple(steps.tolist()),
        false_positive_ml=tuple(round(volume, 4) for volume in volumes),
        scan_peaks=tuple(peaks),
        histogram=tuple(np.histogram(pooled, BINS, (0, top))[0].tolist()),
        histogram_top=top,
    )
