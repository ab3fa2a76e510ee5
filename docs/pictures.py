"""Draw the pictures of "Reading the results": the model in the package on synthetic scans.

python docs/pictures.py docs/images
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

import anomri
from anomri.demo.cohort import make_cohort
from anomri.model.detection import Detection
from anomri.model.detector import Detector
from anomri.scans.case import Case

LESION, MASK, TRUTH = "#d9590b", "#4cc9f0", "#a7f05a"
CHOSEN = "synthetic_lesion_003"


def main(images: str) -> None:
    """Make the demo's synthetic scans and write the four pictures into the folder ``images``."""
    detector = anomri.load(device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        make_cohort(Path(folder) / "cohort")
        cases = [case for case in anomri.find_cases(Path(folder) / "cohort") if case.label]
        found = {case.name: detector.detect(case) for case in cases}
        truth = _label(next(case for case in cases if case.name == CHOSEN))
    height = int(np.argmax(truth.sum((0, 1))))
    pictures = {
        "case": draw_case(found[CHOSEN], truth, height),
        "thresholds": draw_thresholds(detector, found[CHOSEN], height),
        "false_positive": draw_false_positives(detector),
        "confidence": draw_confidence(detector, found),
    }
    for name, figure in pictures.items():
        figure.savefig(Path(images) / f"reading_{name}.png", dpi=140)


def draw_case(detection: Detection, truth: NDArray[np.bool_], height: int) -> plt.Figure:
    """One slice: FLAIR, its healthy version, the map, the mask and the true outline."""
    figure, axes = _dark_panels(5)
    flair, healthy = _flair(detection), detection.reconstruction[_flair_number(detection)]
    brightest = np.percentile(flair[flair > 0], 99.5)
    low, high = detection.display_range
    panels = ("FLAIR", "reconstruction", "anomaly map", "mask", "true outline")
    for panel, name in zip(axes, panels, strict=True):
        panel.set_title(name, color="white", fontsize=11)
        image = healthy if name == "reconstruction" else flair
        if name == "anomaly map":
            _show(panel, detection.anomaly_map[..., height], "inferno", low / 2, high)
        else:
            _show(panel, image[..., height], "gray", 0, brightest)
    assert detection.mask is not None
    _outline(axes[3], detection.mask[..., height], MASK)
    _outline(axes[4], truth[..., height], TRUTH)
    return figure


def draw_thresholds(detector: Detector, detection: Detection, height: int) -> plt.Figure:
    """The same slice with the masks of the model's least, default and most sensitive threshold."""
    figure, axes = _dark_panels(3)
    flair = _flair(detection)
    for panel, name in zip(axes, ("lowest", "default", "highest"), strict=True):
        mask = detector.with_threshold(name).detect(detection.volume).mask
        assert mask is not None
        _show(panel, flair[..., height], "gray", 0, np.percentile(flair[flair > 0], 99.5))
        _outline(panel, mask[..., height], MASK)
        volume = mask.sum() * detection.volume.geometry.voxel_mm3 / 1000
        title = f"--sensitivity {name}\n{volume:.0f} ml in the whole mask"
        panel.set_title(title, color="white", fontsize=11)
    return figure


def draw_false_positives(detector: Detector) -> plt.Figure:
    """Scores of held-out healthy voxels, and the volume of a healthy scan above each threshold."""
    stored = detector.thresholds
    assert stored is not None
    assert stored.healthy is not None
    healthy = stored.healthy
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    counts = np.array(healthy.histogram)
    edges = np.linspace(0, healthy.histogram_top, len(counts) + 1)
    left.stairs(counts, edges, fill=True, color="#1f6572")
    left.set_yscale("log")
    left.set_xlabel("score")
    left.set_ylabel("healthy voxels (log scale)")
    right.plot(healthy.threshold, healthy.false_positive_ml, color="#1f6572", marker=".")
    right.set_xlabel("threshold")
    right.set_ylabel("ml of a mean healthy scan above it")
    for axes in (left, right):
        axes.axvline(stored.threshold, color=LESION)
        place = (stored.threshold, axes.get_ylim()[1])
        axes.annotate("  the model's\n  threshold", place, color=LESION, va="top", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_confidence(detector: Detector, found: dict[str, Detection]) -> plt.Figure:
    """Peaks of the held-out healthy scans and of all findings on one axis."""
    stored = detector.thresholds
    assert stored is not None
    assert stored.healthy is not None
    peaks = stored.healthy.scan_peaks
    lesions = [lesion for detection in found.values() for lesion in detection.lesions]
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    scores = [lesion.peak for lesion in lesions]
    colours = [lesion.confidence or 0.0 for lesion in lesions]
    axes.scatter(scores, np.ones(len(scores)), 70, colours, cmap="YlOrRd", vmin=-0.3, vmax=0.9)
    axes.plot(peaks, np.zeros(len(peaks)), "^", color="#1f6572", ms=10)
    edges = [min(scores) - 0.6, *peaks, max(scores) + 0.4]
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        axes.axvline(low, color="#1f6572", lw=0.8, ls=":" if number else "none")
        text = f"{number / (len(peaks) + 1):.2f}"
        axes.text((low + high) / 2, 1.5, text, ha="center", va="center", fontsize=10)
    axes.set_yticks(
        [0, 1, 1.5],
        ["highest score of each\nheld-out healthy scan", "peak of a finding", "its confidence"],
    )
    axes.set_ylim(-0.5, 1.8)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("score")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _label(case: Case) -> NDArray[np.bool_]:
    assert case.label is not None
    label = nib.as_closest_canonical(nib.load(case.label))
    # To the working orientation, LPS.
    return np.asanyarray(label.dataobj)[::-1, ::-1] > 0


def _flair_number(detection: Detection) -> int:
    return detection.channels.index("flair")


def _flair(detection: Detection) -> NDArray[np.float32]:
    return detection.volume.data[_flair_number(detection)]


def _dark_panels(count: int) -> tuple[plt.Figure, list[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(2.2 * count, 2.9), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    figure.set_facecolor("black")
    for panel in axes:
        panel.axis("off")
    return figure, list(axes)


def _show(panel: Axes, image: NDArray[np.float32], colours: str, low: float, high: float) -> None:
    panel.imshow(image.T, cmap=colours, vmin=low, vmax=high, interpolation="bicubic")
    rows, columns = image.T.shape
    panel.set_xlim(0.14 * columns, 0.86 * columns)
    panel.set_ylim(0.93 * rows, 0.07 * rows)


def _outline(panel: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    panel.contourf(mask.T, levels=[0.5, 1], colors=[colour], alpha=0.25)
    panel.contour(mask.T, levels=[0.5], colors=[colour], linewidths=1.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
