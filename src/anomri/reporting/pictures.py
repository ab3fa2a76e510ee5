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
from anomri.scans.geometry import Geometry
from anomri.scans.volume import Volume
from anomri.scoring.metrics import drop_small_components
from anomri.slices import brain_box

Rgb = NDArray[np.uint8]

COLUMNS = ("scan", "reconstruction", "anomaly map", "mask", "label")
PALETTE: Rgb = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3].copy()
FIRST_COLOUR = 90
"""Where the colours of an overlay begin in the palette: its darkest would look like shadows."""
MASK_COLOUR = (60, 220, 255)
TRUTH_COLOUR = (150, 255, 70)
NUMBER_COLOUR = (255, 255, 255)
PANEL = 192
"""Side of a panel of `preview` in pixels."""
SIDE = 960
"""Width of the composed pictures in pixels."""
MOST_CLOSEUPS = 6
CLOSEUP_MM = 80.0
OPACITY = 0.5
"""Of the colours of the anomaly map over a scan."""


def telling_slice(detection: Detection) -> int:
    """The slice of the working grid with the most labelled lesion, or the highest summed score."""
    label = detection.stack.label
    if label is None or not label.any():
        return int(np.argmax(detection.scores.sum(axis=(1, 2))))
    return int(np.argmax(label.sum(dim=(1, 2)).numpy()))


def preview(detection: Detection, z: int, reconstruction: Rgb | None = None) -> Rgb | None:
    """One row of square pictures of the slice ``z`` of the working grid, as `panel_names` says.

    Cut to the brain, (`PANEL`, `PANEL` * panels, 3) uint8, patient's right on the left.
    ``reconstruction`` is the panel of an earlier picture, for a detection in a stored map; ``None``
    if that has none.
    """
    cut = _square_around(detection.stack.foreground)
    shown = shown_channel(detection.volume.channels, detection.volume.missing)
    if detection.reconstructed is not None:
        reconstruction = _upright(grey(detection.reconstructed[z, shown].numpy())[cut])
    if reconstruction is None:
        return None
    scan = grey(detection.stack.x[z, shown].numpy())
    score, label = detection.scores[z], detection.stack.label
    panels = [
        _upright(scan[cut]),
        reconstruction,
        _upright(heat(score, colour_range(detection)[1])[cut]),
        _upright(outline(scan, _mask(detection)[z], MASK_COLOUR)[cut]),
    ]
    if label is not None:
        panels.append(_upright(outline(scan, label[z].numpy(), TRUTH_COLOUR)[cut]))
    return np.concatenate(panels, axis=1)


def read_reconstruction_panel(path: Path) -> Rgb | None:
    """The reconstruction in a picture that `preview` made; ``None`` if it cannot be read."""
    picture = cv2.imread(str(path))
    if picture is None:
        return None
    column = COLUMNS.index("reconstruction")
    return picture[:, column * PANEL : (column + 1) * PANEL, ::-1].astype(np.uint8)


def panel_names(detection: Detection) -> tuple[str, ...]:
    """What the panels of `preview` show; the label is the last, where there is one."""
    return COLUMNS if detection.stack.label is not None else COLUMNS[:-1]


def colour_range(detection: Detection) -> tuple[float, float]:
    """The scores between which a scan's map is coloured: from the threshold to the scan's highest
    score."""
    low = detection.threshold
    if low is None:
        low = detection.display_range[0]
    return low, max(float(detection.anomaly_map.max()), 1.05 * low)


def planes(detection: Detection, width: int = SIDE) -> Rgb:
    """Axial, coronal and sagittal slices through the highest score of the mask (or map), side by
    side in one scale.

    Above is the scan alone, below the same under the map, with the outlines of mask and label.
    (height, ``width``, 3) uint8; the sides are marked R, L, A, P, S, I.
    """
    x, y, z = brain_sides(detection.volume)
    image = _shown_image(detection.volume)
    peak = _peak(detection)
    sizes = np.multiply([s.stop - s.start for s in (x, y, z)], detection.volume.geometry.spacing_mm)
    scale = width / (2 * sizes[0] + sizes[1])
    w, d, h = (max(round(float(size * scale)), 1) for size in sizes)
    views: list[tuple[tuple[int | slice, ...], tuple[int, int], str]] = [
        ((x, y, peak[2]), (w, d), "RLAP"),
        ((x, peak[1], z), (w, h), "RLSI"),
        ((peak[0], y, z), (width - 2 * w, h), "APSI"),
    ]
    rows = []
    for draw in (_draw_scan, _draw_findings):
        panels = []
        for place, size, letters in views:
            panel = draw(detection, image, place, size, upward=letters[2] == "S")
            panel = _with_letters(panel, letters)
            panels.append(np.pad(panel, ((0, max(d, h) - size[1]), (0, 0), (0, 0))))
        rows.append(np.concatenate(panels, axis=1))
    return np.concatenate(rows)


def _peak(detection: Detection) -> tuple[int, int, int]:
    """The voxel (x, y, z) of the highest score, in the mask if that has any voxel."""
    score = detection.anomaly_map
    if detection.mask is not None and detection.mask.any():
        score = np.where(detection.mask, score, -1)
    x, y, z = np.unravel_index(int(np.argmax(score)), score.shape)
    return int(x), int(y), int(z)


def closeups(detection: Detection, width: int = SIDE, most: int = MOST_CLOSEUPS) -> Rgb | None:
    """The largest lesions, numbered, each in an axial square of `CLOSEUP_MM` around its centre;
    ``None`` without any.

    Above is the scan alone, below the same under the map and the outlines. (2 * side, lesions *
    side, 3) uint8, where side is ``width`` / ``most``.
    """
    if not detection.lesions:
        return None
    image = _shown_image(detection.volume)
    side = width // most
    cells = []
    for lesion in detection.lesions[:most]:
        place = _square_at(detection.volume.geometry, lesion.centroid_mm)
        alone = _draw_scan(detection, image, place, (side - 2, side))
        below = _draw_findings(detection, image, place, (side - 2, side))
        _write_number(alone, lesion.lesion, (6, 6), 0.7)
        cells.append(np.pad(np.concatenate([alone, below]), ((0, 0), (0, 2), (0, 0))))
    return np.concatenate(cells, axis=1)


def _square_at(
    geometry: Geometry, centre_mm: tuple[float, float, float]
) -> tuple[slice, slice, int]:
    """An axial square of `CLOSEUP_MM` around a place in scanner mm, moved into the image where it
    would leave it."""
    to_voxels = np.linalg.inv(geometry.canonical_affine)
    x, y, z = apply_affine(to_voxels, centre_mm).round().astype(int).tolist()
    spans = []
    for axis, centre in enumerate((x, y)):
        length = geometry.canonical_shape[axis]
        size = min(max(round(CLOSEUP_MM / geometry.spacing_mm[axis]), 1), length)
        first = min(max(centre - size // 2, 0), length - size)
        spans.append(slice(first, first + size))
    return spans[0], spans[1], z


def lightbox(detection: Detection, width: int = SIDE, columns: int = 8, rows: int = 3) -> Rgb:
    """Axial slices at equal steps through the brain, lowest first, each under its map and outlines.

    The largest findings are numbered in the slices that are nearest to their centres. (height,
    ``width``, 3) uint8; the first slice is marked R and L, each with its height in mm (scanner).
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
    for z in chosen.tolist():
        cell = _draw_findings(detection, image, (x, y, z), (w, h))
        height_mm = float((geometry.canonical_affine @ (*middle, z, 1))[2])
        _write(cell, f"{height_mm:.0f}", (3, h - 4), 0.33)
        cells.append(cell)
    _with_letters(cells[0], "RL")
    to_voxels = np.linalg.inv(geometry.canonical_affine)
    for lesion in reversed(detection.lesions[:MOST_CLOSEUPS]):
        centre = apply_affine(to_voxels, lesion.centroid_mm)
        nearest = int(np.argmin(np.abs(chosen - centre[2])))
        across_px = (centre[0] - x.start) / (x.stop - x.start) * w
        down_px = (centre[1] - y.start) / (y.stop - y.start) * h
        _write_number(
            cells[nearest], lesion.lesion, (round(across_px) + 9, round(down_px) - 7), 0.4
        )
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    bands = [np.concatenate(cells[k : k + columns], axis=1) for k in range(0, len(cells), columns)]
    return np.concatenate(bands)


def score_counts(detection: Detection, bins: int) -> tuple[list[int], float]:
    """How many foreground pixels have a score in each bin of equal width from 0 to the highest; and
    the highest."""
    scores = detection.scores[detection.stack.foreground.numpy()]
    top = float(scores.max(initial=0)) or 1.0
    return np.histogram(scores, bins, (0, top))[0].tolist(), top


def brain_sides(volume: Volume, margin: int = 2) -> tuple[slice, slice, slice]:
    """The sides (x, y, z) of a box around the brain of a scan, with a margin; all of the scan if
    there is none."""
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
    opacity = OPACITY * (score > low)[..., None]
    colours = PALETTE[(FIRST_COLOUR + (255 - FIRST_COLOUR) * level).astype(np.intp)]
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
    drawn: Rgb = image.copy()
    drawn[mask] = (0.65 * drawn[mask] + 0.35 * np.array(colour)).astype(np.uint8)
    drawn[_edge(inside)] = colour
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
    """The mask on the working grid (n, h, w), as its components are filtered there; empty without a
    threshold."""
    above = detection.scores > (np.inf if detection.threshold is None else detection.threshold)
    return drop_small_components(
        above, detection.spec.score.max_dropped(detection.stack.spacing_mm)
    )


def _shown_image(volume: Volume) -> NDArray[np.float32]:
    return volume.channel(shown_channel(volume.channels, volume.missing))


def _draw_scan(
    detection: Detection,
    image: NDArray[np.float32],
    place: tuple[int | slice, ...],
    size: tuple[int, int],
    *,
    upward: bool = False,
) -> Rgb:
    """One plane of a scan's ``image`` on its own grid in grey, ``size`` = (width, height)."""
    shown = shown_channel(detection.volume.channels, detection.volume.missing)
    return grey(detection.stack.scale[shown](_plane(image, place, size, upward)))


def _draw_findings(
    detection: Detection,
    image: NDArray[np.float32],
    place: tuple[int | slice, ...],
    size: tuple[int, int],
    *,
    upward: bool = False,
) -> Rgb:
    """The same under the map and the outlines of mask and label."""
    drawn = _draw_scan(detection, image, place, size, upward=upward)
    score = _plane(detection.anomaly_map, place, size, upward)
    drawn = overlay(drawn, score, *colour_range(detection))
    for mask, colour in ((detection.mask, MASK_COLOUR), (detection.volume.label, TRUTH_COLOUR)):
        if mask is not None and mask[place].any():
            inside = (_plane(mask, place, size, upward) > 0.5).astype(np.uint8)
            drawn[_edge(inside)] = colour
    return drawn


def _plane(
    data: NDArray[Any], place: tuple[int | slice, ...], size: tuple[int, int], upward: bool
) -> NDArray[np.float32]:
    """One plane of an array (x, y, z), resized to (width, height); ``upward`` puts the last row on
    top."""
    rows = data[place].T
    turned = np.ascontiguousarray(rows[::-1] if upward else rows, np.float32)
    return np.asarray(cv2.resize(turned, size, interpolation=cv2.INTER_LINEAR), np.float32)


def _edge(inside: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return (inside - cv2.erode(inside, np.ones((3, 3), np.uint8))).astype(bool)


def _with_letters(panel: Rgb, letters: str) -> Rgb:
    """``panel`` with letters in the middle of its left, right, upper and lower side."""
    h, w = panel.shape[:2]
    places = ((4, h // 2 + 6), (w - 18, h // 2 + 6), (w // 2 - 6, 18), (w // 2 - 6, h - 7))
    for letter, place in zip(letters, places, strict=False):
        _write(panel, letter, place, 0.55)
    return panel


def _write(panel: Rgb, text: str, place: tuple[int, int], size: float) -> None:
    for colour, thickness in (((0, 0, 0), 3), ((235, 235, 235), 1)):
        cv2.putText(
            panel, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, colour, thickness, cv2.LINE_AA
        )


def _write_number(panel: Rgb, number: int, corner: tuple[int, int], size: float) -> None:
    """Write a number in a dark box with its upper left ``corner`` there, or as near as the panel
    allows."""
    text = str(number)
    (w, h), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
    margin = round(8 * size)
    left = min(max(corner[0], 0), panel.shape[1] - w - 2 * margin)
    top = min(max(corner[1], 0), panel.shape[0] - h - 2 * margin)
    panel[top : top + h + 2 * margin, left : left + w + 2 * margin] = (0, 0, 0)
    at = (left + margin, top + margin + h)
    cv2.putText(panel, text, at, cv2.FONT_HERSHEY_SIMPLEX, size, NUMBER_COLOUR, 1, cv2.LINE_AA)


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


def _upright(panel: Rgb) -> Rgb:
    # (x, y) in LPS: rows of the picture are y, anterior first, and its columns x, the patient's
    # right first.
    turned = np.ascontiguousarray(panel.transpose(1, 0, 2))
    return np.asarray(
        cv2.resize(turned, (PANEL, PANEL), interpolation=cv2.INTER_LINEAR), dtype=np.uint8
    )
