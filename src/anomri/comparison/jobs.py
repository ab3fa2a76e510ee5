"""One training or evaluation of a comparison, in a process of its own: its memory can be told, and it can be stopped."""

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anomri.errors import AnomriError, Interrupted
from anomri.evaluation.pooling import Evaluation, Pool, Scored
from anomri.files import output_folder, read_json, whole_file, write_text
from anomri.methods import registry as methods
from anomri.model.detector import Detector
from anomri.runs.detect import problem, read_ahead
from anomri.runs.records import files_of
from anomri.runtime.interruption import StopRequest
from anomri.scans.case import Case, shown_channel
from anomri.scoring.scores import anomaly_score
from anomri.slices import SliceStack, on_published_grid, slice_volume
from anomri.training.state import TrainingState
from anomri.training.train import Progress, train

MEDIAN = 5
EXAMPLES = 6
"""Test patients whose maps are kept for the picture."""
FIGURES = {
    "auprc": "AUPRC, pooled",
    "ceil_dice": "ceil-Dice, pooled",
    "ceil_dice_components": "ceil-Dice, pooled, components filtered",
}
Tell = Callable[[Progress], None]


@dataclass(frozen=True)
class Job:
    """A method (with changed ``settings``), a seed, and all that is needed to train and to evaluate it.

    ``variant`` names it in the table and on disk; ``trained`` is the variant whose weights it has, mostly itself.
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
        """What it is called in words and as a file."""
        return f"{self.variant}-seed{self.seed}"

    @property
    def model(self) -> Path:
        """The folder of its model."""
        return self.out / "models" / f"{self.trained}-seed{self.seed}"

    @property
    def result(self) -> Path:
        """What its evaluation wrote; it is there when the job is done."""
        return self.out / "results" / f"{self.name}.json"


def train_job(job: Job, tell: Tell) -> None:
    """Train the job's model, or go on with a training that was stopped; then write ``cost.json`` beside it."""
    trained = methods.preset(job.method, job.preset).training
    train(
        job.training_cases,
        job.model,
        method=job.method,
        preset=job.preset,
        channels=job.channels,
        settings=job.settings,
        training={**job.training, "seed": job.seed} if trained else None,
        cache=job.cache,
        resume=(job.model / TrainingState.NAME).exists(),
        device=job.device,
        progress=tell,
    )
    write_text(job.model / "cost.json", json.dumps({"peak_memory_mb": peak_memory_mb()}) + "\n")


def result_of(job: Job) -> dict[str, Any]:
    """What `evaluate_job` wrote; nothing if it has not."""
    return read_json(job.result) if job.result.is_file() else {}


def evaluate_job(job: Job, tell: Tell) -> None:
    """Score every test scan once, and pool the scores without and with median filter; then write the result."""
    detector = detector_of(job)
    spec, kept = detector.spec.score, _Examples()
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(
        prefix=".scores-", dir=output_folder(job.result.parent)
    ) as spool:
        pools = {name: Pool(output_folder(Path(spool) / name)) for name in ("plain", "median")}
        for done, (case, volume, _) in enumerate(
            read_ahead(job.test_cases, detector.read), start=1
        ):
            try:
                if isinstance(volume, AnomriError):
                    raise volume
                volume.lesions()  # or why there are none
                stack = slice_volume(volume, detector.spec.grid, detector.spec.scaling)
                begun = time.monotonic()
                raw, _ = detector.raw_score(stack)
                filtered = anomaly_score(
                    raw, stack.foreground, replace(spec, median=MEDIAN), stack.spacing_mm
                )
                seconds.append(time.monotonic() - begun)
                plain = anomaly_score(
                    raw, stack.foreground, replace(spec, median=0), stack.spacing_mm
                )
                for name, made in (("plain", plain), ("median", filtered)):
                    scores, label, voxel_mm3 = on_published_grid(
                        made, stack, volume, detector.spec.grid
                    )
                    dropped = spec.max_dropped(stack.spacing_mm, voxel_mm3)
                    pools[name].add(Scored(case.name, scores, label, dropped, patient=case.patient))
                kept.add(case.name, detector, stack, filtered)
            except Exception as error:
                for pool in pools.values():
                    pool.add(Scored(case.name, error=problem(case, error)))
            tell(Progress("evaluate", done, len(job.test_cases)))
        failed = pools["median"].failed
        if not seconds:
            raise AnomriError("no case could be evaluated:\n  " + "\n  ".join(failed.values()))
        evaluations = {name: pool.evaluate({}, None) for name, pool in pools.items()}
    kept.save(job.result.with_suffix(".npz"))
    facts = {
        "variant": job.variant,
        "method": job.method,
        "trained": job.trained,
        "settings": detector.spec.settings,
        "channels": detector.spec.channels,
        "seed": job.seed,
        "figures": {name: _figures(evaluation) for name, evaluation in evaluations.items()},
        "best_threshold": max(evaluations["median"].curve, key=lambda point: point[3])[0],
        "examples": kept.names,
        "cases": len(seconds),
        "failed": failed,
        "files": files_of(job.test_cases, job.channels or ()),
        "seconds_per_scan": float(np.mean(seconds)),
        "peak_memory_mb": peak_memory_mb(),
        "threads": torch.get_num_threads(),
        "device": str(detector.device),
    }
    # Written last: a job counts as done from the moment its result is there.
    write_text(job.result, json.dumps(facts, indent=2) + "\n")


def detector_of(job: Job) -> Detector:
    """The job's model; where the weights are another method's, that method's network with this one's settings."""
    detector = Detector.load(job.model, job.device)
    if job.trained == job.variant:
        return detector
    settings = {**methods.preset(job.method, job.preset).settings, **job.settings}
    # The threshold is the other method's; a comparison needs none.
    spec = replace(detector.spec, method=job.method, settings=settings, thresholds=None)
    return detector.with_spec(spec)


def run_in_process(work: Callable[[Job, Tell], None], job: Job, tell: Tell) -> None:
    """Run ``work(job, tell)`` in a fresh process and pass on what it tells, raises, or is stopped by.

    Ctrl-C and SIGTERM reach it once, as SIGTERM, so that a training can save its state; raises
    `errors.Interrupted` then. Should this process be killed, the other ends at its next word.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, job, sender), daemon=True)
    with StopRequest.listen() as stop:
        try:
            process.start()
            sender.close()
            ending = _listen(receiver, process, stop, tell)
            process.join()
        finally:
            if process.is_alive():
                process.kill()
    if stop.signal is not None:
        raise Interrupted(f"stopped in {job.name}; the same command continues.", stop.signal)
    if isinstance(ending, str) and ending != "done":
        raise AnomriError(f"{job.name}: {ending}")
    if ending is None:
        raise AnomriError(
            f"{job.name}: its process ended with code {process.exitcode}; out of memory? The same command tries again."
        )


def _listen(receiver: Connection, process: Any, stop: StopRequest, tell: Tell) -> str | None:
    """The last word of the process: ``done``, an error in words, or nothing."""
    ending, told = None, False
    while True:
        if stop.signal is not None and not told:
            process.terminate()
            told = True
        try:
            if not receiver.poll(0.2):
                continue
            word = receiver.recv()
        except EOFError:
            return ending
        if isinstance(word, Progress):
            tell(word)
        else:
            ending = word


def _run(work: Callable[[Job, Tell], None], job: Job, sender: Connection) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a terminal's Ctrl-C is for the parent, which passes it on once
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        work(job, sender.send)
        sender.send("done")
    except (AnomriError, Interrupted) as error:
        sender.send(str(error))


def peak_memory_mb() -> float:
    """The most memory that this process has had resident so far, in MB (2^20 bytes); NaN where nobody tells."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, without what the parent had when it started this one
        line = next(
            (line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None
        )
        if line is not None:
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
    """The most telling slice of the first test patients: scan, truth and map, each (h, w)."""

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
