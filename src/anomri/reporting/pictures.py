"""Pictures a person looks at: slices of a scan beside what was made of them, as RGB arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from torch import Tensor

from anomri.files import whole_file
from anomri.model.detection import Detection
from anomri.scans.case import shown_channel
from anomri.scans.volume import Volume
from anomri.scoring.metrics import drop_small_components
from anomri.slices import brain_box

Rgb = NDArray[np.uint8]

COLUMNS = ("scan", "reconstruction", "anomaly map", "mask", "truth")
PALETTE = np.array(
    [matplotlib.colormaps["inferno"](level, bytes=True)[:3] for level in range(256)], dtype=np.uint8
)
MASK_COLOUR = (60, 220, 255)
TRUTH_COLOUR = (150, 255, 70)
SIDE = 960
"""Width of the composed pictures in pixels."""
MOST_CLOSEUPS, CLOSEUP_MM = 8, 80.0


def preview(detection: Detection, size: int = 192) -> Rgb:
    """One row of square pictures of a scan's most telling slice, in the order of `COLUMNS`.

    The slice is the one with the most labelled lesion, else the one with the highest summed score, cut to the
    brain. The last picture is left out where there is no label. (size, size * columns, 3) uint8, patient's right
    on the left.
    """
    label = detection.stack.label
    weight = (
        detection.scores.sum(axis=(1, 2))
        if label is None or not label.any()
        else label.sum(dim=(1, 2)).numpy()
    )
    z = int(np.argmax(weight))
    shown = shown_channel(detection.volume.channels, detection.volume.missing)
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


def columns_of(detection: Detection) -> tuple[str, ...]:
    """What the panels of `preview` show."""
    return COLUMNS if detection.stack.label is not None else COLUMNS[:-1]


def planes(detection: Detection, width: int = SIDE) -> Rgb:
    """Axial, coronal and sagittal slices through the highest score of the mask (or map), side by side in one scale.

    The scan is under the map, with the outlines of mask and label. (height, ``width``, 3) uint8; the sides are
    marked R, L, A, P, S, I.
    """
    x, y, z = brain_sides(detection.volume)
    image = _shown_image(detection.volume)
    score = detection.anomaly_map
    weight = (
        score
        if detection.mask is None or not detection.mask.any()
        else np.where(detection.mask, score, -1)
    )
    peak = np.unravel_index(int(np.argmax(weight)), score.shape)
    sizes = np.multiply([s.stop - s.start for s in (x, y, z)], detection.volume.geometry.spacing_mm)
    scale = width / (2 * sizes[0] + sizes[1])
    w, d, h = (max(round(float(size * scale)), 1) for size in sizes)
    views: list[tuple[tuple[int | slice, ...], tuple[int, int], str]] = [
        ((x, y, int(peak[2])), (w, d), "RLAP"),
        ((x, int(peak[1]), z), (w, h), "RLSI"),
        ((int(peak[0]), y, z), (width - 2 * w, h), "APSI"),
    ]
    panels = []
    for place, size, marks in views:
        panel = _marked(_layered(detection, image, place, size, upward=marks[2] == "S"), marks)
        panels.append(np.pad(panel, ((0, max(d, h) - size[1]), (0, 0), (0, 0))))
    return np.concatenate(panels, axis=1)


def closeups(detection: Detection, width: int = SIDE, most: int = MOST_CLOSEUPS) -> Rgb | None:
    """The largest lesions, numbered, each in an axial square of `CLOSEUP_MM` around its centre; ``None`` without any.

    (``width`` / ``most``, ``width``, 3) uint8, under the map and the outlines.
    """
    if not detection.lesions:
        return None
    geometry, image = detection.volume.geometry, _shown_image(detection.volume)
    to_voxels = np.linalg.inv(geometry.canonical_affine)
    side = width // most
    row = np.zeros((side, width, 3), dtype=np.uint8)
    for number, lesion in enumerate(detection.lesions[:most]):
        centre = apply_affine(to_voxels, lesion.centroid_mm).round().astype(int)
        spans = []
        for axis in (0, 1):
            length = geometry.canonical_shape[axis]
            size = min(max(round(CLOSEUP_MM / geometry.spacing_mm[axis]), 1), length)
            first = min(max(int(centre[axis]) - size // 2, 0), length - size)
            spans.append(slice(first, first + size))
        cell = _layered(detection, image, (*spans, int(centre[2])), (side - 2, side))
        _text(cell, str(lesion.lesion), (4, 14), 0.42)
        row[:, number * side : number * side + side - 2] = cell
    return row


def lightbox(detection: Detection, width: int = SIDE, columns: int = 8, rows: int = 3) -> Rgb:
    """Axial slices at equal steps through the brain, lowest first, each under its map and outlines.

    (height, ``width``, 3) uint8; the first slice is marked R and L, each with its height in mm (scanner).
    """
    x, y, _ = brain_sides(detection.volume)
    image = _shown_image(detection.volume)
    geometry, index = detection.volume.geometry, detection.stack.index
    chosen = np.unique(
        np.linspace(index.start, index.stop - 1, columns * rows + 2)[1:-1].round().astype(int)
    )
    across, down, _ = geometry.spacing_mm
    w = width // columns
    h = round(w * (y.stop - y.start) * down / ((x.stop - x.start) * across))
    middle = ((x.start + x.stop) / 2, (y.start + y.stop) / 2)
    cells = []
    for number, z in enumerate(chosen.tolist()):
        cell = _layered(detection, image, (x, y, z), (w, h))
        height_mm = float((geometry.canonical_affine @ (*middle, z, 1))[2])
        _text(cell, f"{height_mm:.0f}", (3, h - 4), 0.33)
        cells.append(_marked(cell, "RL") if number == 0 else cell)
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    bands = [np.concatenate(cells[k : k + columns], axis=1) for k in range(0, len(cells), columns)]
    return np.concatenate(bands)


def score_counts(detection: Detection, bins: int) -> tuple[list[int], float]:
    """How many foreground pixels have a score in each bin of equal width from 0 to the highest; and the highest."""
    scores = detection.scores[detection.stack.foreground.numpy()]
    top = float(scores.max(initial=0)) or 1.0
    return np.histogram(scores, bins, (0, top))[0].tolist(), top


def brain_sides(volume: Volume, margin: int = 2) -> tuple[slice, slice, slice]:
    """The sides (x, y, z) of a box around the brain of a scan, with a margin; all of the scan if there is none."""
    x, y, z = (
        slice(max(side.start - margin, 0), min(side.stop + margin, length))
        if side.stop
        else slice(0, length)
        for side, length in zip(volume.brain, volume.geometry.canonical_shape, strict=True)
    )
    return x, y, z


def overlay(image: Rgb, score: NDArray[np.float32], low: float, high: float) -> Rgb:
    """``image`` under the colours of a score map; scores up to ``low`` leave it as it is."""
    level = np.clip((score - low) / max(high - low, 1e-6), 0, 1)
    opacity = 0.6 * np.clip(4 * level, 0, 1)[..., None]
    colours = PALETTE[(90 + 165 * level).astype(np.intp)]
    return ((1 - opacity) * image + opacity * colours).astype(np.uint8)


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


def write_jpeg(path: Path, picture: Rgb, quality: int = 80) -> None:
    """Write a picture, whole or not at all; thin coloured lines keep their colour."""
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    _, encoded = cv2.imencode(
        ".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality, *sampling]
    )
    with whole_file(path) as partial:
        partial.write_bytes(encoded.tobytes())


def _mask(detection: Detection) -> NDArray[np.bool_]:
    """The mask on the working grid (n, h, w), as its components are filtered there; empty without a threshold."""
    above = detection.scores > (np.inf if detection.threshold is None else detection.threshold)
    return drop_small_components(
        above, detection.spec.score.max_dropped(detection.stack.spacing_mm)
    )


def _shown_image(volume: Volume) -> NDArray[np.float32]:
    return volume.channel(shown_channel(volume.channels, volume.missing))


def _layered(
    detection: Detection,
    image: NDArray[np.float32],
    place: tuple[int | slice, ...],
    size: tuple[int, int],
    *,
    upward: bool = False,
) -> Rgb:
    """One plane of a scan's ``image`` on its own grid, ``size`` = (width, height), under the map and the outlines."""

    def plane(data: NDArray[Any]) -> NDArray[np.float32]:
        turned = data[place].T[::-1] if upward else data[place].T
        resized = cv2.resize(
            np.ascontiguousarray(turned, np.float32), size, interpolation=cv2.INTER_LINEAR
        )
        return np.asarray(resized, np.float32)

    shown = shown_channel(detection.volume.channels, detection.volume.missing)
    low, high = detection.display_range
    drawn = grey(detection.stack.scale[shown](plane(image)))
    drawn = overlay(drawn, plane(detection.anomaly_map), low, high)
    for mask, colour in ((detection.mask, MASK_COLOUR), (detection.volume.label, TRUTH_COLOUR)):
        if mask is not None and mask[place].any():
            inside = (plane(mask) > 0.5).astype(np.uint8)
            drawn[(inside - cv2.erode(inside, np.ones((3, 3), np.uint8))).astype(bool)] = colour
    return drawn


def _marked(panel: Rgb, marks: str) -> Rgb:
    """``panel`` with letters in the middle of its left, right, upper and lower side."""
    h, w = panel.shape[:2]
    places = ((4, h // 2 + 5), (w - 15, h // 2 + 5), (w // 2 - 5, 15), (w // 2 - 5, h - 6))
    for mark, place in zip(marks, places, strict=False):
        _text(panel, mark, place, 0.45)
    return panel


def _text(panel: Rgb, text: str, place: tuple[int, int], size: float) -> None:
    for colour, thickness in (((0, 0, 0), 3), ((235, 235, 235), 1)):
        cv2.putText(
            panel, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, colour, thickness, cv2.LINE_AA
        )


def _square_around(foreground: Tensor) -> tuple[slice, slice]:
    """Rows and columns of a square around the brain of all slices, with a small margin."""
    top, bottom, left, right = brain_box(foreground, 1)
    side = min(max(bottom - top, right - left) + 6, *foreground.shape[1:])
    starts = [
        min(max((first + stop - side) // 2, 0), length - side)
        for first, stop, length in zip(
            (top, left), (bottom, right), foreground.shape[1:], strict=True
        )
    ]
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def _upright(panel: Rgb, size: int) -> Rgb:
    # (x, y) in LPS: rows of the picture are y, anterior first, and its columns x, the patient's right first.
    turned = np.ascontiguousarray(panel.transpose(1, 0, 2))
    return np.asarray(
        cv2.resize(turned, (size, size), interpolation=cv2.INTER_LINEAR), dtype=np.uint8
    )
