import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from sklearn.metrics import average_precision_score

from anomri.scoring.metrics import (
    bootstrap_weights,
    count_at,
    count_lesions,
    curve_from_counts,
    dice,
    drop_small_components,
    lesion_thresholds,
    mean_interval,
    precision_recall,
)

# Few distinct values, so that ties are common.
SCORES = arrays(
    np.float32, 60, elements=st.sampled_from([np.float32(v) for v in (-0.5, 0, 0.1, 0.2, 0.3, 0.7)])
)
LABELS = arrays(np.bool_, 60)


@given(SCORES, LABELS)
@settings(max_examples=200, deadline=None)
def test_average_precision_is_that_of_scikit_learn(scores: np.ndarray, labels: np.ndarray) -> None:
    curve = precision_recall(scores, labels)
    expected = average_precision_score(labels, scores) if labels.any() else np.nan
    assert curve.average_precision == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(SCORES, LABELS)
@settings(max_examples=100, deadline=None)
def test_ceil_dice_is_the_best_of_all_thresholds(scores: np.ndarray, labels: np.ndarray) -> None:
    curve = precision_recall(scores, labels)
    tried = [dice(scores >= t, labels) for t in np.unique(scores)] if labels.any() else [np.nan]
    assert curve.ceil_dice == pytest.approx(max(tried), nan_ok=True)
    if labels.any():
        assert dice(scores >= curve.best_threshold, labels) == pytest.approx(curve.ceil_dice)


def test_average_precision_is_exact_for_many_continuous_scores() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(200_000) < 0.05
    scores = (rng.random(200_000) + labels * rng.random(200_000)).astype(np.float32)
    expected = average_precision_score(labels, scores)
    assert precision_recall(scores, labels).average_precision == pytest.approx(expected, abs=1e-9)


def test_pooling_counts_equals_pooling_scores() -> None:
    rng = np.random.default_rng(1)
    parts = [(rng.random(500).astype(np.float32), rng.random(500) < 0.2) for _ in range(3)]
    thresholds, lesion = lesion_thresholds([scores[label] for scores, label in parts])
    healthy = sum(count_at(np.sort(scores[~label]), thresholds) for scores, label in parts)
    pooled = curve_from_counts(thresholds, lesion, healthy, int(lesion.sum()))
    whole = precision_recall(
        np.concatenate([s for s, _ in parts]), np.concatenate([label for _, label in parts])
    )
    assert pooled.average_precision == whole.average_precision
    assert pooled.ceil_dice == whole.ceil_dice


def _components_by_the_book(mask: np.ndarray, limit: int) -> np.ndarray:
    full = np.ones((3, 3, 3))
    labelled, count = ndimage.label(mask, full)
    kept = np.zeros_like(mask)
    for number in range(1, count + 1):
        component = labelled == number
        if ndimage.binary_fill_holes(component, full).sum() > limit:
            kept |= component
    return kept


@pytest.mark.parametrize("density", [0.02, 0.08, 0.3])
def test_small_components_are_dropped_by_filled_volume(density: float) -> None:
    mask = ndimage.uniform_filter(np.random.default_rng(2).random((20, 20, 20)), 2) < density
    np.testing.assert_array_equal(
        drop_small_components(mask, 20), _components_by_the_book(mask, 20)
    )


def test_a_component_of_exactly_the_limit_is_dropped() -> None:
    mask = np.zeros((5, 5, 30), bool)
    mask[2, 2, :20] = True
    assert not drop_small_components(mask, 20).any()
    mask[2, 2, 20] = True
    assert drop_small_components(mask, 20).sum() == 21


def test_lesions_are_counted_by_touch() -> None:
    label, prediction = np.zeros((2, 10, 10, 10), bool)
    label[1:3, 1:3, 1:3] = label[6:8, 6:8, 6:8] = True
    prediction[2:5, 2:5, 2:5] = prediction[0, 9, 9] = True
    counts = count_lesions(prediction, label)
    assert (counts.lesions, counts.detected, counts.false_positives) == (2, 1, 1)


def test_dice_of_empty_masks_is_one() -> None:
    empty = np.zeros(4, bool)
    assert dice(empty, empty) == 1.0
    assert dice(~empty, empty) == 0.0


def test_the_interval_covers_the_mean_and_narrows_with_more_patients() -> None:
    rng = np.random.default_rng(3)
    few, many = rng.random(10), rng.random(1000)
    low, high = mean_interval(many.tolist())
    assert low < many.mean() < high
    assert high - low < np.diff(mean_interval(few.tolist()))[0]
    # The standard error of the mean of uniform values is known.
    assert high - low == pytest.approx(2 * 1.96 * many.std() / np.sqrt(1000), rel=0.15)


def test_every_resample_draws_as_many_patients() -> None:
    weights = bootstrap_weights(7, resamples=50)
    assert weights.shape == (50, 7)
    assert (weights.sum(axis=1) == 7).all()
