"""Every speed as a ratio to `plain`, paired in one run: `make bench`.

    python benchmarks/speed.py ../shared/data/brats18 [--repeats 5] [--widths 64,128,256,512]
    [--only network] [--precision 32-true]

Each figure is the median over repeats, in each of which the plain program and anomri do the same
work one after the other, so that what else a machine does weighs on both. The plain program has a
process of its own, so that nothing that anomri sets in its process helps it. Weights are random:
speed does not depend on them.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import plain
from anomri.comparison.jobs import peak_memory_mb
from anomri.evaluation.pooling import Pool
from anomri.evaluation.scored import Scored
from anomri.methods import registry as methods
from anomri.model.detector import Detector
from anomri.runs.pipeline import read_ahead
from anomri.runtime.devices import resolve_precision
from anomri.scans.find import find_cases
from anomri.scans.read import read_volume
from anomri.scoring.metrics import drop_small_components
from anomri.slices import brain_box, find_foreground, join_boxes, slice_volume
from anomri.spec import Grid, ModelSpec, Scaling, Training
from anomri.training.packing import pack_cohort

MEMORY = "memory of detect over 100 scans, the model in the package"
PROCESSOR_TIME = "processor time of one scan by command, the model in the package, report included"


def seconds(work: Callable[..., object], *arguments: object) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begun


def processor_seconds(*arguments: str | Path) -> float:
    """Processor time of a command of anomri, from the start of Python to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _command("-m", "anomri", *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@dataclass(frozen=True)
class Pairs:
    """Prints the rows of the table: the plain program in the one process of ``pool``, anomri in
    this one."""

    pool: ProcessPoolExecutor
    repeats: int
    wanted: tuple[str, ...]
    """Rows to print, by the beginning of their name."""

    def row(
        self,
        name: str,
        target: str,
        fast: Callable[[], object],
        slow: Callable[..., object],
        *arguments: object,
    ) -> None:
        """Print the medians of both and of their ratio; ``arguments`` are those of ``slow``."""
        if not name.startswith(self.wanted):
            return
        times = [
            (self.pool.submit(seconds, slow, *arguments).result(), seconds(fast))
            for _ in range(self.repeats)
        ]
        ratio = statistics.median(a / b for a, b in times)
        before, after = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {before:.3g} s | {after:.3g} s | {ratio:.2f} x | {target} |", flush=True)


@cache
def _plain(widths: tuple[int, ...]) -> tuple[plain.Network, torch.optim.Optimizer]:
    """The plain program's network, of the process that asks."""
    network = plain.Network(widths)
    return network, plain.optimizer_of(network)


def _plain_detect(widths: tuple[int, ...], folder: Path, out: Path) -> None:
    plain.detect(_plain(widths)[0], folder, out)


def _plain_pass(widths: tuple[int, ...], x: torch.Tensor) -> None:
    with torch.no_grad():
        _plain(widths)[0](x)


def _plain_step(widths: tuple[int, ...], x: torch.Tensor) -> None:
    plain.training_step(*_plain(widths), x)


def _plain_pack(folders: list[Path], out: Path) -> None:
    for folder in folders:
        plain.pack(folder, out / f"{folder.name}.npz")


def _plain_evaluate(scores: NDArray[np.float32], labels: NDArray[np.bool_]) -> None:
    plain.evaluate(scores, labels)
    for threshold in (0.3, 0.31):
        drop_small_components(scores > threshold, 20)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--widths", default="64,128,256,512")
    parser.add_argument(
        "--memory", action="store_true", help="Print the last row alone: some minutes."
    )
    parser.add_argument("--precision", default="auto", help="Of anomri's rows on detection.")
    parser.add_argument("--only", nargs="*", help="Rows to print, by the beginning of their name.")
    arguments = parser.parse_args()
    repeats, widths = arguments.repeats, tuple(int(width) for width in arguments.widths.split(","))
    cases = find_cases(arguments.cohort)
    if arguments.memory:
        with tempfile.TemporaryDirectory() as place:
            _memory(Detector.load(), cases, Path(place))
        return
    folders = [next(iter(case.channels.values())).parent for case in cases]
    torch.manual_seed(0)
    stacks = [slice_volume(read_volume(case, plain.CHANNELS)) for case in cases[:2]]
    box = None
    for stack in stacks:
        here = brain_box(stack.foreground, 1)
        box = here if box is None else join_boxes(box, here, 2 ** (len(widths) - 1), (128, 128))
    spec = ModelSpec(plain.CHANNELS, settings={"widths": list(widths)})
    precision = arguments.precision
    whole = Detector(spec, methods.build(spec), precision=precision)
    cropped = Detector(replace(spec, crop=box), methods.build(spec), precision=precision)
    built_in = Detector.load(precision=precision)

    cpu = next(
        (
            line.split(":")[1].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        "",
    )
    print(
        f"{cpu or platform.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, widths {widths}"
    )
    print(
        f"precision {resolve_precision(precision)}; medians of {repeats}; date {time.strftime('%Y-%m-%d')}\n"
    )
    print("| what | plain | anomri | ratio | target |\n|---|---|---|---|---|", flush=True)
    own_process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as place, own_process as pool:
        out, pairs, numbers = (
            Path(place),
            Pairs(pool, repeats, tuple(arguments.only or ("",))),
            itertools.count(),
        )
        rows = (
            ("whole slices", "6", whole),
            ("brain's box", "8", cropped),
            ("the model in the package", "", built_in),
        )
        for name, target, detector in rows:
            pairs.row(
                f"detect, one scan, file to files, {name}",
                target,
                lambda detector=detector: detector.detect(cases[0]).save(out),  # type: ignore[misc]
                _plain_detect,
                widths,
                folders[0],
                out / "plain.nii.gz",
            )
        cropped.save(out / "model")
        pairs.row(
            "the same by command, start of Python included, brain's box",
            "",
            lambda: _command(
                "-m",
                "anomri",
                "detect",
                "-i",
                folders[0],
                "-o",
                out / f"run{next(numbers)}",
                "-m",
                out / "model",
            ),
            _command,
            plain.__file__,
            folders[0],
            out / "plain.nii.gz",
        )
        x = stacks[0].x[40:56]
        few = replace(stacks[0], x=x, foreground=stacks[0].foreground[40:56], index=range(16))
        for name, detector in (("whole", whole), ("box", cropped)):
            pairs.row(
                f"network alone, 16 slices, {name}",
                "1.5 in float32, 6 in bfloat16",
                lambda detector=detector: detector.output(few),  # type: ignore[misc]
                _plain_pass,
                widths,
                x,
            )
        pairs.row(
            "preparing 4 scans into the cache",
            "8",
            lambda: pack_cohort(
                cases[:4], plain.CHANNELS, Grid(), Scaling(), out / f"cache{next(numbers)}"
            ),
            _plain_pack,
            folders[:4],
            out,
        )
        _training(spec, box, x, pairs)
        _evaluation(stacks, out, pairs)
        if "start of `anomri --help`".startswith(pairs.wanted):
            shown = [seconds(_command, "-m", "anomri", "--help") for _ in range(repeats)]
            print(f"| start of `anomri --help` | | {statistics.median(shown):.2f} s | | < 0.25 s |")
        if PROCESSOR_TIME.startswith(pairs.wanted):
            taken = [
                processor_seconds("detect", "-i", folders[0], "-o", out / f"run{next(numbers)}")
                for _ in range(repeats)
            ]
            print(f"| {PROCESSOR_TIME} | | {statistics.median(taken):.2f} s | | 6 s |")
        if MEMORY.startswith(pairs.wanted):
            # In a process of its own: what the others took must not count.
            print(_command(__file__, arguments.cohort, "--memory"), end="")


def _training(
    spec: ModelSpec, box: tuple[int, int, int, int] | None, x: torch.Tensor, pairs: Pairs
) -> None:
    half = resolve_precision("auto") == "bf16-mixed"
    # As `train.fit` does.
    method = (
        methods.build(spec)
        .train()
        .to(memory_format=torch.channels_last if half else torch.contiguous_format)
    )
    optimizer = plain.optimizer_of(method)
    generator, foreground = torch.Generator().manual_seed(0), find_foreground(x, Scaling())

    def step(part: tuple[int, int, int, int] | None) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = method(x, foreground, generator, part)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), Training().gradient_clip)
        optimizer.step()

    for name, part in (("whole slices", None), ("brain's box", box)):
        pairs.row(
            f"one training step, batch 16, {name}",
            "5",
            lambda part=part: step(part),  # type: ignore[misc]
            _plain_step,
            tuple(spec.settings["widths"]),
            x,
        )


def _evaluation(stacks: list, out: Path, pairs: Pairs) -> None:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    labels = [stack.label.numpy() for stack in stacks]
    scores = [(0.3 * label + 0.3 * rng.random(label.shape)).astype(np.float32) for label in labels]
    numbers = itertools.count()

    def ours() -> None:
        folder = out / f"pool{next(numbers)}"
        folder.mkdir()
        pool = Pool(folder)
        for number, (score, label) in enumerate(zip(scores, labels, strict=True)):
            pool.add(Scored(str(number), score, label, 20, threshold=0.3))
        pool.evaluate({}, 0.3)

    pooled = np.concatenate(scores), np.concatenate(labels)
    pairs.row(
        f"evaluate, {len(stacks)} patients, intervals too", "20", ours, _plain_evaluate, *pooled
    )


def _memory(detector: Detector, cases: list, out: Path) -> None:  # type: ignore[type-arg]
    resident = []
    scans = itertools.islice(itertools.cycle(cases), 100)
    for _, volume, _ in read_ahead(list(scans), detector.read):
        detector.detect(volume).save(out)  # type: ignore[arg-type]
        facts = dict(line.split(":", 1) for line in _lines("/proc/self/status"))
        resident.append(int(facts["VmRSS"].split()[0]) / 1024)
    tenths = ", ".join(
        f"{statistics.median(resident[first : first + 10]):.0f}" for first in range(0, 100, 10)
    )
    print(
        f"| {MEMORY}: median of every ten | | {tenths} MB, at most {peak_memory_mb():.0f} MB | | flat, < 2 GiB |"
    )


def _command(*arguments: str | Path) -> str:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()
