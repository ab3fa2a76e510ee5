"""Thresholds without labels: scores that healthy tissue of held-out patients rarely exceeds.

The default of a score that was chosen on synthetic spheres is chosen on them too. It then also
depends on what stands out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray

from anomri.model.detector import Detector
from anomri.scoring.metrics import drop_small_components
from anomri.scoring.registry import DEFAULT_RATE, find
from anomri.slices import SliceStack, brain_box, find_foreground
from anomri.spec import HealthyScores, ModelSpec, Thresholds
from anomri.training.evidence import Evidence, plant_slabs
from anomri.training.packing import PackedCase
from anomri.training.passes import Passes, SlabCounts, cases_within, slab_heights
from anomri.training.spheres import (
    MAX_SCANS,
    HealthyScans,
    ScoredSlabs,
    sphere_curve,
    steps_inside,
)

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
NEAR = 0.95
"""The threshold is the mean of all that are nearly as good as the best, by this share: which one
is best of all is chance."""
SUBSET_SLABS = SlabCounts(32, 16)
"""Slabs with spheres for each subset.

Another planting moves the threshold by an eighth (docs/notes). There are 2^n subsets, so fewer for
each than for all channels (`choose_score.SLABS`).
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


def healthy_thresholds(
    passes: Passes, held_out: Sequence[PackedCase], evidence: Evidence | None = None
) -> Thresholds | None:
    """Thresholds by the scores of the healthy foreground voxels of all ``held_out`` cases.

    ``None`` if there is no such voxel. The default is chosen on the ``evidence`` that the score was
    chosen on, if there is any.
    """
    cases = cases_within(held_out, MAX_CASES, passes.affordable_slices / 3)
    passes.expect(sum(case.slices for case in cases))
    channels = passes.detector.spec.channels
    return _thresholds(
        passes, cases, channels, lambda scored: _best_on_evidence(passes.detector.spec, evidence)
    )


def subset_thresholds(
    passes: Passes, held_out: Sequence[PackedCase], *, always: bool = False
) -> dict[str, Thresholds] | None:
    """The same for every subset of the model's channels, named as ``flair+t2``.

    Empty if the method takes no subsets, or has more than `MAX_SUBSET_CHANNELS` channels. ``None``
    if even a few slices of each subset cannot be afforded. ``always``: whatever it costs.
    """
    channels = passes.detector.spec.channels
    if not passes.detector.takes_subsets or len(channels) > MAX_SUBSET_CHANNELS:
        return {}
    subsets = [names for size in range(1, len(channels)) for names in combinations(channels, size)]
    each = math.inf if always else passes.affordable_slices / max(len(subsets), 1)
    cases = cases_within(held_out, MAX_SUBSET_CASES, each / 2, always=0)
    needed = sum(case.slices for case in cases)
    counts = None
    if cases and passes.detector.spec.score.chosen_by:
        large, small = slab_heights(cases)
        counts = SUBSET_SLABS.within(each - needed, large, small)
        needed += counts.large * large + counts.small * small
    if needed > each:
        return None
    passes.expect(len(subsets) * needed)
    found = {}
    for names in subsets:
        best_on_slabs = partial(_best_on_slabs, passes, cases, names, counts)
        found[names] = _thresholds(passes, cases, names, best_on_slabs)
    passes.finish()
    return {"+".join(names): one for names, one in found.items() if one is not None}


def _thresholds(
    passes: Passes,
    cases: Sequence[PackedCase],
    channels: Sequence[str],
    choose: Callable[[Sequence[_Healthy]], tuple[float, str] | None],
) -> Thresholds | None:
    """Thresholds for some of the channels; ``choose`` finds the default, if spheres can."""
    scored = [_score(passes, case, channels) for case in cases]
    if not any(one.counted.any() for one in scored):
        return None
    pooled = np.sort(np.concatenate([one.scores[one.counted] for one in scored]))
    quantiles = np.quantile(pooled, [1 - rate for rate in FALSE_POSITIVE_RATES])
    table = dict(zip(FALSE_POSITIVE_RATES, map(float, quantiles), strict=True))
    default = _default(passes.detector.spec, choose(scored), pooled, table)
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
    spec: ModelSpec,
    best: tuple[float, str] | None,
    pooled: NDArray[np.float32],
    table: Mapping[float, float],
) -> _Default:
    """The score's own rate or, if the score was chosen on spheres, what is ``best`` on them.

    At most `DEFAULT_RATE` of the healthy voxels exceed the latter: where little is found, as on T1
    alone, the mask with the best Dice takes in much healthy tissue.
    """
    if best is None:
        rate = find(spec.score.kind).false_positive_rate
        return _Default(rate, table[rate])
    threshold, reason = best
    rate = float((pooled > threshold).mean())
    if rate <= DEFAULT_RATE:
        return _Default(rate, threshold, reason)
    reason = f"{reason}; raised to what {DEFAULT_RATE:.0%} of healthy voxels exceed"
    return _Default(DEFAULT_RATE, table[DEFAULT_RATE], reason)


def _best_on_evidence(spec: ModelSpec, evidence: Evidence | None) -> tuple[float, str] | None:
    """`_best_on_spheres` for all channels; the network has seen the spheres already."""
    if evidence is None:
        return None
    planted = (evidence.large, evidence.small)
    large, small = (one.scored(spec, spec.score) for one in planted)
    return _best_on_spheres(large, small, evidence.healthy_scans(spec.score))


def _best_on_slabs(
    passes: Passes,
    cases: Sequence[PackedCase],
    channels: Sequence[str],
    counts: SlabCounts | None,
    scored: Sequence[_Healthy],
) -> tuple[float, str] | None:
    """`_best_on_spheres` for some of the channels, in scans without the others.

    ``None`` if no spheres are to be planted, or no case shows one of the channels on its healthy
    slices.
    """
    shown = [pair for pair in zip(cases, scored, strict=True) if pair[1].counted.any()]
    if counts is None or not shown:
        return None
    places = np.linspace(0, len(shown) - 1, min(len(shown), MAX_SCANS)).astype(int)
    used = [shown[place] for place in places]
    scans = [_show(passes.detector, case, channels).take(case.healthy) for case, _ in used]
    healthy = HealthyScans(
        [one.scores[list(case.healthy)] for case, one in used],
        [one.counted[list(case.healthy)] for case, one in used],
    )
    large, small = (
        ScoredSlabs(slabs, [passes.score(slab.stack) for slab in slabs])
        for slabs in plant_slabs(scans, passes.detector.spec.channels, counts)
    )
    return _best_on_spheres(large, small, healthy)


def _best_on_spheres(
    large: ScoredSlabs, small: ScoredSlabs, healthy: HealthyScans
) -> tuple[float, str]:
    """The threshold with the highest geometric mean of the Dice of large and of small spheres.

    It comes with the reason in words.
    """
    steps = steps_inside([large, small], STEPS)
    on_large, on_small = (
        sphere_curve(scored, healthy, steps).dice[::-1] for scored in (large, small)
    )
    best = _middle_of_the_best(steps, on_large * on_small)
    # A mask is what lies above its threshold, and a voxel at the step belongs to it.
    threshold = float(np.nextafter(np.float32(steps[best]), np.float32(-np.inf)))
    slices = sum(len(scores) for scores in healthy.scores)
    return threshold, (
        f"highest geometric mean of the Dice of synthetic spheres, {on_large[best]:.3f}, and of "
        f"those of 2 to 6 mm, {on_small[best]:.3f}, in {slices} healthy slices of "
        f"{len(healthy.scores)} held-out cases"
    )


def _middle_of_the_best(steps: NDArray[np.float32], goodness: NDArray[np.float64]) -> int:
    """The place of the mean threshold of those that are nearly as good as the best.

    >>> steps = np.array([1, 2, 3, 4, 5], np.float32)
    >>> _middle_of_the_best(steps, np.array([0.2, 0.97, 0.99, 0.98, 0.3]))
    2
    """
    weights = (goodness - NEAR * goodness.max()).clip(0)
    if not weights.any():
        return int(np.argmax(goodness))
    return int(np.argmin(np.abs(steps - np.average(steps, weights=weights))))


def _show(detector: Detector, case: PackedCase, channels: Sequence[str]) -> SliceStack:
    """A case as a scan that has only these of the model's channels."""
    spec = detector.spec
    stack = case.stack(spec.scaling)
    if tuple(channels) == spec.channels:
        return stack
    x = stack.x * torch.tensor([name in channels for name in spec.channels])[:, None, None]
    # The brain is where one of the shown channels has it.
    return replace(stack, x=x, foreground=find_foreground(x, spec.scaling))


def _score(passes: Passes, case: PackedCase, channels: Sequence[str]) -> _Healthy:
    # A method may look at a scan as a whole: all of it is scored, and the healthy slices count.
    stack = _show(passes.detector, case, channels)
    scores = passes.score(stack)
    top, bottom, left, right = brain_box(stack.foreground, 1)
    healthy = np.zeros((len(scores), 1, 1), dtype=bool)
    healthy[list(case.healthy)] = True
    counted = stack.foreground.numpy() & healthy
    share = len(case.healthy) / case.slices
    return _Healthy(
        (scores * healthy)[:, top:bottom, left:right].copy(),
        counted[:, top:bottom, left:right],
        ml_per_pixel=math.prod(case.spacing_mm) / 1000 / share,
        max_dropped=passes.detector.spec.score.max_dropped(case.spacing_mm),
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
