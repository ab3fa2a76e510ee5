"""Kill the real command line at random moments, give the same command again, and compare with a run
left in peace.

    python tests/kills.py --kills 100 --seed 7

prints a table (verb, kills, lost, done twice, other bytes, half-written). A parent that has
imported everything forks a child for each command, so that a kill costs no start-up; it computes
nothing itself, which makes forking safe.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "src")]

WARM = (
    "training.train",
    "runs.detect",
    "evaluation.evaluate",
    "evaluation.merge",
    "reporting.pages",
    "reporting.pictures",
    "reporting.plots",
    "reporting.previews",
    "cli.progress",
    "scans.intake",
)
CASES = 5
TRIAL_KILLS = 6
"""Kills of one command before it is left to finish."""


def warm_up() -> None:
    """Import what the commands need, and give the denoising autoencoder a preset of a second."""
    for name in WARM:
        import_module(f"anomri.{name}")
    for name in (
        "torch.utils.tensorboard",
        "torch.profiler",
        "jinja2",
        "pydantic",
        "anomri.cli",
        "matplotlib.backends.backend_svg",
    ):
        import_module(name)
    import torch

    from anomri.methods.dae import DAE

    # Refuses a name that is not there: a constant that has moved would otherwise be left as it is.
    changes = pytest.MonkeyPatch()
    changes.setattr(
        "anomri.evaluation.pooling.BOOTSTRAP_STEPS", 64
    )  # the figures' intervals are not what is tried here
    # A cache may be shared, so that what a killed run left in it stays for a day; here it is one
    # run's.
    changes.setattr("anomri.files.ABANDONED_S", 0.0)
    # A case takes no time, so that tables and reports can be compared to the byte.
    clock = {name: getattr(time, name) for name in ("time", "strftime", "localtime")}
    changes.setattr("anomri.runs.pipeline.time", SimpleNamespace(**clock, monotonic=lambda: 0.0))
    torch.set_num_threads(1)
    small = DAE.PRESETS["small"]
    assert small.training is not None
    schedule = replace(
        small.training,
        steps=20,
        batch_size=4,
        precision="32-true",
        validate_every=4,
        validation_slices=8,
    )
    gc.freeze()  # a child that collects garbage would copy all of its parent's memory
    DAE.PRESETS["tiny"] = replace(small, settings={"widths": [2, 4]}, training=schedule)


def start(command: list[str], log: Path) -> int:
    """Fork a child that runs the command line; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import torch

        from anomri.cli import main

        # A fork leaves torch's thread pool behind, and threads that make a new one at once may find
        # none.
        torch.set_num_threads(1)
        code = main(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finished(pid: int, log: Path) -> None:
    """Wait for a child that has to succeed."""
    code = wait(pid)
    if code != 0:
        raise SystemExit(f"exit code {code}\n{log.read_text()}")


class Verb:
    """A command that writes to ``<place>/out`` (and ``cache``), what there has to be before, and
    its records of work done."""

    def __init__(
        self,
        name: str,
        command: list[str],
        records: str,
        prepare: Callable[[Path], None] = lambda place: None,
    ) -> None:
        self.name, self.command, self.records, self.prepare = name, command, records, prepare

    def arguments(self, place: Path) -> list[str]:
        return [part.replace("PLACE", str(place)) for part in self.command]

    def done(self, place: Path) -> dict[Path, tuple[int, bytes]]:
        """What counts as done, with the time it was written."""
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes()) for path in place.glob(self.records)
        }


def state_of(place: Path) -> dict[str, bytes]:
    """The output's files by name, without times that no two runs share."""
    content = {}
    for path in sorted(path for path in place.rglob("*") if path.is_file()):
        name = str(path.relative_to(place))
        if path.name.startswith((".lock", "events.out", "log.txt")) or path.name == "plan":
            continue
        text = path.read_bytes()
        if path.name == "log.csv":
            text = re.sub(rb",[0-9.]+\n", b",seconds\n", text)
        elif path.suffix == ".json":
            text = re.sub(rb'"(seconds|started)": [^,\n]*', b'"\\1": 0', text)
            text = text.replace(str(place).encode(), b"PLACE")
        content[name] = text
    return content


def attack(verb: Verb, root: Path, kills: int, rng: random.Random) -> dict[str, object]:
    """Kill ``verb`` so often, at random moments; returns its row of the table."""
    peace = root / f"{verb.name}-peace"
    peace.mkdir()
    verb.prepare(peace)
    begun = time.monotonic()
    finished(start(verb.arguments(peace), peace / "log.txt"), peace / "log.txt")
    length = time.monotonic() - begun
    expected = state_of(peace)
    row = {
        "verb": verb.name,
        "seconds": round(length, 2),
        "kills": 0,
        "lost": 0,
        "twice": 0,
        "other bytes": 0,
        "half": 0,
    }
    trial = 0
    while int(row["kills"]) < kills:
        trial += 1
        place = root / f"{verb.name}-{trial}"
        place.mkdir()
        verb.prepare(place)
        log = place / "log.txt"
        before = verb.done(place)
        for _ in range(TRIAL_KILLS):
            pid = start(verb.arguments(place), log)
            time.sleep(rng.uniform(0, 0.95 * length))
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            if code == -signal.SIGKILL:
                row["kills"] = int(row["kills"]) + 1
            elif code:
                raise SystemExit(f"{verb.name}: exit code {code}\n{log.read_text()}")
            after = verb.done(place)
            # The scores of an evaluation go after its last file, the report: what is killed in
            # between has ended.
            _compare(
                row, before, after, ended=code == 0 or (place / "out" / "report.html").exists()
            )
            before = after
        finished(start(verb.arguments(place), log), log)
        _compare(row, before, verb.done(place), ended=True)
        found = state_of(place)
        row["half"] = int(row["half"]) + sum(
            ".partial-" in name or ".scores" in name for name in found
        )
        differing = {
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        }
        if differing:
            print(f"{verb.name} {trial}: {sorted(differing)}", file=sys.stderr)
        row["other bytes"] = int(row["other bytes"]) + len(differing)
        shutil.rmtree(place)
    return row


def _compare(
    row: dict[str, object], before: dict[Path, tuple[int, bytes]], after: dict, ended: bool
) -> None:
    for path, was in before.items():
        if path.suffix == ".csv":
            # The log of a training: rows of steps that were saved stay, whatever is appended.
            kept = was[1].count(b"\n") - 1  # the last may be of a step not saved
            same = (
                path in after and after[path][1].splitlines()[:kept] == was[1].splitlines()[:kept]
            )
            row["lost"] = int(row["lost"]) + (not same)
        elif path not in after:
            # Scores are removed when the figures are written.
            row["lost"] = int(row["lost"]) + (not (ended and ".scores" in path.parts))
        elif after[path] != was:
            row["twice"] = int(row["twice"]) + 1


def verbs(root: Path) -> list[Verb]:
    """Cache building, training, detecting, evaluating and merging, on a cohort in ``root`` and a
    model made of it."""
    from conftest import write_case

    cohort, lesioned = root / "cohort", root / "lesioned"
    for number in range(CASES):
        write_case(cohort, f"case{number}", number, lesion=False)
        write_case(lesioned, f"lesion{number}", 50 + number, lesion=True)
    train = [
        "train",
        "-i",
        str(cohort),
        "-o",
        "PLACE/out",
        "--preset",
        "tiny",
        "--device",
        "cpu",
        "--resume",
    ]
    model = root / "model" / "out"
    finished(
        start(
            [part.replace("PLACE", str(root / "model")) for part in train]
            + ["--cache", str(root / "cache")],
            root / "log.txt",
        ),
        root / "log.txt",
    )
    source = ["-i", str(lesioned), "-m", str(model), "--device", "cpu"]

    for verb in ("detect", "evaluate"):
        for shard in ("1/2", "2/2"):
            command = [verb, *source, "-o", str(root / "shards"), "--shard", shard]
            finished(start(command, root / "log.txt"), root / "log.txt")

    def shards(place: Path) -> None:
        shutil.copytree(root / "shards", place / "out")

    packing = [
        *train[:4],
        "PLACE/out",
        "--method",
        "thresholding",
        "--resume",
        "--cache",
        "PLACE/cache",
    ]
    return [
        Verb("pack", packing, "cache/*.json"),
        Verb("train", [*train, "--cache", str(root / "cache")], "out/log.csv"),
        Verb("detect", ["detect", *source, "-o", "PLACE/out"], "out/logs/*.json"),
        Verb("evaluate", ["evaluate", *source, "-o", "PLACE/out"], "out/.scores/*.json"),
        Verb("merge", ["merge", "PLACE/out"], "out/logs/*.json", shards),
    ]


def stop(verb: Verb, root: Path, rng: random.Random, signals: list[int]) -> dict[str, object]:
    """Ask ``verb`` to stop as a scheduler does, at a random moment; returns how long it took and
    how it ended."""
    place = root / f"{verb.name}-stop-{rng.randrange(10**9)}"
    place.mkdir()
    verb.prepare(place)
    log = place / "log.txt"
    pid = start(verb.arguments(place), log)
    time.sleep(rng.uniform(0.2, 0.8))
    begun = time.monotonic()
    for number in signals:
        os.kill(pid, number)
        time.sleep(0.05)
    code = wait(pid)
    seconds = time.monotonic() - begun
    said = log.read_text()[-2000:] if code else ""
    finished(start(verb.arguments(place), log), log)
    return {"verb": verb.name, "code": code, "seconds": round(seconds, 2), "said": said}


def _fork(every: list[Verb], root: Path, kills: int, seed: int) -> int:
    """A child that attacks some verbs and leaves their rows in a file called after the first;
    returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        rng, preempt = random.Random(seed), [signal.SIGUSR1, signal.SIGCONT, signal.SIGTERM]
        rows = [attack(verb, root, kills, rng) for verb in every]
        stops = [stop(verb, root, rng, preempt) for verb in every if verb.name != "merge"]
        (root / f"{every[0].name}.json").write_text(json.dumps({"kills": rows, "stops": stops}))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Run the campaign and print its table, as text or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=8, help="of each verb, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        every = verbs(root)
        # Two at a time: most machines have two cores.
        halves = [
            [verb for verb in every if verb.name in names]
            for names in (("pack", "train", "merge"), ("detect", "evaluate"))
        ]
        children = [
            _fork(half, root, given.kills, given.seed + number)
            for number, half in enumerate(halves)
        ]
        codes = [wait(child) for child in children]
        if any(codes):
            raise SystemExit(1)
        found = [json.loads((root / f"{half[0].name}.json").read_text()) for half in halves]
    order = [verb.name for verb in every]
    rows = sorted(
        (row for one in found for row in one["kills"]), key=lambda row: order.index(row["verb"])
    )
    stops = [row for one in found for row in one["stops"]]
    if given.json:
        print(json.dumps({"kills": rows, "stops": stops}))
        return
    for row in (*rows, *stops):
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
