"""The choice among a model's label-free thresholds, and how rare a peak is in healthy scans."""

from __future__ import annotations

from bisect import bisect_left

from anomri.errors import AnomriError
from anomri.spec import HealthyScores, Thresholds

NAMES = ("highest", "high", "default", "low", "lowest")
"""Names of sensitivities, from the most sensitive one on."""
STEP = 1.3
"""``high`` and ``low`` pass over rates that differ from the default by less than this factor."""


def choose_threshold(
    thresholds: Thresholds | None,
    sensitivity: str | float | None = None,
    false_positive_ml: float | None = None,
) -> Thresholds | None:
    """The thresholds of a model with the one that is asked for; the same if nothing is.

    Args:
        thresholds: What the model stores.
        sensitivity: A stored voxel false positive rate (``0.005`` or ``0.5%``) or a name:
            ``default`` is the model's own, ``high`` and ``low`` the next more and less sensitive
            one, ``highest`` and ``lowest`` the ends.
        false_positive_ml: Instead: the lowest stored threshold above which the mean held-out
            healthy scan has at most this volume (see `HealthyScores`).

    Raises `AnomriError` that says what there is to choose from.
    """
    if sensitivity is None and false_positive_ml is None:
        return thresholds
    if sensitivity is not None and false_positive_ml is not None:
        raise AnomriError(
            "a sensitivity and a false positive volume are both given; give one of them."
        )
    if thresholds is None:
        raise AnomriError(
            "the model stores no thresholds: it was imported, or trained without held-out healthy "
            "slices; train with cases for validation."
        )
    if false_positive_ml is not None:
        return thresholds.asking(ml=_stored_volume(thresholds.healthy, float(false_positive_ml)))
    asked = str(sensitivity).strip().lower()
    if asked in NAMES:
        return thresholds.asking(rate=_named_rate(thresholds, asked))
    return thresholds.asking(rate=_stored_rate(thresholds, asked))


def choose_nearest_threshold(
    stored: Thresholds, sensitivity: str | float | None, false_positive_ml: float | None
) -> Thresholds | None:
    """`choose_threshold` for a subset of the channels, which may not store what is asked for.

    Then it is the lowest threshold if the stored volumes end below ``false_positive_ml``, and the
    default if the ``sensitivity`` is not stored. ``None`` if no volumes are stored at all.
    """
    most_ml = false_positive_ml
    if most_ml is not None:
        if stored.healthy is None:  # of a model that an earlier anomri trained
            return None
        most_ml = min(most_ml, stored.healthy.false_positive_ml[0])
    try:
        return choose_threshold(stored, sensitivity, most_ml)
    except AnomriError:
        # A rate that was chosen for other channels, or a step beyond its last.
        return stored.asking()


def confidence(peak: float, healthy: HealthyScores | None) -> float | None:
    """Share of healthy scans whose peak is below ``peak``: k / (n + 1) for k of n held-out scans.

    One more than n, as the scan itself might be the healthy one with the highest peak: 1 minus
    this is the p-value of a rank test. With 3 held-out scans it is at most 0.75, with 19 at most
    0.95. A healthy scan's peak is that of its healthy slices: if many were left out, it is too low
    and the confidence too high. ``None`` if the model stores no peaks.
    """
    if healthy is None or not healthy.scan_peaks:
        return None
    return bisect_left(healthy.scan_peaks, peak) / (len(healthy.scan_peaks) + 1)


def false_positive_words(voxel_rate: float | None, false_positive_ml: float | None) -> str:
    """In words, how much healthy tissue scores above a threshold; empty if neither is known.

    >>> false_positive_words(0.00104, None)
    '0.1 % of healthy voxels score above it'
    """
    if false_positive_ml is not None:
        return f"{false_positive_ml:.2g} ml of a mean healthy scan score above it"
    if voxel_rate is not None:
        return f"{100 * voxel_rate:.2g} % of healthy voxels score above it"
    return ""


def _named_rate(thresholds: Thresholds, name: str) -> float:
    default = thresholds.default_rate
    falling = sorted(thresholds.false_positive_rate, reverse=True)
    steps = [r for r in falling if r == default or not default / STEP < r < default * STEP]
    place = steps.index(default)
    if name == "highest":
        return steps[0]
    if name == "lowest":
        return steps[-1]
    if name == "default":
        return default
    place += {"high": -1, "low": 1}[name]
    if 0 <= place < len(steps):
        return steps[place]
    raise AnomriError(
        f"the default is the {'most' if name == 'high' else 'least'} sensitive threshold that the "
        f"model stores; its voxel false positive rates are {_listed(falling)}."
    )


def _stored_rate(thresholds: Thresholds, text: str) -> float:
    falling = sorted(thresholds.false_positive_rate, reverse=True)
    try:
        rate = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        rate = float("nan")
    equal = [one for one in falling if abs(one - rate) < 1e-9]
    # A rate may be given as it is printed.
    alike = equal or [one for one in falling if f"{one:.2g}" == f"{rate:.2g}"]
    if alike:
        return alike[0]
    raise AnomriError(
        f"the model stores no sensitivity {text!r}; there are the voxel false positive rates "
        f"{_listed(falling)} (default: {thresholds.default_rate:.2g}) and the names "
        f"{', '.join(NAMES)}."
    )


def _listed(rates: list[float]) -> str:
    return ", ".join(f"{rate:.2g}" for rate in rates)


def _stored_volume(healthy: HealthyScores | None, most_ml: float) -> float:
    if healthy is None:
        raise AnomriError(
            "the model stores no false positive volumes (an earlier anomri trained it); use "
            "--sensitivity."
        )
    largest = healthy.false_positive_ml[0]
    if not 0 <= most_ml <= largest:
        raise AnomriError(
            f"the model stores thresholds for false positive volumes from 0 to {largest:.3g} ml "
            f"per scan; {most_ml:g} ml is not among them."
        )
    return next(volume for volume in healthy.false_positive_ml if volume <= most_ml)
