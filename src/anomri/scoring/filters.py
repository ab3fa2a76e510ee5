"""From the scores of pixels to an anomaly map (Kascenas et al.

2022, section 3.3): erosion, median, smoothing.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from anomri.slices import brain_box, cut_box, paste_box, widen_box
from anomri.spec import Score

TRUNCATE = 3.0
"""Standard deviations at which a Gaussian filter ends."""
MEDIANS = (0, 3, 5)
"""Widths of the median filter; 0: none. OpenCV sorts floats in no larger windows."""


def anomaly_score(
    raw: Tensor,
    foreground: Tensor,
    score: Score,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> NDArray[np.float32]:
    """The anomaly map of a stack of slices: ``median(F * raw)``, with F the eroded foreground.

    ``raw`` (n, h, w) are scores before any filter; ``foreground`` (n, h, w) bool. A kernel of 0 in
    ``score`` leaves that filter out. ``spacing_mm`` is that of slices, rows and columns.
    """
    size = (raw.shape[1], raw.shape[2])
    smoothed = math.ceil(TRUNCATE * score.smoothing_mm / min(spacing_mm[1:]))
    # Beyond the brain, and what a filter carries out of it, all is zero.
    box = widen_box(brain_box(foreground.cpu(), 1), smoothed + score.median // 2 + 1, size)
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


def erode_foreground(foreground: Tensor, kernel: int = 5, level: float = 0.95) -> Tensor:
    """Pixels whose ``kernel`` x ``kernel`` neighbourhood is foreground by more than ``level``.

    (n, h, w) bool -> bool. What lies outside the slice counts as background.
    """
    shares = [
        cv2.boxFilter(inside, cv2.CV_32F, (kernel, kernel), borderType=cv2.BORDER_CONSTANT)
        for inside in foreground.cpu().numpy().astype(np.uint8)
    ]
    return torch.from_numpy(np.stack(shares) > level).to(foreground.device)


def median_filter(score: NDArray[np.float32], kernel: int = 5) -> NDArray[np.float32]:
    """Median of each pixel's ``kernel`` x ``kernel`` neighbourhood, slice by slice.

    Borders are reflected. ``score`` is (n, h, w) float32, ``kernel`` 3 or 5.
    """
    margin = kernel // 2
    filtered = np.empty_like(score)
    for target, image in zip(filtered, score, strict=True):
        padded = cv2.copyMakeBorder(image, margin, margin, margin, margin, cv2.BORDER_REFLECT_101)
        target[:] = cv2.medianBlur(padded, kernel)[margin:-margin, margin:-margin]
    return filtered
