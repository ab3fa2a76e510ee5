"""What a GPU gives: training steps and detection, against the plain program on the same GPU.

    python benchmarks/gpu.py COHORT [--steps 600] [--scans 64] [--only "paper, bf16-mixed,
    compiled"]

``COHORT`` is a folder of cases with labels, some of them for validation. A step's time is that of
`anomri.train`, all that it does included, after the first validation (compiling is told apart);
scans are copies of the cohort's, unpacked.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import anomri
import plain
from anomri.methods import registry as methods
from anomri.model.detector import Detector
from anomri.runs.detect import detect_cohort
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.spec import ModelSpec
from anomri.training import train as training
from anomri.training.packing import HealthySlices, PackedCase, pack_cohort

Row = dict[str, float]
PUBLISHED_STEPS = 67_200
VARIANTS = (
    ("paper", "32-true", False),
    ("paper", "bf16-mixed", False),
    ("paper", "bf16-mixed", True),
    ("accurate", "bf16-mixed", False),
    ("accurate", "bf16-mixed", True),
)
"""Preset, precision, and whether networks are compiled: what takes a minute pays in the longest
training alone."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--scans", type=int, default=64)
    names = [_name(*variant) for variant in VARIANTS]
    parser.add_argument("--only", choices=names, help="this training alone, and no detection")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name()
    print(
        f"{name}, {os.cpu_count()} processors, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        preset = methods.preset("dae", "paper")
        cases = find_cases(arguments.cohort)
        packed = pack_cohort(cases, plain.CHANNELS, preset.grid, preset.scaling, folder / "cache")
        _training(arguments.cohort, packed, arguments.steps, arguments.only, folder)
        if not arguments.only:
            _detection(cases, arguments.scans, folder)


def _name(preset: str, precision: str, compiled: bool) -> str:
    return f"{preset}, {precision}{', compiled' if compiled else ''}"


def _training(
    cohort: Path, packed: list[PackedCase], steps: int, only: str | None, folder: Path
) -> None:
    print(
        "| training | ms a step | times plain | first steps, s | 67,200 steps, min |\n|---|---|---|---|---|"
    )
    slow = _plain_step(packed)
    print(
        f"| the plain program, float32 | {1000 * slow:.1f} | 1 | | {slow * PUBLISHED_STEPS / 60:.1f} |",
        flush=True,
    )
    curves: dict[str, list[Row]] = {}
    for preset, precision, compiled in VARIANTS:
        name = _name(preset, precision, compiled)
        if only not in (None, name):
            continue
        rows = curves[name] = _train(cohort, folder / name, preset, precision, compiled, steps)
        begun = rows[0]["seconds"]
        each = (rows[-1]["seconds"] - begun) / (rows[-1]["step"] - rows[0]["step"])
        whole = f"{(each * PUBLISHED_STEPS + begun) / 60:.1f}" if preset == "paper" else ""
        ratio = f"{slow / each:.1f}" if preset == "paper" else ""
        print(f"| {name} | {1000 * each:.2f} | {ratio} | {begun:.1f} | {whole} |", flush=True)
    print("\n| step | " + " | ".join(name for name in curves) + " |\n|---|" + "---|" * len(curves))
    for rows in zip(*curves.values(), strict=True):
        told = (f"{row['loss']:.6f}, {row['validation_loss']:.6f}" for row in rows)
        print(f"| {rows[0]['step']:.0f} | " + " | ".join(told) + " |", flush=True)


def _plain_step(packed: list[PackedCase], repeats: int = 30) -> float:
    slices, times = HealthySlices(packed), list[float]()
    with torch.device("cuda"):
        network = plain.Network().cuda()
        optimizer = plain.optimizer_of(network)
        for repeat in range(repeats):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            numbers = [(16 * repeat + k) % len(slices) for k in range(16)]
            plain.training_step(network, optimizer, slices.batch(numbers).cuda())
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    return statistics.median(times[5:])


def _train(
    cohort: Path, folder: Path, preset: str, precision: str, compiled: bool, steps: int
) -> list[Row]:
    with patch.object(training, "COMPILED_FROM", 0 if compiled else steps + 1):
        anomri.train(
            cohort,
            folder,
            preset=preset,
            training={
                "steps": steps,
                "precision": precision,
                "validate_every": max(steps // 3, 1),
                "validation_slices": 64,
            },
            score={}
            if preset == "paper"
            else {"kind": "probability_with_residual", "channels": ("flair", "t2")},
            cache=folder.parent / "cache",
        )
    with (folder / "log.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _detection(cases: list[Case], scans: int, folder: Path) -> None:
    copies = _copies(cases, scans, folder / "scans")
    spec = ModelSpec(plain.CHANNELS)
    torch.manual_seed(0)
    published = Detector(spec, methods.build(spec), "cuda")
    print("\n| detection | scans a second |\n|---|---|")
    for name, detector in (
        ("published widths", published),
        ("the model in the package", anomri.load()),
    ):
        scaling = detector.spec.scaling
        packed = pack_cohort(cases, plain.CHANNELS, detector.spec.grid, scaling, folder / "cache")
        some = (packed * scans)[:scans]
        stacks = [case.stack(scaling) for case in packed]
        score = partial(_score, detector)
        detect_cohort(copies[:4], folder / f"first {name}", detector)
        _rate(
            f"{name}: files to files, a run with pictures and report",
            scans,
            detect_cohort,
            copies,
            folder / name,
            detector,
        )
        _rate(f"{name}: packed slices to scores, one after another", scans, list, map(score, some))
        with ThreadPoolExecutor(8) as pool:
            _rate(
                f"{name}: packed slices to scores, 8 side by side",
                scans,
                list,
                pool.map(score, some),
            )
        _rate(
            f"{name}: slices in memory to what the network makes of them",
            scans,
            list,
            map(detector.output, (stacks * scans)[:scans]),
        )


def _score(detector: Detector, case: PackedCase) -> None:
    detector.score(case.stack(detector.spec.scaling))


def _rate(name: str, count: int, work: Callable[..., object], *arguments: Any) -> None:
    begun = time.perf_counter()
    work(*arguments)
    print(f"| {name} | {count / (time.perf_counter() - begun):.1f} |", flush=True)


def _copies(cases: list[Case], count: int, folder: Path) -> list[Case]:
    """So many cases whose files are the cohort's, unpacked."""
    copies = []
    for number in range(count):
        case, channels = cases[number % len(cases)], {}
        for channel, path in case.channels.items():
            first, mine = (
                folder / f"{k}_{channel}.nii" for k in (number % len(cases), f"scan{number:04d}")
            )
            if not first.exists():
                folder.mkdir(exist_ok=True)
                with gzip.open(path) as packed, first.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
            os.link(first, mine)
            channels[channel] = mine
        copies.append(Case(f"scan{number:04d}", channels))
    return copies


if __name__ == "__main__":
    main()
