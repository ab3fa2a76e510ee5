"""Measure on one and two processes what docs/scale.md plans with: seconds and bytes a scan, seconds
a step.

    python benchmarks/scaling.py ../shared/data/brats18 --scans 4

prints JSON. Each figure comes with the processor time that all processes took together: on a
machine that has other work to do, that is what compares. The processes are torchrun's, with one
thread each.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import anomri
from anomri.methods import registry as methods
from anomri.model.detector import Detector
from anomri.runtime.processes import join_processes
from anomri.scans.find import find_cases
from anomri.spec import Grid, ModelSpec, Scaling
from anomri.training.packing import PackedCase, pack_cohort

CHANNELS = ("flair", "t1", "t1ce", "t2")
SKIPPED_STEPS = 1
"""The first step finds its algorithms and memory."""


def processor_seconds() -> float:
    times = os.times()
    return times.user + times.system


def size_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def timed(work: Callable[[], object]) -> dict[str, float]:
    wall, busy = time.monotonic(), processor_seconds()
    work()
    return {
        "wall": time.monotonic() - wall,
        "busy": sum(join_processes("cpu").run_on_all(lambda: processor_seconds() - busy)),
    }


class Enough(Exception):
    """Enough steps were seen."""


def steps_of(cohort: Any, place: Path, preset: str, steps: int) -> dict[str, float]:
    """Seconds of a training step; validation, packing and thresholds are left out."""
    marks: list[tuple[float, float]] = []

    def told(state: Any) -> None:
        if state.stage == "train":
            marks.append((time.monotonic(), processor_seconds()))
            if len(marks) > steps + SKIPPED_STEPS:
                raise Enough

    # All presets see the whole grid, as the published one.
    schedule = {"precision": "32-true", "crop_to_brain": False}
    with contextlib.suppress(Enough):
        anomri.train(
            cohort,
            place / f"steps-{preset}",
            preset=preset,
            training=schedule,
            cache=place / "cache",
            device="cpu",
            progress=told,
        )
    (first, last), count = (marks[SKIPPED_STEPS], marks[-1]), len(marks) - SKIPPED_STEPS - 1
    busy = sum(join_processes("cpu").run_on_all(lambda: (last[1] - first[1]) / count))
    return {"wall": (last[0] - first[0]) / count, "busy": busy}


def network_seconds(preset: str, slices: int) -> float:
    """Processor seconds of the network alone on a scan of so many slices."""
    spec = ModelSpec(CHANNELS, "dae", methods.preset("dae", preset).settings)
    detector = Detector(spec, methods.build(spec))
    x = torch.rand(detector.inference.batch, len(CHANNELS), *spec.grid.size)
    with torch.no_grad():
        detector.method.reconstruct(x)
        begun = processor_seconds()
        detector.method.reconstruct(x)
    return (processor_seconds() - begun) / len(x) * slices


def worker(cohort: Path, place: Path, scans: int, steps: int) -> dict[str, Any]:
    """All measurements, by each of the processes that share them."""
    team = join_processes("cpu")
    cases = find_cases(cohort)[:scans]
    facts: dict[str, Any] = {"processes": team.world_size, "scans": len(cases)}
    packed: list[PackedCase] = []
    pack = functools.partial(
        pack_cohort, channels=CHANNELS, grid=Grid(), scaling=Scaling(), folder=place / "cache"
    )
    facts["pack"] = timed(lambda: packed.extend(pack(team.share(cases))))
    split = [
        replace(case, split="val" if number == 0 else "train") for number, case in enumerate(cases)
    ]
    facts["step"] = {preset: steps_of(split, place, preset, steps) for preset in ("small", "paper")}
    # A model of a step costs as much to run as any other.
    arguments: dict[str, Any] = {
        "training": {"steps": 1, "validation_slices": 1, "precision": "32-true"}
    }
    anomri.train(split, place / "model", cache=place / "cache", device="cpu", **arguments)
    facts["detect"] = timed(lambda: anomri.detect_cohort(cases, place / "maps", place / "model"))
    facts["evaluate"] = timed(
        lambda: anomri.evaluate(cases, place / "figures", model=place / "model", split="train")
    )
    slices = sum(case.slices for case in packed) / len(packed)
    if team.world_size == 1:
        facts["network"] = {
            preset: network_seconds(preset, round(slices)) for preset in ("small", "paper")
        }
    maps = size_of(place / "maps", "*.nii.gz") // len(cases)
    facts["bytes a scan"] = {
        "source": sum(path.stat().st_size for case in cases for path in case.channels.values())
        // len(cases),
        "cache": size_of(place / "cache", "*.npy") // len(cases),
        "maps and masks": maps,
        "other output": size_of(place / "maps", "*") // len(cases) - maps,
    }
    facts["slices a scan"] = slices
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--scans", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        facts = worker(given.cohort, given.worker, given.scans, given.steps)
        if join_processes("cpu").is_main:
            (given.worker / "facts.json").write_text(json.dumps(facts))
        return
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as place:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(count),
            ]
            command += [
                __file__,
                str(given.cohort),
                "--scans",
                str(given.scans),
                "--steps",
                str(given.steps),
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(
                [*command, "--worker", place],
                check=True,
                env=environment,
                stdout=subprocess.DEVNULL,
            )
            facts = json.loads((Path(place) / "facts.json").read_text())
        print(json.dumps({**facts, "load": os.getloadavg()[0]}, indent=2), flush=True)


if __name__ == "__main__":
    main()
