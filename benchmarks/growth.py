"""How the cost of detection grows with scans, slices, channels and the width of the network.

    python benchmarks/growth.py ../shared/data/brats18 [--repeats 3]

Each figure is the median over repeats of seconds beside the same repeat's base case (one scan, all
slices, four channels, widths 16-32-64-128, the brain's box), so that what else a machine does
weighs on both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import plain
from anomri.methods import registry as methods
from anomri.model.detector import Detector
from anomri.runs.detect import detect_cohort
from anomri.scans.find import find_cases
from anomri.scans.read import read_volume
from anomri.slices import brain_box, slice_volume
from anomri.spec import ModelSpec

WIDTHS = (16, 32, 64, 128)


def detector_of(
    channels: tuple[str, ...], widths: tuple[int, ...], box: tuple[int, int, int, int]
) -> Detector:
    """A model with random weights: speed does not depend on them."""
    spec = ModelSpec(channels, settings={"widths": list(widths)}, crop=box)
    return Detector(spec, methods.build(spec))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = [replace(case, label=None) for case in find_cases(arguments.cohort)]
    volume = read_volume(cases[0], plain.CHANNELS)
    stack = slice_volume(volume)
    box = brain_box(stack.foreground, 8)
    base = detector_of(plain.CHANNELS, WIDTHS, box)
    z = stack.index
    kept = np.zeros_like(volume.data)
    kept[..., z.start : z.start + len(z) // 2] = volume.data[..., z.start : z.start + len(z) // 2]
    half = volume.with_data(kept, "the upper half was taken away.")

    def saved(detector: Detector, scan: object, out: Path) -> Callable[[], object]:
        return lambda: detector.detect(scan).save(out)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        numbers = iter(range(1000))
        work: dict[str, Callable[[], object]] = {
            "one scan, files to files": saved(base, cases[0], out),
            "the same scan from memory": saved(base, volume, out),
            "half of its slices, from memory": saved(base, half, out),
            "one channel": saved(detector_of(plain.CHANNELS[:1], WIDTHS, box), cases[0], out),
            "two channels": saved(detector_of(plain.CHANNELS[:2], WIDTHS, box), cases[0], out),
            "widths 32-64-128-256": saved(
                detector_of(plain.CHANNELS, (32, 64, 128, 256), box), cases[0], out
            ),
            "widths 64-128-256-512": saved(
                detector_of(plain.CHANNELS, (64, 128, 256, 512), box), cases[0], out
            ),
        }
        for count in (1, 2, 4, 8):
            work[f"a run over {count} scans, pictures and report too"] = (
                lambda count=count: detect_cohort(  # type: ignore[misc]
                    cases[:count], out / f"run{next(numbers)}", base
                )
            )
        work["one scan, files to files"]()
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(arguments.repeats):
            for name, job in work.items():
                begun = time.perf_counter()
                job()
                times[name].append(time.perf_counter() - begun)
        print(
            f"{torch.get_num_threads()} threads, {len(z)} slices, box {box}, {time.strftime('%Y-%m-%d')}\n"
        )
        print("| what | seconds | times the first |\n|---|---|---|")
        first = times["one scan, files to files"]
        for name, found in times.items():
            ratio = statistics.median(a / b for a, b in zip(found, first, strict=True))
            print(f"| {name} | {statistics.median(found):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
