"""The jobs of a comparison: each trains or evaluates one model, in a process of its own.

So the memory of each can be measured, and each can be stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomri.errors import AnomriError, Interrupted
from anomri.evaluation.pooling import Pool
from anomri.evaluation.result import Evaluation
from anomri.evaluation.scored import Scored
from anomri.files import output_folder, read_json, whole_file, write_text
from anomri.methods import registry
from anomri.model.detector import Detector
from anomri.runs.identity import identify, store_scans
from anomri.runs.pipeline import describe_error, read_ahead
from anomri.runtime.interruption import StopRequest
from anomri.scans.case import Case, shown_channel
from anomri.scans.volume import Volume
from anomri.scoring.filters import anomaly_score
from anomri.slices import SliceStack, mask_on_published_grid, on_published_grid, slice_volume
from anomri.training.state import TrainingState
from anomri.training.train import Progress, train

MEDIAN = 5
"""Width of the median filter, in pixels."""
EXAMPLES = 6
"""Test patients whose maps are kept for the picture."""
FIGURES = {
    "auprc": "AUPRC, pooled",
    "ceil_dice": "ceil-Dice, pooled",
    "ceil_dice_components": "ceil-Dice, pooled, components filtered",
}
"""Figures of an evaluation that a comparison keeps, by their names in its results."""
DONE = "done"
"""The last message of a process that has finished its work."""
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Job:
    """A method (with changed ``settings``), a seed, and all that its training and evaluation need.

    ``variant`` names it in the table and on disk. ``trained`` is the variant whose weights it
    uses: mostly itself.
    """

    variant: str
    method: str
    seed: int
    out: Path
    trained: str
    training_cases: list[Case]
    test_cases: list[Case]
    preset: str = "small"
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    channels: tuple[str, ...] | None = None
    cache: Path | None = None
    device: str = "auto"

    @property
    def name(self) -> str:
        """Its name in messages and on disk."""
        return f"{self.variant}-seed{self.seed}"

    @property
    def model(self) -> Path:
        """The folder of its model."""
        return self.out / "models" / f"{self.trained}-seed{self.seed}"

    @property
    def result(self) -> Path:
        """The file that its evaluation writes; it exists once the job is done."""
        return self.out / "results" / f"{self.name}.json"


def train_job(job: Job, on_progress: OnProgress) -> None:
    """Train the job's model, or resume its training, and write ``cost.json`` beside it."""
    schedule = registry.preset(job.method, job.preset).training
    train(
        job.training_cases,
        job.model,
        method=job.method,
        preset=job.preset,
        channels=job.channels,
        settings=job.settings,
        training={**job.training, "seed": job.seed} if schedule else None,
        cache=job.cache,
        resume=(job.model / TrainingState.NAME).exists(),
        device=job.device,
        progress=on_progress,
    )
    write_text(job.model / "cost.json", json.dumps({"peak_memory_mb": peak_memory_mb()}) + "\n")


def read_result(job: Job) -> dict[str, Any]:
    """What `evaluate_job` wrote; empty if it has not finished."""
    return read_json(job.result) if job.result.is_file() else {}


def evaluate_job(job: Job, on_progress: OnProgress) -> None:
    """Score every test scan once, without and with median filter, and write the figures."""
    detector = load_detector(job)
    folder = output_folder(job.result.parent)
    with tempfile.TemporaryDirectory(prefix=".scores-", dir=folder) as spool:
        scoring = _Scoring(detector, Path(spool))
        for done, (case, volume, _) in enumerate(
            read_ahead(job.test_cases, detector.read), start=1
        ):
            try:
                if isinstance(volume, AnomriError):
                    raise volume
                scoring.add(case, volume)
            except Exception as error:
                scoring.add_failure(case, describe_error(case, error))
            on_progress(Progress("evaluate", done, len(job.test_cases)))
        facts = {
            "variant": job.variant,
            "method": job.method,
            "trained": job.trained,
            "settings": detector.spec.settings,
            "channels": detector.spec.channels,
            "seed": job.seed,
            **scoring.evaluate(),
            "scans": store_scans(identify(job.test_cases, job.channels or ())),
            "peak_memory_mb": peak_memory_mb(),
            "threads": torch.get_num_threads(),
            "device": str(detector.device),
        }
    scoring.examples.save(job.result.with_suffix(".npz"))
    # Written last: a job counts as done from the moment its result is there.
    write_text(job.result, json.dumps(facts, indent=2) + "\n")


def load_detector(job: Job) -> Detector:
    """The job's model; where it uses another method's weights, that network with this method."""
    detector = Detector.load(job.model, job.device)
    if job.trained == job.variant:
        return detector
    settings = {**registry.preset(job.method, job.preset).settings, **job.settings}
    # The threshold is the other method's; a comparison needs none.
    spec = replace(detector.spec, method=job.method, settings=settings, thresholds=None)
    return detector.with_spec(spec)


class _Scoring:
    """The scores of the test scans by one model, without (``plain``) and with median filter."""

    def __init__(self, detector: Detector, spool: Path) -> None:
        self.detector = detector
        self.pools = {name: Pool(output_folder(spool / name)) for name in ("plain", "median")}
        self.examples = _Examples()
        self.seconds: list[float] = []

    def add(self, case: Case, volume: Volume) -> None:
        """Score one scan; raises `AnomriError` if it has no label."""
        volume.lesions()  # raises if there are none to compare with
        spec, grid = self.detector.spec.score, self.detector.spec.grid
        stack = slice_volume(volume, grid, self.detector.spec.scaling)
        begun = time.monotonic()
        raw, _ = self.detector.raw_score(stack)
        filtered = self._filter(raw, stack, MEDIAN)
        self.seconds.append(time.monotonic() - begun)
        for name, scores in (("plain", self._filter(raw, stack, 0)), ("median", filtered)):
            on_grid, label, voxel_mm3 = on_published_grid(scores, stack, volume, grid)
            dropped = spec.max_dropped(stack.spacing_mm, voxel_mm3)
            scored = Scored(case.name, on_grid, label, dropped, patient=case.patient)
            if volume.ignored is not None:
                scored.ignored = mask_on_published_grid(volume.ignored, stack, grid)
            self.pools[name].add(scored)
        self.examples.add(case.name, self.detector, stack, filtered)

    def _filter(self, raw: Tensor, stack: SliceStack, median: int) -> NDArray[np.float32]:
        score = replace(self.detector.spec.score, median=median)
        return anomaly_score(raw, stack.foreground, score, stack.spacing_mm)

    def add_failure(self, case: Case, error: str) -> None:
        """Note why a scan could not be scored."""
        for pool in self.pools.values():
            pool.add(Scored(case.name, error=error))

    def evaluate(self) -> dict[str, Any]:
        """The figures of all scans, and what they cost; raises `AnomriError` if all failed."""
        failed = self.pools["median"].failed
        if not self.seconds:
            raise AnomriError("no case could be evaluated:\n  " + "\n  ".join(failed.values()))
        evaluations = {name: pool.evaluate({}, None) for name, pool in self.pools.items()}
        best_threshold, *_ = max(evaluations["median"].curve, key=lambda point: point[3])
        return {
            "figures": {name: _figures(evaluation) for name, evaluation in evaluations.items()},
            "best_threshold": best_threshold,
            "examples": self.examples.names,
            "cases": len(self.seconds),
            "failed": failed,
            "seconds_per_scan": float(np.mean(self.seconds)),
        }


def run_in_process(
    work: Callable[[Job, OnProgress], None], job: Job, on_progress: OnProgress
) -> None:
    """Run ``work(job, on_progress)`` in a fresh process, and pass on its progress and its errors.

    Ctrl-C and SIGTERM reach it once, as SIGTERM, so that a training can save its state; then this
    raises `errors.Interrupted`. If this process is killed, the other ends at its next report.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, job, sender), daemon=True)
    with StopRequest.listen() as stop:
        try:
            process.start()
            sender.close()
            ending = _listen(receiver, process, stop, on_progress)
            process.join()
        finally:
            if process.is_alive():
                process.kill()
    if stop.signal is not None:
        raise Interrupted(f"stopped in {job.name}; rerun the same command to resume.", stop.signal)
    if ending is None:
        raise AnomriError(
            f"{job.name}: its process ended with code {process.exitcode}; out of memory? Rerun the "
            f"same command to try again."
        )
    if ending != DONE:
        raise AnomriError(f"{job.name}: {ending}")


def _listen(
    receiver: Connection, process: SpawnProcess, stop: StopRequest, on_progress: OnProgress
) -> str | None:
    """The last message of the process: `DONE`, an error in words, or ``None`` if it died."""
    ending, terminated = None, False
    while True:
        if stop.signal is not None and not terminated:
            process.terminate()
            terminated = True
        try:
            if not receiver.poll(0.2):
                continue
            message = receiver.recv()
        except EOFError:
            return ending
        if isinstance(message, Progress):
            on_progress(message)
        else:
            ending = message


def _run(work: Callable[[Job, OnProgress], None], job: Job, sender: Connection) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a terminal's Ctrl-C is for the parent, which passes it on once
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        work(job, sender.send)
        sender.send(DONE)
    except (AnomriError, Interrupted) as error:
        sender.send(str(error))


def peak_memory_mb() -> float:
    """The most memory that this process has had resident, in MB (2^20 bytes); NaN if unknown."""
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike getrusage, this leaves out what the parent had when it started this process.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _figures(evaluation: Evaluation) -> dict[str, tuple[float, float | None, float | None]]:
    by_name = {figure.name: figure for figure in evaluation.figures}
    return {
        key: (by_name[name].value, by_name[name].low, by_name[name].high)
        for key, name in FIGURES.items()
    }


class _Examples:
    """The slice with most lesion of the first test patients: scan, truth and map, each (h, w)."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._panels: dict[str, list[NDArray[Any]]] = {"scan": [], "truth": [], "map": []}

    def add(
        self, name: str, detector: Detector, stack: SliceStack, scores: NDArray[np.float32]
    ) -> None:
        if len(self.names) == EXAMPLES or stack.label is None:
            return
        z = int(stack.label.sum(dim=(1, 2)).argmax())
        self.names.append(name)
        self._panels["scan"].append(stack.x[z, shown_channel(detector.spec.channels)].numpy())
        self._panels["truth"].append(stack.label[z].numpy())
        self._panels["map"].append(scores[z])

    def save(self, path: Path) -> None:
        with whole_file(path) as partial, partial.open("wb") as file:
            scan, truth, scores = (np.stack(panels) for panels in self._panels.values())
            np.savez_compressed(file, scan=scan, truth=truth, map=scores)
