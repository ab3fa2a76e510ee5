"""Pictures a person looks at: slices of a scan beside what was made of them, as RGB arrays."""

from __future__ import annotations

from pathlib import Path

import cv2
import matplotlib
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from anomri.detector import Detection
from anomri.files import whole_file
from anomri.metrics import drop_small_components
from anomri.slices import brain_box

Rgb = NDArray[np.uint8]

COLUMNS = ("scan", "reconstruction", "anomaly map", "mask", "truth")
PALETTE = np.array([matplotlib.colormaps["inferno"](level, bytes=True)[:3] for level in range(256)], dtype=np.uint8)
MASK_COLOUR = (230, 90, 40)
TRUTH_COLOUR = (40, 190, 90)


def preview(detection: Detection, size: int = 192) -> Rgb:
    """One row of square pictures of a scan's most telling slice, in the order of `COLUMNS`.

    The slice is the one with the most labelled lesion, else the one with the highest summed score, cut to the
    brain. The last picture is left out where there is no label. (size, size * columns, 3) uint8, patient's right
    on the left.
    """
    label = detection.stack.label
    weight = detection.scores.sum(axis=(1, 2)) if label is None or not label.any() else label.sum(dim=(1, 2)).numpy()
    z = int(np.argmax(weight))
    channels = detection.volume.channels
    shown = channels.index("flair") if "flair" in channels else 0
    _, high = detection.display_range
    scan = grey(detection.stack.x[z, shown].numpy())
    healthy = grey(detection.reconstructed[z, shown].numpy())
    score = detection.scores[z]
    panels = [scan, healthy, heat(score, high)]
    panels.append(outline(scan, _mask(detection)[z], MASK_COLOUR))
    if label is not None:
        panels.append(outline(scan, label[z].numpy(), TRUTH_COLOUR))
    cut = _square_around(detection.stack.foreground)
    return np.concatenate([_upright(panel[cut], size) for panel in panels], axis=1)


def grey(image: NDArray[np.float32], white: float = 1.2) -> Rgb:
    """A scaled slice (h, w) in grey; ``white`` is the brightness shown as white."""
    scaled = np.clip(image / white, 0, 1) * 255
    return np.repeat(scaled.astype(np.uint8)[..., None], 3, axis=2)


def heat(score: NDArray[np.float32], high: float) -> Rgb:
    """A score map (h, w) in colour, from 0 (black) to ``high``."""
    levels = np.clip(score / max(high, 1e-6), 0, 1) * 255
    return PALETTE[levels.astype(np.intp)]


def outline(image: Rgb, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Rgb:
    """``image`` with ``mask`` tinted and its edge drawn in ``colour``."""
    inside = mask.astype(np.uint8)
    edge = (inside - cv2.erode(inside, np.ones((3, 3), np.uint8))).astype(bool)
    drawn: Rgb = image.copy()
    drawn[mask] = (0.65 * drawn[mask] + 0.35 * np.array(colour)).astype(np.uint8)
    drawn[edge] = colour
    return drawn


def write_png(path: Path, picture: Rgb) -> None:
    """Write a picture, whole or not at all."""
    _, encoded = cv2.imencode(".png", picture[..., ::-1])
    with whole_file(path) as partial:
        partial.write_bytes(encoded.tobytes())


def _mask(detection: Detection) -> NDArray[np.bool_]:
    """The mask on the working grid (n, h, w), as its components are filtered there; empty without a threshold."""
    thresholds = detection.spec.thresholds
    above = detection.scores > (thresholds.threshold if thresholds else np.inf)
    return drop_small_components(above, detection.spec.score.max_dropped_voxels)


def _square_around(foreground: Tensor) -> tuple[slice, slice]:
    """Rows and columns of a square around the brain of all slices, with a small margin."""
    top, bottom, left, right = brain_box(foreground, 1)
    side = min(max(bottom - top, right - left) + 6, *foreground.shape[1:])
    starts = [
        min(max((first + stop - side) // 2, 0), length - side)
        for first, stop, length in zip((top, left), (bottom, right), foreground.shape[1:], strict=True)
    ]
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def _upright(panel: Rgb, size: int) -> Rgb:
    # (x, y) in LPS: rows of the picture are y, anterior first, and its columns x, the patient's right first.
    turned = np.ascontiguousarray(panel.transpose(1, 0, 2))
    return np.asarray(cv2.resize(turned, (size, size), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
