"""Draw the pictures of "Reading the results" from the synthetic scans of the demo.

anomri demo -o demo --keep && python docs/pictures.py demo docs/images
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

import anomri
from anomri.model.detection import Detection
from anomri.model.detector import Detector

LESION, MASK, TRUTH = "#d9590b", "#4cc9f0", "#a7f05a"
CHOSEN = "synthetic_lesion_003"


def main(demo: str, images: str) -> None:
    """Write the four pictures into the folder ``images``."""
    detector = anomri.load(Path(demo) / "model-dae", device="cpu")
    cases = {case.name: case for case in anomri.find_cases(Path(demo) / "cohort")}
    tested = [case for case in cases.values() if case.split == "test"]
    found = {case.name: detector.detect(case) for case in tested}
    label = nib.as_closest_canonical(nib.load(cases[CHOSEN].label))
    # To the working orientation, LPS.
    truth = np.asanyarray(label.dataobj)[::-1, ::-1] > 0
    height = int(np.argmax(truth.sum((0, 1))))
    target = Path(images)
    draw_case(found[CHOSEN], truth, height).savefig(target / "reading_case.png", dpi=140)
    thresholds = draw_thresholds(detector, found[CHOSEN], height)
    thresholds.savefig(target / "reading_thresholds.png", dpi=140)
    draw_false_positives(detector).savefig(target / "reading_false_positive.png", dpi=140)
    draw_confidence(detector, found).savefig(target / "reading_confidence.png", dpi=140)


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
    confidences = sorted({lesion.confidence or 0.0 for lesion in lesions})
    shades = plt.get_cmap("YlOrRd")(np.linspace(0.35, 0.85, len(confidences)))
    for shade, confidence in zip(shades, confidences, strict=True):
        those = [lesion.peak for lesion in lesions if (lesion.confidence or 0.0) == confidence]
        label = f"findings with confidence {confidence:.2f}"
        axes.plot(those, np.ones(len(those)), "o", color=shade, ms=9, alpha=0.8, label=label)
    axes.plot(peaks, np.zeros(len(peaks)), "^", color="#1f6572", ms=10, label="healthy scans")
    for peak in peaks:
        axes.axvline(peak, color="#1f6572", lw=0.8, ls=":")
    axes.set_yticks([0, 1], ["highest score of a\nhealthy scan", "peak of a\nfinding"])
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlabel("score")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.25), ncols=4, frameon=False, fontsize=9)
    return figure


def _flair_number(detection: Detection) -> int:
    return detection.channels.index("flair")


def _flair(detection: Detection) -> NDArray[np.float32]:
    return detection.volume.data[_flair_number(detection)]


def _dark_panels(count: int) -> tuple[plt.Figure, list[Axes]]:
    figure, axes = plt.subplots(1, count, figsize=(2.2 * count, 3.0), layout="constrained")
    figure.set_facecolor("black")
    for panel in axes:
        panel.axis("off")
    return figure, list(axes)


def _show(panel: Axes, image: NDArray[np.float32], colours: str, low: float, high: float) -> None:
    panel.imshow(image.T, cmap=colours, vmin=low, vmax=high, interpolation="bicubic")
    panel.set_xlim(0.14 * len(image), 0.86 * len(image))


def _outline(panel: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    panel.contourf(mask.T, levels=[0.5, 1], colors=[colour], alpha=0.25)
    panel.contour(mask.T, levels=[0.5], colors=[colour], linewidths=1.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
