"""From a residual to an anomaly map (Kascenas et al. 2022, section 3.3), on stacks of slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from anomri.errors import AnomriError
from anomri.scoring import registry
from anomri.scoring.positions import spread_over, unpacked_maps
from anomri.slices import Box, Position, brain_box, cut_box, paste_box, present_channels
from anomri.spec import Score

BRIGHT = ("flair", "t2")
"""Channels on which most lesions are bright."""
SSIM_WINDOWS = (5, 9, 15)
TRUNCATE = 3.0
"""Standard deviations at which a Gaussian filter ends."""
MEDIANS = (0, 3, 5)
"""How wide the median filter of a slice can be; 0: none. OpenCV sorts floats in no larger windows."""
AT_ONCE = 16
"""Slices that are scored at the same time."""
RESIDUAL_FLOOR = 0.02
"""Weight of the anomaly probability where nothing is brighter than reconstructed."""
DEVIATION_FLOOR = 0.2
"""The same in standard deviations."""


@dataclass(frozen=True)
class Evidence:
    """What a score looks at: scan and reconstruction (n, k, h, w) of its k channels, and the anomaly probability.

    ``probability`` is (n, h, w), or ``None`` without a segmentation head; ``mean`` and ``spread`` are the absolute residual's in
    healthy tissue, (k, 1, 1) or for each pixel, (n, k, h, w).
    """

    x: Tensor
    reconstruction: Tensor
    probability: Tensor | None = None
    mean: Tensor | None = None
    spread: Tensor | None = None
    bright: bool = True
    """Whether lesions are bright in one of these channels, as far as the score knows; else they may be dark."""

    @property
    def residual(self) -> Tensor:
        """Scan - reconstruction."""
        return self.x - self.reconstruction


def absolute(seen: Evidence) -> Tensor:
    """Mean over the channels of \\|x - reconstruction\\| (Kascenas et al. 2022)."""
    return mean_absolute_residual(seen.x, seen.reconstruction)


def positive(seen: Evidence) -> Tensor:
    """How much brighter than reconstructed: the residual above 0 (Baur et al. 2021, section 3.4)."""
    return seen.residual.clamp_min(0).mean(dim=1)


def negative(seen: Evidence) -> Tensor:
    """How much darker than reconstructed."""
    return (-seen.residual).clamp_min(0).mean(dim=1)


def standardised(seen: Evidence) -> Tensor:
    """Mean of the channels' absolute residual in standard deviations above its healthy mean, no less than 0."""
    if seen.mean is None or seen.spread is None:
        raise AnomriError(
            "the score standardised needs the healthy residual's mean and spread; train with it."
        )
    return ((seen.residual.abs() - seen.mean) / seen.spread).clamp_min(0).mean(dim=1)


def standardised_by_position(seen: Evidence) -> Tensor:
    """The same with the mean and spread of healthy tissue in that part of the brain."""
    return standardised(seen)


def positive_by_position(seen: Evidence) -> Tensor:
    """How much brighter than reconstructed, in standard deviations above what healthy tissue in that part of the brain is.

    Of a scan without any of the score's channels, say T1 alone, the residual counts either way.
    """
    if seen.mean is None or seen.spread is None or not seen.bright:
        return standardised(seen)
    return ((seen.residual - seen.mean) / seen.spread).clamp_min(0).mean(dim=1)


def ssim(seen: Evidence) -> Tensor:
    """1 - structural similarity (Wang et al. 2004), mean of three windows and the channels (Behrendt et al. 2024)."""
    windows = [
        1 - structural_similarity(seen.x, seen.reconstruction, window) for window in SSIM_WINDOWS
    ]
    return torch.stack(windows).mean(dim=(0, 2))


def anomaly_probability(seen: Evidence) -> Tensor:
    """The segmentation head's probability of an anomaly, 0 to 1 (Zavrtanik et al. 2021)."""
    if seen.probability is None:
        raise AnomriError(
            "the model has no segmentation head; train with the settings anomalies and segmentation_head (preset quick "
            "or accurate)."
        )
    return seen.probability


def probability_with_residual(seen: Evidence) -> Tensor:
    """Square root of the anomaly probability x the positive residual (+ `RESIDUAL_FLOOR`): what two witnesses agree on.

    Of a scan without any of the score's channels, say T1 alone, the residual counts either way; of one that lacks FLAIR
    where the score looks at it, the probability alone counts.
    """
    return anomaly_probability(seen).sqrt() * (
        (positive(seen) if seen.bright else absolute(seen)) + RESIDUAL_FLOOR
    )


def probability_with_residual_by_position(seen: Evidence) -> Tensor:
    """The same with `positive_by_position` (+ `DEVIATION_FLOOR`) in place of the plain positive residual."""
    return anomaly_probability(seen).sqrt() * (positive_by_position(seen) + DEVIATION_FLOOR)


def check_score(score: Score, channels: Sequence[str], segmentation_head: bool) -> None:
    """Raise `AnomriError` if a model of ``channels``, with or without a segmentation head, cannot compute a score."""
    if registry.find(score.kind).needs_segmentation_head and not segmentation_head:
        raise AnomriError(
            f"the score {score.kind} needs a segmentation head, which the model does not have; train with the settings "
            f"anomalies and segmentation_head (preset quick or accurate)."
        )
    if score.erosion < 0:
        raise AnomriError(f"the score's erosion is 0 or more; found {score.erosion}.")
    unknown = sorted(set(score.channels) - set(channels))
    if unknown:
        raise AnomriError(
            f"the score looks at {', '.join(unknown)}; the model's channels are {', '.join(channels)}."
        )
    if score.median not in MEDIANS:
        raise AnomriError(
            f"a median filter of a slice can be {', '.join(map(str, MEDIANS))} wide, not {score.median}."
        )


def describe(score: Score) -> str:
    """A score in a few words."""
    words = score.kind + (f" of {'+'.join(score.channels)}" if score.channels else "")
    return words + (f", smoothed {score.smoothing_mm:g} mm" if score.smoothing_mm else "")


def score_of(
    x: Tensor,
    output: Tensor,
    channels: Sequence[str],
    score: Score,
    position: Position | None = None,
) -> Tensor:
    """The score ``score.kind`` of slices (n, c, h, w) and what a method made of them, before erosion: (n, h, w).

    ``output`` (n, c or c + 1, h, w) is a reconstruction and, with a segmentation head, the anomaly probability. A channel that is zero in all slices is one
    that the scan does not have, and is left out. ``position`` says where in the brain the slices lie, if they are not all
    of its; the score is zero beyond the brain's box and a margin. Raises `AnomriError` if there is no such score.
    """
    c = x.shape[1]
    present = [k for k, there in enumerate(present_channels(x)) if there] or list(range(c))
    asked = [k for k in present if channels[k] in score.channels]
    chosen = asked or present
    place = position or Position.from_foreground(x.amax(1) > 0)
    size = (x.shape[2], x.shape[3])
    box = _wider(place.box, max(SSIM_WINDOWS) // 2, size)
    x, output = cut_box(x, box), cut_box(output, box)
    top, bottom, left, right = place.box
    place = place._replace(box=(top - box[0], bottom - box[0], left - box[2], right - box[2]))

    score = _for_channels(score, channels, present)
    formula = registry.load(score.kind)

    def of(some: slice) -> Tensor:
        here = place._replace(heights=place.heights[some])
        mean, spread = _healthy_residual(x.shape, score, here, chosen)
        probability = output[some, c] if output.shape[1] > c else None
        bright = bool(asked) if score.channels else any(channels[k] in BRIGHT for k in chosen)
        seen = Evidence(x[some, chosen], output[some, chosen], probability, mean, spread, bright)
        return paste_box(formula(seen), size, box)

    # What lies between a scan and its score is several times as large as either.
    return torch.cat([of(slice(first, first + AT_ONCE)) for first in range(0, len(x), AT_ONCE)])


def _for_channels(score: Score, channels: Sequence[str], present: Sequence[int]) -> Score:
    """The score, but by the probability alone for a scan that lacks FLAIR where it would count.

    Without it the residual is no second witness: on T2 cerebrospinal fluid is as bright as a lesion (docs/notes).
    """
    first = BRIGHT[0]
    lacks = first in (score.channels or channels) and first not in [channels[k] for k in present]
    substitute = registry.find(score.kind).without_flair
    return replace(score, kind=substitute) if lacks and substitute else score


def _wider(box: Box, margin: int, size: tuple[int, int]) -> Box:
    """A box with so many pixels more on every side, as far as the grid has them."""
    top, bottom, left, right = box
    return (
        max(top - margin, 0),
        min(bottom + margin, size[0]),
        max(left - margin, 0),
        min(right + margin, size[1]),
    )


def _healthy_residual(
    shape: torch.Size, score: Score, position: Position, chosen: list[int]
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Mean and spread of the ``chosen`` channels' absolute residual in healthy tissue, as far as the score knows them."""
    kind = registry.find(score.kind)
    if kind.needs_healthy_maps and score.healthy_maps:
        maps = unpacked_maps(score.healthy_maps, shape[1])
        mean, spread = (
            spread_over(cells[chosen], position, (shape[2], shape[3])) for cells in maps
        )
        return mean, spread.clamp_min(1e-4)
    if kind.needs_healthy_residual and score.healthy_mean and score.healthy_spread:
        known = (score.healthy_mean, score.healthy_spread)
        mean, spread = (torch.tensor(values)[chosen, None, None] for values in known)
        return mean, spread
    return None, None


def structural_similarity(x: Tensor, y: Tensor, window: int, reach: float = 1.0) -> Tensor:
    """SSIM of (n, c, h, w) and the same, in windows of ``window`` pixels of even weight; ``reach`` is a usual range."""
    c1, c2 = (0.01 * reach) ** 2, (0.03 * reach) ** 2

    def mean(z: Tensor) -> Tensor:
        return functional.avg_pool2d(
            z, window, stride=1, padding=window // 2, count_include_pad=False
        )

    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (
        luminance * (2 * covariance + c2) / (variance_x.clamp_min(0) + variance_y.clamp_min(0) + c2)
    )


def mean_absolute_residual(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean over the channels of \\|x - reconstruction\\|: (n, c, h, w) twice -> (n, h, w)."""
    return (x - reconstruction).abs().mean(dim=1)


def erode_foreground(foreground: Tensor, kernel: int = 5, level: float = 0.95) -> Tensor:
    """Pixels whose ``kernel`` x ``kernel`` neighbourhood is foreground by more than ``level``: (n, h, w) bool -> bool.

    What lies outside the slice counts as background.
    """
    shares = [
        cv2.boxFilter(inside, cv2.CV_32F, (kernel, kernel), borderType=cv2.BORDER_CONSTANT)
        for inside in foreground.cpu().numpy().astype(np.uint8)
    ]
    return torch.from_numpy(np.stack(shares) > level).to(foreground.device)


def median_filter(score: NDArray[np.float32], kernel: int = 5) -> NDArray[np.float32]:
    """Median of each pixel's ``kernel`` x ``kernel`` neighbourhood, slice by slice; borders are reflected.

    ``score`` is (n, h, w) float32, ``kernel`` 3 or 5 (what OpenCV sorts in float32).
    """
    margin = kernel // 2
    filtered = np.empty_like(score)
    for target, image in zip(filtered, score, strict=True):
        padded = cv2.copyMakeBorder(image, margin, margin, margin, margin, cv2.BORDER_REFLECT_101)
        target[:] = cv2.medianBlur(padded, kernel)[margin:-margin, margin:-margin]
    return filtered


def check_values(raw: Tensor, foreground: Tensor, method: str) -> None:
    """Raise `AnomriError` if a method scores foreground (n, h, w) as what is no number, or below the background's zero."""
    low, high = map(float, raw.masked_fill(~foreground, 0).aminmax())
    if not (low >= 0 and high < math.inf):
        raise AnomriError(
            f"the method {method} scores from {low:.4g} to {high:.4g} here; scores are numbers from 0 up."
        )


def anomaly_score(
    raw: Tensor,
    foreground: Tensor,
    score: Score,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> NDArray[np.float32]:
    """The anomaly map of a stack of slices: ``median(F * raw)``, with F the eroded foreground.

    ``raw`` is (n, h, w), what a method could not explain; ``foreground`` (n, h, w) bool. A kernel of 0 in
    ``score`` leaves that filter out. ``spacing_mm`` is that of slices, rows and columns.
    """
    size = (raw.shape[1], raw.shape[2])
    reach = math.ceil(TRUNCATE * score.smoothing_mm / min(spacing_mm[1:])) + score.median // 2 + 1
    # Beyond the brain, and what a filter carries out of it, all is zero.
    box = _wider(brain_box(foreground.cpu(), 1), reach, size)
    raw, foreground = cut_box(raw, box), cut_box(foreground, box)
    if score.erosion:
        foreground = erode_foreground(foreground, score.erosion, score.erosion_level)
    scores = (raw.float() * foreground).cpu().numpy()
    if score.median:
        scores = median_filter(scores, score.median)
    if score.smoothing_mm:
        sigma = [score.smoothing_mm / mm for mm in spacing_mm]
        scores = ndimage.gaussian_filter(scores, sigma, truncate=TRUNCATE)
    return paste_box(torch.from_numpy(scores), size, box).numpy()
