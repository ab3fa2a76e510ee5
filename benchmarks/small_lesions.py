"""Which small lesions a mask shows, by their size, and how many findings are false, at several of a
model's settings.

python benchmarks/small_lesions.py ../shared/data/brats18 src/anomri/pretrained/brats18 [--split
val] [--repeats 4]

Spheres with the contrast of a plaque of multiple sclerosis (`robustness.with_spheres`) are planted
in the slices without a lesion, and map and mask of `anomri detect` are made on the scan's own
voxels. A sphere is shown if the mask has a voxel of it; a component of the mask that lies in those
slices alone, and has none of any sphere, is a false finding. Average precision is that of the map,
over the voxels of the brain in those slices. A model may have been given its score and threshold on
other spheres in slices of the same scans (`val`).
"""

from __future__ import annotations

import argparse
import zlib
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import cc3d
import numpy as np

import anomri
from anomri.model.detector import Detector
from anomri.model.lesions import lesion_labels
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.read import read_volume
from anomri.scoring.metrics import drop_small_components, precision_recall
from robustness import SPHERES, Data, Mask, columns_for, labelled_cases, with_spheres

SETTINGS: dict[str, tuple[str | None, float | None]] = {
    "default": (None, None),
    "`--min-volume 30`": (None, 30),
    "`--min-volume 10`": (None, 10),
    "`--sensitivity 0.2%`": ("0.2%", None),
    "`--sensitivity 0.2% --min-volume 10`": ("0.2%", 10),
}
"""Names of columns; sensitivity and least volume in mm3."""
RADII_MM = (0.0, 2.5, 3.0, 4.0, 6.0, 10.0)
"""Between which spheres are counted together, by the radius of a sphere of their volume."""


def counts(
    mask: Mask, spheres: Mask, healthy: Mask, voxel_mm3: float
) -> tuple[list[tuple[float, bool]], int]:
    """Radius of each sphere and whether the mask shows it; how many components of the mask are
    nothing of a sphere or lesion.

    ``mask`` and ``spheres`` are (x, y, z); ``healthy`` (z,) says which slices have no lesion.
    """
    components = cc3d.connected_components(spheres.astype(np.uint8), connectivity=26)
    volumes = np.bincount(components.ravel())[1:] * voxel_mm3
    shown = np.isin(np.arange(1, len(volumes) + 1), components[mask])
    found = lesion_labels(mask)
    explained = np.union1d(found[spheres & mask], found[..., ~healthy])
    radii = np.cbrt(3 * volumes / (4 * np.pi))
    return list(zip(radii.tolist(), shown.tolist(), strict=True)), int(
        found.max() - np.count_nonzero(explained)
    )


def main() -> None:
    """Print a table in Markdown for each part of the channels."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cohort", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument(
        "--repeats", type=int, default=4, help="how often spheres are planted in each scan"
    )
    given = parser.parse_args()
    detector = anomri.load(given.model)
    cases = labelled_cases(detector, find_cases(given.cohort), given.split)
    if not cases:
        parser.error(f"no labelled case of the split {given.split}.")
    for part, channels in columns_for(detector).items():
        print(
            f"\n| {part}: radius | spheres |",
            " | ".join(SETTINGS),
            "|\n|---|---" + "|---" * len(SETTINGS) + "|",
        )
        table(detector.with_channels(channels), cases, given.repeats)


def table(detector: Detector, cases: list[Case], repeats: int) -> None:
    """Print the rows of one."""
    spheres_of, extra = (
        defaultdict[str, list[tuple[float, bool]]](list),
        defaultdict[str, list[int]](list),
    )
    voxels = defaultdict[str, list[tuple[Data, Mask]]](list)
    chosen = {
        name: detector.with_threshold(rate).with_min_volume(least)
        for name, (rate, least) in SETTINGS.items()
    }
    for case in cases:
        volume = read_volume(case, detector.spec.channels)
        assert volume.label is not None
        healthy, voxel_mm3 = ~np.asarray(volume.label.any((0, 1))), volume.geometry.voxel_mm3
        for repeat in range(repeats):
            for number, (size, kind) in enumerate(SPHERES.items()):
                draw = np.random.default_rng([zlib.crc32(case.name.encode()), number, repeat])
                scan = with_spheres(volume, *kind, draw)
                assert scan.label is not None
                found = detector.detect(scan)
                counted = scan.foreground & healthy
                voxels[size].append((found.anomaly_map[counted], scan.label[counted]))
                for name, one in chosen.items():
                    assert one.thresholds is not None
                    dropped = one.spec.score.max_dropped(found.stack.spacing_mm, voxel_mm3)
                    mask = drop_small_components(
                        found.anomaly_map > one.thresholds.threshold, dropped
                    )
                    spheres, many = counts(mask, scan.label & healthy, healthy, voxel_mm3)
                    spheres_of[name] += spheres
                    extra[name].append(many)
    for low, high in pairwise(RADII_MM):
        shown = {
            name: [there for radius, there in spheres if low <= radius < high]
            for name, spheres in spheres_of.items()
        }
        cells = [f"{np.mean(one):.2f}" if one else "" for one in shown.values()]
        print(f"| {low:g} to {high:g} mm | {len(shown['default'])} |", " | ".join(cells), "|")
    cells = [f"{np.mean(one):.1f}" for one in extra.values()]
    print("| false findings in a scan's slices without a lesion | |", " | ".join(cells), "|")
    for size, pairs in voxels.items():
        scores, labels = map(np.concatenate, zip(*pairs, strict=True))
        print(
            f"\nAverage precision, {size}: {precision_recall(scores, labels).average_precision:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
