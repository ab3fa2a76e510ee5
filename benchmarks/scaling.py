"""Measure on one and two processes what docs/scale.md plans with: seconds and bytes a scan, seconds a step.

    python benchmarks/scaling.py ../shared/data/brats18 --scans 6

prints JSON. Each figure comes with the processor time that all processes took together: on a machine that has other
work to do, that is what compares. The processes are torchrun's, with one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anomri
from anomri.cases import find_cases
from anomri.distribution import processes

SKIPPED_STEPS = 2
"""The first steps find their algorithms and memory."""


def processor_seconds() -> float:
    times = os.times()
    return times.user + times.system


def size_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def timed(work: Any) -> dict[str, float]:
    wall, busy = time.monotonic(), processor_seconds()
    work()
    return {"wall": time.monotonic() - wall, "busy": sum(processes("cpu").each(lambda: processor_seconds() - busy))}


def steps_of(cohort: Any, place: Path, preset: str, steps: int) -> dict[str, float]:
    """Seconds of a training step; validation and packing are left out."""
    marks: list[tuple[float, float]] = []

    def told(state: anomri.training.Progress) -> None:  # type: ignore[name-defined]
        if state.stage == "train":
            marks.append((time.monotonic(), processor_seconds()))

    schedule = {"steps": steps, "validation_slices": 1, "precision": "32-true"}
    anomri.train(
        cohort,
        place / f"model-{preset}",
        preset=preset,
        training=schedule,
        cache=place / "cache",
        device="cpu",
        progress=told,
    )
    first, last = marks[SKIPPED_STEPS], marks[-2]  # the last step has the validation
    count = len(marks) - SKIPPED_STEPS - 2
    busy = sum(processes("cpu").each(lambda: (last[1] - first[1]) / count))
    return {"wall": (last[0] - first[0]) / count, "busy": busy}


def worker(cohort: Path, place: Path, scans: int, steps: int) -> dict[str, Any]:
    """All measurements, by each of the processes that share them."""
    from anomri.packing import pack_cohort
    from anomri.spec import Grid, Scaling

    team = processes("cpu")
    cases = find_cases(cohort)[:scans]
    channels = ("flair", "t1", "t1ce", "t2")
    facts: dict[str, Any] = {"processes": team.count, "scans": len(cases)}
    facts["pack"] = timed(lambda: pack_cohort(team.part(cases), channels, Grid(), Scaling(), place / "cache"))
    split = [anomri.Case(**{**vars(case), "split": "val" if k == 0 else "train"}) for k, case in enumerate(cases)]
    facts["step"] = {preset: steps_of(split, place, preset, steps) for preset in ("small", "paper")}
    for preset in ("small", "paper"):
        detector = anomri.load(place / f"model-{preset}", "cpu")
        out = place / f"maps-{preset}"
        facts[f"detect {preset}"] = timed(lambda out=out, d=detector: anomri.detect_cohort(cases, out, d))
    facts["evaluate"] = timed(
        lambda: (
            anomri.evaluate(cases, place / "figures", model=place / "model-small", split=None)
            if not any(case.label is None for case in cases)
            else None
        )
    )
    facts["bytes a scan"] = {
        "source": sum(path.stat().st_size for case in cases for path in case.channels.values()) // len(cases),
        "cache": size_of(place / "cache", "*.npy") // len(cases),
        "maps and masks": size_of(place / "maps-paper", "*.nii.gz") // len(cases),
        "previews and tables": (size_of(place / "maps-paper", "*") - size_of(place / "maps-paper", "*.nii.gz"))
        // len(cases),
    }
    slices = json.loads((place / "model-small" / "model.json").read_text())["cohort"]
    facts["healthy slices a training scan"] = slices["training_slices"] / slices["training_cases"]
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--scans", type=int, default=6)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        facts = worker(given.cohort, given.worker, given.scans, given.steps)
        if processes("cpu").first:
            (given.worker / "facts.json").write_text(json.dumps(facts))
        return
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            command += [__file__, str(given.cohort), "--scans", str(given.scans), "--steps", str(given.steps)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([*command, "--worker", place], check=True, env=environment, stdout=subprocess.DEVNULL)
            facts = json.loads((Path(place) / "facts.json").read_text())
        print(json.dumps({**facts, "load": os.getloadavg()[0]}, indent=2), flush=True)


if __name__ == "__main__":
    main()
