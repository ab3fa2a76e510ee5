"""How anomalous each pixel is: the formulas behind the table of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from anomri.errors import AnomriError
from anomri.scoring import registry
from anomri.scoring.filters import MEDIANS
from anomri.scoring.positions import interpolate_cells, unpack_maps
from anomri.slices import Position, cut_box, paste_box, present_channels, widen_box
from anomri.spec import Score

BRIGHT = ("flair", "t2")
"""Channels on which most lesions are bright."""
SSIM_WINDOWS = (5, 9, 15)
SLICES_AT_ONCE = 16
"""Slices that are scored together: what lies between a scan and its score is several times as large
as either."""
RESIDUAL_FLOOR = 0.02
"""Added to the positive residual where it weighs the anomaly probability."""
DEVIATION_FLOOR = 0.2
"""The same in standard deviations."""


@dataclass(frozen=True)
class Evidence:
    """Scan and reconstruction (n, k, h, w) of the k channels that a score looks at."""

    x: Tensor
    reconstruction: Tensor
    probability: Tensor | None = None
    """(n, h, w); ``None`` without a segmentation head."""
    mean: Tensor | None = None
    """Mean absolute residual of healthy tissue, (k, 1, 1) or for each pixel (n, k, h, w)."""
    spread: Tensor | None = None
    """Its standard deviation."""
    bright: bool = True
    """Whether lesions are bright on one of these channels, as far as the score knows; else they may
    be dark."""

    @property
    def residual(self) -> Tensor:
        """Scan - reconstruction."""
        return self.x - self.reconstruction


def mean_absolute_residual(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean over the channels of \\|x - reconstruction\\|: (n, c, h, w) twice -> (n, h, w)."""
    return (x - reconstruction).abs().mean(dim=1)


def absolute(seen: Evidence) -> Tensor:
    """Mean over the channels of \\|x - reconstruction\\| (Kascenas et al. 2022)."""
    return mean_absolute_residual(seen.x, seen.reconstruction)


def positive(seen: Evidence) -> Tensor:
    """How much brighter than reconstructed: the residual above 0 (Baur et al.

    2021, section 3.4).
    """
    return seen.residual.clamp_min(0).mean(dim=1)


def negative(seen: Evidence) -> Tensor:
    """How much darker than reconstructed."""
    return (-seen.residual).clamp_min(0).mean(dim=1)


def standardised(seen: Evidence) -> Tensor:
    """Absolute residual in standard deviations above its healthy mean, at least 0.

    Mean over the channels.
    """
    if seen.mean is None or seen.spread is None:
        raise AnomriError(
            "the score standardised needs the healthy residual's mean and spread; train with it."
        )
    return ((seen.residual.abs() - seen.mean) / seen.spread).clamp_min(0).mean(dim=1)


def standardised_by_position(seen: Evidence) -> Tensor:
    """`standardised` with the mean and spread of healthy tissue in that part of the brain."""
    return standardised(seen)


def positive_by_position(seen: Evidence) -> Tensor:
    """How much brighter than reconstructed, in standard deviations of healthy tissue there.

    For a scan without any of the score's channels, for example T1 alone, the residual counts either
    way.
    """
    if seen.mean is None or seen.spread is None or not seen.bright:
        return standardised(seen)
    return ((seen.residual - seen.mean) / seen.spread).clamp_min(0).mean(dim=1)


def ssim(seen: Evidence) -> Tensor:
    """1 - structural similarity (Wang et al.

    2004), mean of three windows and the channels (Behrendt et al. 2024).
    """
    windows = [
        1 - structural_similarity(seen.x, seen.reconstruction, window) for window in SSIM_WINDOWS
    ]
    return torch.stack(windows).mean(dim=(0, 2))


def anomaly_probability(seen: Evidence) -> Tensor:
    """The segmentation head's probability of an anomaly, 0 to 1 (Zavrtanik et al. 2021)."""
    if seen.probability is None:
        raise AnomriError(
            "the model has no segmentation head; train with the settings anomalies and "
            "segmentation_head (preset quick "
            "or accurate)."
        )
    return seen.probability


def probability_with_residual(seen: Evidence) -> Tensor:
    """Square root of the anomaly probability x (positive residual + `RESIDUAL_FLOOR`).

    For a scan without any of the score's channels, for example T1 alone, the residual counts either
    way.
    """
    residual = positive(seen) if seen.bright else absolute(seen)
    return anomaly_probability(seen).sqrt() * (residual + RESIDUAL_FLOOR)


def probability_with_residual_by_position(seen: Evidence) -> Tensor:
    """`probability_with_residual` by position in the brain.

    `positive_by_position` + `DEVIATION_FLOOR` takes the place of the plain residual.
    """
    return anomaly_probability(seen).sqrt() * (positive_by_position(seen) + DEVIATION_FLOOR)


def structural_similarity(x: Tensor, y: Tensor, window: int, reach: float = 1.0) -> Tensor:
    """SSIM of two (n, c, h, w), in square windows of equal weights.

    ``reach`` is the range of intensities.
    """
    c1, c2 = (0.01 * reach) ** 2, (0.03 * reach) ** 2

    # The layout in which pooling takes several maps at once.
    maps = torch.cat([x, y, x * x, y * y, x * y], 1).contiguous(memory_format=torch.channels_last)
    # Along rows, then along columns: far fewer additions than in the square at once.
    for kernel in ((1, window), (window, 1)):
        margins = (kernel[0] // 2, kernel[1] // 2)
        maps = functional.avg_pool2d(maps, kernel, 1, margins, count_include_pad=False)
    mean_x, mean_y, square_x, square_y, product = maps.contiguous().chunk(5, 1)
    variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    spread = variance_x.clamp_min(0) + variance_y.clamp_min(0)
    return luminance * (2 * covariance + c2) / (spread + c2)


def raw_score(
    x: Tensor,
    output: Tensor,
    channels: Sequence[str],
    score: Score,
    position: Position | None = None,
) -> Tensor:
    """The score ``score.kind`` of slices (n, c, h, w), before any filter: (n, h, w).

    ``output`` (n, c or c + 1, h, w) is a reconstruction and, with a segmentation head, the anomaly
    probability. A channel that is zero in all slices is one that the scan does not have, and does
    not count. ``position`` says where in the brain the slices lie, if they are not all of it. The
    score is zero beyond the brain's box and a margin. Raises `AnomriError` if there is no such
    score.
    """
    c, size = x.shape[1], (x.shape[2], x.shape[3])
    present = [k for k, there in enumerate(present_channels(x)) if there] or list(range(c))
    asked = [k for k in present if channels[k] in score.channels]
    chosen = asked or present
    bright = bool(asked) if score.channels else any(channels[k] in BRIGHT for k in chosen)
    score = _without_flair(score, channels, present)
    formula = registry.load(score.kind)

    position = position or Position.from_foreground(x.amax(1) > 0)
    box = widen_box(position.box, max(SSIM_WINDOWS) // 2, size)
    x, output = cut_box(x, box), cut_box(output, box)
    position = position.within(box)
    parts = []
    for first in range(0, len(x), SLICES_AT_ONCE):
        some = slice(first, first + SLICES_AT_ONCE)
        here = position._replace(heights=position.heights[some])
        mean, spread = _healthy_residual(x.shape, score, here, chosen)
        probability = output[some, c] if output.shape[1] > c else None
        seen = Evidence(x[some, chosen], output[some, chosen], probability, mean, spread, bright)
        parts.append(paste_box(formula(seen), size, box))
    return torch.cat(parts)


def _without_flair(score: Score, channels: Sequence[str], present: Sequence[int]) -> Score:
    """The score that takes the place of another for a scan without FLAIR, where FLAIR would count.

    Without it the residual is no second witness: on T2 cerebrospinal fluid is as bright as a lesion
    (docs/notes).
    """
    flair = BRIGHT[0]
    counts = flair in (score.channels or channels)
    substitute = registry.find(score.kind).without_flair
    if substitute and counts and flair not in [channels[k] for k in present]:
        return replace(score, kind=substitute)
    return score


def _healthy_residual(
    shape: torch.Size, score: Score, position: Position, chosen: list[int]
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Mean and spread of the healthy residual in the ``chosen`` channels.

    ``None`` where the score does not need them, or does not have them.
    """
    kind = registry.find(score.kind)
    if kind.needs_healthy_maps and score.healthy_maps:
        maps = unpack_maps(score.healthy_maps, shape[1])
        mean, spread = (
            interpolate_cells(cells[chosen], position, (shape[2], shape[3])) for cells in maps
        )
        return mean, spread.clamp_min(1e-4)
    if kind.needs_healthy_residual and score.healthy_mean and score.healthy_spread:
        mean = torch.tensor(score.healthy_mean)[chosen, None, None]
        return mean, torch.tensor(score.healthy_spread)[chosen, None, None]
    return None, None


def describe(score: Score) -> str:
    """A score in a few words.

    >>> describe(Score("positive", ("flair", "t2"), smoothing_mm=1.7))
    'positive of flair+t2, smoothed 1.7 mm'
    """
    words = score.kind
    if score.channels:
        words += f" of {'+'.join(score.channels)}"
    if score.smoothing_mm:
        words += f", smoothed {score.smoothing_mm:g} mm"
    return words


def check_score(score: Score, channels: Sequence[str], segmentation_head: bool) -> None:
    """Raise `AnomriError` if a model of ``channels`` cannot compute a score."""
    if registry.find(score.kind).needs_segmentation_head and not segmentation_head:
        raise AnomriError(
            f"the score {score.kind} needs a segmentation head, which the model does not have; "
            "train with the settings "
            f"anomalies and segmentation_head (preset quick or accurate)."
        )
    if score.erosion < 0:
        raise AnomriError(f"the score's erosion is 0 or more; found {score.erosion}.")
    unknown = sorted(set(score.channels) - set(channels))
    if unknown:
        raise AnomriError(
            f"the score looks at {', '.join(unknown)}; the model's channels are "
            f"{', '.join(channels)}."
        )
    if score.median not in MEDIANS:
        raise AnomriError(
            f"a median filter of a slice can be {', '.join(map(str, MEDIANS))} wide, not "
            f"{score.median}."
        )


def check_values(raw: Tensor, foreground: Tensor, method: str) -> None:
    """Raise `AnomriError` if a method scores foreground (n, h, w) below zero, NaN or infinite."""
    low, high = map(float, raw.masked_fill(~foreground, 0).aminmax())
    if not (low >= 0 and high < math.inf):
        raise AnomriError(
            f"the method {method} scores from {low:.4g} to {high:.4g} here; scores are numbers "
            "from 0 up."
        )
