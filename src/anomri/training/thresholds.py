"""Thresholds without labels: scores that healthy tissue of patients not trained on rarely exceeds.

The one of a score that was chosen on synthetic spheres is chosen on them too; it then depends on what stands out as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from anomri.model.detector import Detector
from anomri.scoring.metrics import drop_small_components, precision_recall_from_sorted
from anomri.scoring.registry import DEFAULT_RATE, find
from anomri.slices import SliceStack, brain_box, find_foreground
from anomri.spec import HealthyScores, Score, Thresholds
from anomri.training.packing import PackedCase, spread_healthy
from anomri.training.spheres import LARGE, MAX_SCANS, SMALL, Spheres, planted

FALSE_POSITIVE_RATES = (0.05, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001)
MAX_CASES = 64
"""More held-out cases than this do not move the quantiles; their scores are held in memory at once (5 MB a case)."""
TABLE_RATES = np.geomspace(0.1, 1e-5, 32)
"""Voxel rates whose scores are the steps of the table of volumes: a quarter less volume from one to the next."""
BINS = 64
STEPS = 2001
"""Thresholds that are tried on spheres: so many quantiles of the scores of their voxels."""
PLANTED, SUBSET_PLANTED = 48, 12
"""Scans with spheres, several of each of `MAX_SCANS` cases: with nine, another planting moves the threshold by a fifth. Of parts of
the channels there are 2^n, so fewer for each."""
MAX_SUBSET_CASES, MAX_SUBSET_CHANNELS = 8, 5
"""Limits for thresholds of parts of the channels."""


@dataclass(frozen=True)
class _Healthy:
    """Scores (n, h, w) of one case cut to its brain, zero on slices that are not healthy, and where they count."""

    scores: NDArray[np.float32]
    counted: NDArray[np.bool_]
    ml_per_pixel: float
    """Volume of a pixel, divided by the share of the scan's slices that are healthy."""
    max_dropped: int
    """The largest component of a mask that is dropped, in pixels."""

    def false_positive_ml(self, threshold: float) -> float:
        """The volume above a threshold."""
        return float(
            drop_small_components(self.scores > threshold, self.max_dropped).sum()
            * self.ml_per_pixel
        )


def default_rate(score: Score) -> float:
    """The share of healthy voxels above a score's threshold unless another is asked for."""
    return find(score.kind).false_positive_rate


def healthy_thresholds(
    detector: Detector,
    held_out: Sequence[PackedCase],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Thresholds | None:
    """Quantiles of the scores of healthy slices' foreground voxels, pooled over ``held_out`` cases; `HealthyScores`.

    The chosen one is at `default_rate`, or, of a score that was chosen on spheres, has the highest geometric mean of the
    Dice of large and of small spheres, and is exceeded by at most `DEFAULT_RATE`. ``None`` if there is no healthy slice.
    ``progress`` is told how many cases are done, and of how many.
    """
    usable = spread_healthy(held_out, MAX_CASES)
    return _thresholds(
        detector, usable, detector.spec.channels, lambda done: progress(done, len(usable))
    )


def subset_thresholds(
    detector: Detector,
    held_out: Sequence[PackedCase],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Thresholds]:
    """The same for every part of the model's channels, of at most `MAX_SUBSET_CASES` cases.

    Empty where the method does not take a part of its channels, or they are more than `MAX_SUBSET_CHANNELS`.
    """
    channels = detector.spec.channels
    if not detector.takes_subsets or len(channels) > MAX_SUBSET_CHANNELS:
        return {}
    usable = spread_healthy(held_out, MAX_SUBSET_CASES)
    parts = [names for size in range(1, len(channels)) for names in combinations(channels, size)]
    found = {}
    for number, names in enumerate(parts):
        progress(number, len(parts))
        if (thresholds := _thresholds(detector, usable, names)) is not None:
            found["+".join(names)] = thresholds
    return found


def _thresholds(
    detector: Detector,
    cases: Sequence[PackedCase],
    channels: Sequence[str],
    progress: Callable[[int], None] = lambda done: None,
) -> Thresholds | None:
    scored = []
    for done, case in enumerate(cases):
        progress(done)
        scored.append(_score(detector, case, channels))
    if not any(one.counted.any() for one in scored):
        return None
    pooled = np.sort(np.concatenate([one.scores[one.counted] for one in scored]))
    quantiles = np.quantile(pooled, [1 - rate for rate in FALSE_POSITIVE_RATES])
    values = dict(zip(FALSE_POSITIVE_RATES, map(float, quantiles), strict=True))
    chosen, why = default_rate(detector.spec.score), ""
    if detector.spec.score.chosen_by and (best := _best_on_spheres(detector, cases, channels)):
        threshold, why = best
        chosen = float((pooled > threshold).mean())
        if chosen > DEFAULT_RATE:
            # Where little is found, as on T1 alone, the best Dice has a mask that takes in much healthy tissue.
            chosen, why = (
                DEFAULT_RATE,
                f"{why}; raised to what {DEFAULT_RATE:.0%} of healthy voxels exceed",
            )
        else:
            values[chosen] = threshold
    rates = sorted(values, reverse=True)
    return Thresholds(
        false_positive_rate=tuple(rates),
        value=tuple(values[rate] for rate in rates),
        default_rate=chosen,
        chosen_by=why,
        healthy_slices=sum(len(case.healthy) for case in cases),
        healthy_cases=len(cases),
        healthy=_describe(scored, pooled),
    )


def _best_on_spheres(
    detector: Detector, cases: Sequence[PackedCase], channels: Sequence[str]
) -> tuple[float, str] | None:
    """The threshold with the highest geometric mean of the Dice of large and of small spheres, and why in words.

    ``None`` if none of the cases that are taken shows one of the channels on its healthy slices.
    """
    count = PLANTED if tuple(channels) == detector.spec.channels else SUBSET_PLANTED
    healthy = [
        _seen(detector, case, channels).take(case.healthy)
        for case in spread_healthy(cases, MAX_SCANS)
    ]
    healthy = [stack for stack in healthy if stack.foreground.any()]
    if not healthy:
        return None
    # Of few scans a few spheres would decide.
    stacks = (healthy * math.ceil(count / len(healthy)))[:count]
    scored = [_score_spheres(detector, stacks, spheres) for spheres in (LARGE, SMALL)]
    steps = np.unique(
        np.quantile(np.concatenate([found for found, _ in scored]), np.linspace(0, 1, STEPS))
    )
    large, small = (precision_recall_from_sorted(*scores, steps).dice[::-1] for scores in scored)
    best = int(np.argmax(large * small))
    # A mask is what lies above its threshold, and a voxel at the step belongs to it.
    return float(np.nextafter(np.float32(steps[best]), np.float32(-np.inf))), (
        f"highest geometric mean of the Dice of synthetic spheres, {large[best]:.3f}, and of those of 2 to 6 mm, "
        f"{small[best]:.3f}, in {sum(len(stack.x) for stack in healthy)} healthy slices of {len(healthy)} held-out cases"
    )


def _score_spheres(
    detector: Detector, stacks: Sequence[SliceStack], spheres: Spheres
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rising scores of the voxels of spheres planted in healthy scans, and of the rest of their foreground."""
    found, rest = list[NDArray[np.float32]](), list[NDArray[np.float32]]()
    for stack, where in planted(stacks, detector.spec.channels, spheres):
        scores, _ = detector.score(stack)
        found.append(scores[where.numpy()])
        rest.append(scores[(stack.foreground & ~where).numpy()])
    return np.sort(np.concatenate(found)), np.sort(np.concatenate(rest))


def _seen(detector: Detector, case: PackedCase, channels: Sequence[str]) -> SliceStack:
    """A case as a scan that has some of the model's channels."""
    stack = case.stack(detector.spec.scaling)
    if tuple(channels) == detector.spec.channels:
        return stack
    x = stack.x * torch.tensor([name in channels for name in detector.spec.channels])[:, None, None]
    # The brain is where a channel that the scan has shows it.
    return replace(stack, x=x, foreground=find_foreground(x, detector.spec.scaling))


def _score(detector: Detector, case: PackedCase, channels: Sequence[str]) -> _Healthy:
    # A method may look at a scan as a whole, so all of it is scored and only the healthy slices are counted.
    stack = _seen(detector, case, channels)
    scores, _ = detector.score(stack)
    top, bottom, left, right = brain_box(stack.foreground, 1)
    healthy = np.zeros((len(scores), 1, 1), dtype=bool)
    healthy[list(case.healthy)] = True
    counted = (stack.foreground.numpy() & healthy)[:, top:bottom, left:right]
    share = len(case.healthy) / case.slices
    return _Healthy(
        (scores * healthy)[:, top:bottom, left:right].copy(),
        counted,
        ml_per_pixel=math.prod(case.spacing_mm) / 1000 / share,
        max_dropped=detector.spec.score.max_dropped(case.spacing_mm),
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
