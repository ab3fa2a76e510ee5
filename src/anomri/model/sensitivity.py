"""Another threshold without labels, among those a model stores; and how rare a peak is among healthy scans."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from anomri.errors import AnomriError
from anomri.spec import HealthyScores, Thresholds

NAMES = ("highest", "high", "default", "low", "lowest")
STEP = 1.3
"""Rates that differ by less than this factor are the same to ``high`` and ``low``."""


def choose_threshold(
    thresholds: Thresholds | None,
    sensitivity: str | float | None = None,
    false_positive_ml: float | None = None,
) -> Thresholds | None:
    """The thresholds with another one chosen; the same if nothing is asked for.

    ``sensitivity`` is one of the voxel false positive rates that the model stores (0.005, or ``0.5%``) or its name:
    ``default`` the model's own, ``high`` and ``low`` the next more and less sensitive one, ``highest`` and ``lowest``
    the ends. ``false_positive_ml`` takes the lowest stored threshold above which the mean held-out healthy scan has
    at most that volume (see `HealthyScores`). Raises `AnomriError` naming what there is.
    """
    if sensitivity is None and false_positive_ml is None:
        return thresholds
    if sensitivity is not None and false_positive_ml is not None:
        raise AnomriError(
            "a sensitivity and a false positive volume are both given; give one of them."
        )
    if thresholds is None:
        raise AnomriError(
            "the model stores no thresholds: it was imported, or trained without held-out healthy slices; "
            "train with cases for validation."
        )
    if sensitivity is not None:
        return replace(
            thresholds, chosen=_rate(thresholds, str(sensitivity).strip().lower()), chosen_ml=None
        )
    return replace(thresholds, chosen_ml=_volume(thresholds.healthy, float(false_positive_ml or 0)))


def confidence(peak: float, healthy: HealthyScores | None) -> float | None:
    """Share of healthy scans whose peak lies below ``peak``, as k / (n + 1) for k of n held-out healthy scans.

    One more than n, as the scan itself might be the healthy one with the highest peak: 1 minus this is the p-value
    of a rank test. With 3 held-out scans it is at most 0.75, with 19 at most 0.95. A healthy scan's peak is taken
    over its healthy slices, so where many were left out it is too low and the confidence too high. ``None`` where
    the model stores no peaks.
    """
    if healthy is None or not healthy.scan_peaks:
        return None
    return bisect_left(healthy.scan_peaks, peak) / (len(healthy.scan_peaks) + 1)


def false_positive_words(voxel_rate: float | None, false_positive_ml: float | None) -> str:
    """In words, how much of healthy tissue scores above a threshold; empty if neither figure is known.

    >>> false_positive_words(0.00104, None)
    '0.1 % of healthy voxels score above it'
    """
    if false_positive_ml is not None:
        return f"{false_positive_ml:.2g} ml of a mean healthy scan score above it"
    if voxel_rate is not None:
        return f"{100 * voxel_rate:.2g} % of healthy voxels score above it"
    return ""


def _rate(thresholds: Thresholds, asked: str) -> float:
    falling = sorted(thresholds.false_positive_rate, reverse=True)
    rates = ", ".join(f"{rate:.2g}" for rate in falling)
    own = thresholds.chosen
    steps = [rate for rate in falling if rate == own or not own / STEP < rate < own * STEP]
    default = steps.index(own)
    places = {
        "highest": 0,
        "high": default - 1,
        "default": default,
        "low": default + 1,
        "lowest": len(steps) - 1,
    }
    if asked in places:
        if 0 <= places[asked] < len(steps):
            return steps[places[asked]]
        raise AnomriError(
            f"the default is the {'most' if asked == 'high' else 'least'} sensitive threshold that the model stores; its "
            f"voxel false positive rates are {rates}."
        )
    try:
        rate = float(asked.removesuffix("%")) / (100 if asked.endswith("%") else 1)
    except ValueError:
        rate = float("nan")
    close = [one for one in falling if abs(one - rate) < 1e-9]
    # As they are printed.
    close = close or [one for one in falling if f"{one:.2g}" == f"{rate:.2g}"]
    if close:
        return close[0]
    raise AnomriError(
        f"the model stores no sensitivity {asked!r}; there are the voxel false positive rates "
        f"{rates} (default: {thresholds.chosen:.2g}) and the names {', '.join(NAMES)}."
    )


def _volume(healthy: HealthyScores | None, most_ml: float) -> float:
    if healthy is None:
        raise AnomriError(
            "the model stores no false positive volumes (an earlier anomri trained it); use --sensitivity."
        )
    if not 0 <= most_ml <= healthy.false_positive_ml[0]:
        raise AnomriError(
            f"the model stores thresholds for false positive volumes from 0 to {healthy.false_positive_ml[0]:.3g} ml "
            f"per scan; {most_ml:g} ml is not among them."
        )
    return next(volume for volume in healthy.false_positive_ml if volume <= most_ml)
