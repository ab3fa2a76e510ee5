"""What a rim left by skull stripping costs, and what takes it off or finds it again.

    python benchmarks/rims.py ../shared/data/brats18

In the three validation patients, a rim as of scalp or marrow is put around the brain: 1.5 times as
bright as the brain on FLAIR, brighter on T1. See docs/notes/2026-12-01-rim-after-stripping.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import cc3d
import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

import anomri
from anomri.model.detection import Detection
from anomri.model.lesions import lesion_labels
from anomri.scoring.metrics import precision_recall

CHANNELS = ("flair", "t1", "t1ce", "t2")
BRIGHTNESS = {"flair": 1.5, "t1": 1.8, "t1ce": 1.8, "t2": 1.35}
"""Of the rim, in medians of the brain."""
RIMS = {
    "none": (0.0, 0.0, ""),
    "3 mm at the convexity": (0.0, 3.0, "convexity"),
    "6 mm at the convexity": (0.0, 6.0, "convexity"),
    "4 mm at the convexity, 2 mm apart": (2.0, 4.0, "convexity"),
    "4 mm in patches, 2 mm apart": (2.0, 4.0, "patches"),
}
"""Width of the dark gap between brain and rim, width of the rim, and where it is."""
Scan = dict[str, NDArray[np.float32]]
Mask = NDArray[np.bool_]
Spacing = tuple[float, ...]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--slice-mm", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    cohort = options.cohort
    lines = (cohort / "splits.csv").read_text().split()
    patients = [line.split(",")[0] for line in lines if line.endswith(",val")]
    model = anomri.load()
    print("slices | rim | channels | mask | AUPRC | ceil-Dice | false | in rim, at edge", end="")
    print(" | other false, at edge | true, at edge")
    for slice_mm in options.slice_mm:
        for rim in RIMS:
            found = defaultdict(list)
            for patient in patients:
                scan, label = read_scan(cohort / patient, slice_mm)
                scan, shell = add_rim(scan, (1.0, 1.0, slice_mm), *RIMS[rim])
                for channels in (("flair",), CHANNELS):
                    for name, strip in STRIPS.items():
                        stripped = strip(scan, (1.0, 1.0, slice_mm))
                        images = {
                            one: nib.Nifti1Image(stripped[one], np.diag([-1, -1, slice_mm, 1]))
                            for one in channels
                        }
                        detection = model.detect(images, name=patient)
                        figures = measure(detection, label, shell)
                        found["FLAIR" if len(channels) == 1 else "all", name].append(figures)
            for (channels_name, name), figures in found.items():
                auprc, ceil_dice, *counts = np.array(figures).T
                false, in_rim, rim_edge, other_edge, true, true_edge = map(int, map(sum, counts))
                print(
                    f"{slice_mm} mm | {rim} | {channels_name} | {name} | {auprc.mean():.3f} | "
                    f"{ceil_dice.mean():.3f} | {false} | {in_rim}, {rim_edge} | "
                    f"{false - in_rim}, {other_edge} | {true}, {true_edge}",
                    flush=True,
                )


def read_scan(folder: Path, slice_mm: int) -> tuple[Scan, Mask]:
    """A patient's channels and label (x, y, z), with so many slices of 1 mm averaged into one."""
    images = {
        name: np.asarray(nib.load(folder / f"{folder.name}_{name}.nii.gz").dataobj, np.float32)
        for name in (*CHANNELS, "seg")
    }
    brain = find_brain(images)
    margin = 9
    low, high = (np.argwhere(brain).min(0) - margin, np.argwhere(brain).max(0) + margin + 1)
    high[2] += -(high[2] - low[2]) % slice_mm

    def crop(values: NDArray[np.float32]) -> NDArray[np.float32]:
        padded = np.pad(values, 30)
        part = padded[tuple(slice(a + 30, b + 30) for a, b in zip(low, high, strict=True))]
        return part.reshape(*part.shape[:2], -1, slice_mm).mean(axis=-1)

    inside = crop(brain.astype(np.float32)) >= 0.5
    label = crop((images.pop("seg") > 0).astype(np.float32)) >= 0.5
    return {name: crop(values) * inside for name, values in images.items()}, label


def find_brain(scan: Scan) -> Mask:
    """Where one of the channels is above zero."""
    return np.logical_or.reduce([scan[name] > 0 for name in CHANNELS])


def add_rim(
    scan: Scan, spacing_mm: Spacing, gap_mm: float, rim_mm: float, where: str
) -> tuple[Scan, Mask]:
    """The scan with a rim around the brain, and where the rim is."""
    brain = find_brain(scan)
    if not rim_mm:
        return scan, np.zeros_like(brain)
    rng = np.random.default_rng(0)
    away_mm = ndimage.distance_transform_edt(~brain, sampling=spacing_mm)
    added = (away_mm > 0) & (away_mm <= gap_mm + rim_mm)
    if where == "patches":
        added &= smooth_noise(brain.shape, spacing_mm, 10, rng) > 0.8
    else:
        slices = np.flatnonzero(brain.any(axis=(0, 1)))
        added[:, :, : round(slices[0] + 0.72 * (slices[-1] - slices[0]))] = False
    shell = added & (away_mm > gap_mm)
    texture = np.clip(1 + 0.2 * smooth_noise(brain.shape, spacing_mm, 2, rng), 0.3, 2)
    rimmed = {}
    for name in CHANNELS:
        values = scan[name].copy()
        median = np.median(values[values > 0])
        values[added] = 0.25 * median * texture[added]
        values[shell] = BRIGHTNESS[name] * median * texture[shell]
        rimmed[name] = values
    return rimmed, shell


def smooth_noise(
    shape: tuple[int, ...], spacing_mm: Spacing, mm: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Gaussian noise, smoothed, with a standard deviation of 1."""
    noise = rng.standard_normal(shape).astype(np.float32)
    smooth = ndimage.gaussian_filter(noise, [mm / one for one in spacing_mm])
    return smooth / smooth.std()


def keep(scan: Scan, spacing_mm: Spacing) -> Scan:
    """The scan as it is."""
    return scan


def erode(scan: Scan, spacing_mm: Spacing) -> Scan:
    """The scan without the outermost voxels of each slice."""
    kept = ndimage.binary_erosion(find_brain(scan), np.ones((3, 3, 1)))
    return {name: values * kept for name, values in scan.items()}


def peel(scan: Scan, spacing_mm: Spacing) -> Scan:
    """The scan without bright tissue at the edge that darkness parts from the brain."""
    brain, flair = find_brain(scan), scan["flair"]
    median = np.median(flair[brain])
    core = ndimage.binary_erosion(brain & (flair > 0.5 * median), disc(2))
    parts = cc3d.connected_components(core.astype(np.uint8), connectivity=6)
    largest = parts == np.bincount(parts[parts > 0]).argmax()
    apart = (parts > 0) & ~largest
    near_brain = ndimage.binary_dilation(largest, disc(3))
    grown = ndimage.binary_dilation(apart, disc(3)) & brain & ~near_brain
    pieces = cc3d.connected_components(grown.astype(np.uint8), connectivity=6)
    numbers = np.arange(1, pieces.max() + 1)
    if not numbers.size:
        return scan
    depth_mm = ndimage.distance_transform_edt(brain, sampling=spacing_mm)
    bright = ndimage.mean(flair, pieces, numbers) > 0.9 * median
    shallow = ndimage.median(depth_mm, pieces, numbers) <= 6
    peeled = np.isin(pieces, numbers[bright & shallow])
    return {name: values * ~peeled for name, values in scan.items()}


def disc(radius: int) -> Mask:
    """The voxels of 1 mm within so many mm of one, in its slice."""
    x, y = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return (x**2 + y**2 <= radius**2)[..., None]


STRIPS: dict[str, Callable[[Scan, Spacing], Scan]] = {
    "as it is": keep,
    "eroded": erode,
    "peeled": peel,
}


def measure(detection: Detection, label: Mask, shell: Mask) -> list[float]:
    """AUPRC, ceil-Dice, and numbers of findings: false, of these in the rim, at the edge in the rim
    and elsewhere; true, and at the edge."""
    geometry = detection.volume.geometry
    label, shell = (np.ascontiguousarray(geometry.canonical(one)) for one in (label, shell))
    counted = detection.volume.foreground | label
    curve = precision_recall(detection.anomaly_map[counted], label[counted])
    numbers = lesion_labels(detection.mask)
    false = in_rim = rim_edge = other_edge = true = true_edge = 0
    for lesion in detection.lesions:
        own = numbers == lesion.lesion
        if label[own].mean() >= 0.1:
            true, true_edge = true + 1, true_edge + lesion.at_edge
            continue
        false += 1
        if shell[own].mean() > 0.5:
            in_rim, rim_edge = in_rim + 1, rim_edge + lesion.at_edge
        else:
            other_edge += lesion.at_edge
    found = [false, in_rim, rim_edge, other_edge, true, true_edge]
    return [curve.average_precision, curve.ceil_dice, *found]


if __name__ == "__main__":
    main()
