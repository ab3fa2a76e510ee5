"""What a comparison of maps and labels says: average precision, ceil-Dice, lesions.

Exact, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from anomri.scans.boxes import box_around

Scores = NDArray[np.floating[Any]]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % bootstrap interval by patient, where one was computed."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> str:
        """The interval in words, empty if there is none."""
        return "" if self.low is None else f"{self.low:.3f} - {self.high:.3f}"

    def __str__(self) -> str:
        """The value to three digits, with its interval."""
        return f"{self.value:.3f}" + (f" [{self.interval}]" if self.interval else "")


@dataclass(frozen=True)
class Curve:
    """True and false positives at every threshold that matters, pooled over what was counted.

    The thresholds are the distinct scores of lesion voxels, falling: between two of them only false
    positives change, so precision at a step of recall and the best Dice are always found on one of
    them. A voxel is positive where score >= threshold.
    """

    thresholds: Scores
    true_positives: Counts
    false_positives: Counts
    positives: int

    @property
    def recall(self) -> NDArray[np.float64]:
        """Share of the lesion voxels found at each threshold."""
        return self.true_positives / max(self.positives, 1)

    @property
    def precision(self) -> NDArray[np.float64]:
        """Share of the found voxels that are lesion at each threshold."""
        return self.true_positives / np.maximum(self.true_positives + self.false_positives, 1)

    @property
    def dice(self) -> NDArray[np.float64]:
        """Dice at each threshold."""
        total = self.true_positives + self.false_positives + self.positives
        return 2 * self.true_positives / np.maximum(total, 1)

    @property
    def average_precision(self) -> float:
        """Area under the precision-recall curve as scikit-learn's ``average_precision_score``.

        NaN without a lesion.
        """
        if not self.positives:
            return float("nan")
        return float(np.sum(np.diff(self.recall, prepend=0.0) * self.precision))

    @property
    def ceil_dice(self) -> float:
        """The best Dice over all thresholds, chosen on the labels themselves: an upper bound.

        NaN without a lesion.
        """
        return float(self.dice.max()) if self.positives else float("nan")

    @property
    def best_threshold(self) -> float:
        """The (highest) threshold that gives `ceil_dice`; infinite without a lesion."""
        return float(self.thresholds[np.argmax(self.dice)]) if self.positives else float("inf")


def lesion_thresholds(lesion_scores: Iterable[Scores]) -> tuple[Scores, Counts]:
    """Distinct scores of lesion voxels, rising, and how often each occurs."""
    scores = list(lesion_scores)
    pooled = np.concatenate(scores) if scores else np.empty(0, np.float32)
    return np.unique(pooled, return_counts=True)


def count_at(rising: Scores, thresholds: Scores) -> Counts:
    """How many ``rising`` scores lie from each rising threshold up to the next."""
    # The thresholds are looked up among the scores, not the scores among them: there are far fewer.
    return np.diff(np.searchsorted(rising, thresholds, side="left"), append=rising.size)


def curve_from_counts(thresholds: Scores, lesion: Counts, healthy: Counts, positives: int) -> Curve:
    """The `Curve` from counts at rising thresholds.

    The counts are those of `lesion_thresholds` and `count_at`.
    """
    return Curve(
        thresholds=thresholds[::-1],
        true_positives=np.cumsum(lesion[::-1]),
        false_positives=np.cumsum(healthy[::-1]),
        positives=positives,
    )


def precision_recall(
    scores: Scores, labels: NDArray[np.bool_], thresholds: Scores | None = None
) -> Curve:
    """The exact `Curve` of scores and labels of the same shape.

    With rising ``thresholds``, the curve at those only.
    """
    return precision_recall_from_sorted(
        np.sort(scores[labels]), np.sort(scores[~labels]), thresholds
    )


def precision_recall_from_sorted(
    lesion: Scores, healthy: Scores, thresholds: Scores | None = None
) -> Curve:
    """`precision_recall` of the rising scores of lesion voxels and of all others."""
    if thresholds is None:
        thresholds, counts = lesion_thresholds([lesion])
    else:
        counts = count_at(lesion, thresholds)
    return curve_from_counts(thresholds, counts, count_at(healthy, thresholds), lesion.size)


def dice(prediction: NDArray[np.bool_], label: NDArray[np.bool_]) -> float:
    """Dice of two masks; 1 if both are empty.

    >>> dice(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    """
    total = int(prediction.sum()) + int(label.sum())
    return 2 * int((prediction & label).sum()) / total if total else 1.0


def count_components(mask: NDArray[np.bool_]) -> int:
    """How many 26-connected components a mask (x, y, z) has."""
    inside = mask[box_around(mask)]
    return _components(inside)[1] if inside.size else 0


def drop_small_components(mask: NDArray[np.bool_], max_dropped_voxels: int) -> NDArray[np.bool_]:
    """``mask`` (3D) without 26-connected components of at most ``max_dropped_voxels``.

    The paper counts a component's holes as its own. With 26-connected holes that changes nothing up
    to 26 voxels: it takes all 26 neighbours of a voxel to enclose it.
    """
    box = box_around(mask)
    if not mask[box].size:
        return mask
    kept = np.zeros_like(mask)
    least = max_dropped_voxels + 1
    kept[box] = cc3d.dust(
        np.ascontiguousarray(mask[box], np.uint8), threshold=least, connectivity=26
    )
    return kept


@dataclass(frozen=True)
class LesionCounts:
    """Lesions of one case: in the label, detected, and found where there is none."""

    lesions: int
    detected: int
    false_positives: int


def count_lesions(
    prediction: NDArray[np.bool_],
    label: NDArray[np.bool_],
    ignored: NDArray[np.bool_] | None = None,
) -> LesionCounts:
    """Compare 26-connected components.

    A lesion counts as detected if one voxel of it is predicted. A component that lies in
    ``ignored`` voxels alone is not counted.
    """
    lesions, n_lesions = _components(label)
    found, n_found = _components(prediction)
    overlap = prediction & label
    detected = np.unique(lesions[overlap]).size
    touching = np.unique(found[overlap]).size
    if ignored is not None:
        n_found = np.unique(found[prediction & ~ignored]).size
    return LesionCounts(n_lesions, int(detected), int(n_found - touching))


def _components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.unsignedinteger[Any]], int]:
    """The 26-connected components of a mask (x, y, z), numbered from 1, and how many they are."""
    labels, count = cc3d.connected_components(mask.astype(np.uint8), connectivity=26, return_N=True)
    return labels, int(count)


def bootstrap_weights(patients: int, resamples: int = 2000, seed: int = 0) -> NDArray[np.float64]:
    """How often each patient is drawn with replacement: (resamples, patients).

    Every resample draws as many patients as there are.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(patients, np.full(patients, 1 / patients), size=resamples).astype(
        np.float64
    )


def percentile_interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the middle ``level`` of a bootstrap's values.

    Those that are NaN do not count.
    """
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of one value a patient."""
    weights = bootstrap_weights(len(values))
    return percentile_interval(weights @ np.asarray(values, dtype=np.float64) / weights.sum(axis=1))
