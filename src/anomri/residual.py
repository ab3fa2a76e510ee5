"""From a residual to an anomaly map (Kascenas et al. 2022, section 3.3), on stacks of slices."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from anomri.spec import Score


def mean_absolute_residual(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean over the channels of \\|x - reconstruction\\|: (n, c, h, w) twice -> (n, h, w)."""
    return (x - reconstruction).abs().mean(dim=1)


def erode_foreground(foreground: Tensor, kernel: int = 5, level: float = 0.95) -> Tensor:
    """Pixels whose ``kernel`` x ``kernel`` neighbourhood is foreground by more than ``level``: (n, h, w) bool -> bool.

    What lies outside the slice counts as background.
    """
    share = functional.avg_pool2d(foreground[:, None].float(), kernel, stride=1, padding=kernel // 2)
    return share[:, 0] > level


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


def anomaly_score(raw: Tensor, foreground: Tensor, score: Score) -> NDArray[np.float32]:
    """The anomaly map of a stack of slices: ``median(F * raw)``, with F the eroded foreground.

    ``raw`` is (n, h, w), what a method could not explain; ``foreground`` (n, h, w) bool. A kernel of 0 in
    ``score`` leaves that filter out.
    """
    if score.erosion:
        foreground = erode_foreground(foreground, score.erosion, score.erosion_level)
    masked = (raw.float() * foreground).cpu().numpy()
    return median_filter(masked, score.median) if score.median else masked
