"""Progress: a bar for each stage on a terminal; in a file, a line for each case."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from anomri.training.train import Progress as TrainingProgress

STAGES = {
    "look": "a first look",
    "make": "making synthetic scans",
    "pack": "preparing slices",
    "train": "training",
    "score": "choosing the score",
    "thresholds": "choosing thresholds",
    "subsets": "choosing thresholds for subsets of the channels",
    "evaluate": "evaluating test scans",
}
"""What the stages of a training or a demo are called (`training.train.Progress`)."""
AT_ONCE_S = 0.005
"""Cases that follow each other faster were done by an earlier run and say nothing of the pace."""


@contextmanager
def training_progress(console: Console) -> Iterator[Callable[[TrainingProgress], None]]:
    """Give a function that shows the stage of a training, its losses and the time left."""
    with _bars(console) as bars:
        stages: dict[str, Stage] = {}

        def show(state: TrainingProgress) -> None:
            name = STAGES[state.stage]
            if name not in stages:
                stages[name] = Stage(name, bars)
            if state.note:
                console.print(f"note: {state.note}", soft_wrap=True)
            _show(stages[name], state)

        yield show


@contextmanager
def comparison_progress(console: Console) -> Iterator[Callable[[str, TrainingProgress], None]]:
    """Give a function that shows the stage of each job of a comparison."""
    with _bars(console) as bars:
        stages: dict[str, Stage] = {}
        shown: set[str] = set()

        def show(job: str, state: TrainingProgress) -> None:
            name = f"{job}: {STAGES[state.stage]}"
            if name not in stages:
                stages[name] = Stage(name, bars)
            # Every job reads the same scans.
            if state.note and state.note not in shown:
                shown.add(state.note)
                console.print(f"note: {state.note}", soft_wrap=True)
            _show(stages[name], state)

        yield show


@contextmanager
def case_progress(
    console: Console, name: str = "finding lesions"
) -> Iterator[Callable[[str, int], None]]:
    """Give a function to call with each case that is done and the number of all cases."""
    with _bars(console) as bars:
        stage = Stage(name, bars)
        stage.show(0, 0)

        def advance(case: str, total: int) -> None:
            stage.show(stage.done + 1, total, case)

        yield advance


class Stage:
    """One stage of a job: how much of it is done, for how long, and how much time is left."""

    def __init__(
        self, name: str, bars: Progress, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.done = 0
        self._total = 0
        self._bars = bars
        self._clock = clock
        self._task = bars.add_task(name, total=None, count="", left="", text="", visible=False)
        self._since = self._last = clock()
        self._done_before = 0
        self._measured = False
        self._printed: Hashable = None

    def show(self, done: int, total: int, text: str = "", line: Hashable = None) -> None:
        """Show that ``done`` of ``total`` is done (0: not known yet), with ``text`` behind it.

        Where there is no terminal, a line is printed whenever ``line`` changes, by default
        whenever ``done`` does.
        """
        left = self._time_left(done, total)
        count = f"{done}/{total}" if total > 1 else ""
        self._bars.update(
            self._task,
            completed=done,
            total=total or None,
            count=count,
            left=f", {left} left" if left else "",
            text=text,
            visible=True,
        )
        console = self._bars.console
        if console.is_terminal:
            return
        if self._printed is None:
            console.print(f"{self.name} ...", soft_wrap=True)
            self._printed = 0 if line is None else line
        key = done if line is None else line
        if key == self._printed:
            return
        self._printed = key
        facts = f"{self.name} {count}".strip() + (f": {text}" if text else "")
        console.print(facts + (f" ({left} left)" if left else ""), soft_wrap=True)

    def _time_left(self, done: int, total: int) -> str:
        """The time left by the pace so far, in words; nothing as long as the pace is not known."""
        now = self._clock()
        another_part = (self._total and total != self._total) or done < self.done
        if another_part:
            self._measured = False
        if not self._measured and (another_part or now - self._last < AT_ONCE_S):
            self._since, self._done_before = now, done
        else:
            self._measured = True
        self.done, self._total, self._last = done, total, now
        if done <= self._done_before or done >= total:
            return ""
        return about((now - self._since) / (done - self._done_before) * (total - done))


def about(seconds: float) -> str:
    """A rough duration in words.

    >>> about(2.3), about(44), about(130), about(4 * 3600)
    ('about 5 s', 'about 45 s', 'about 3 min', 'about 4 h')
    """
    if seconds < 90:
        return f"about {max(5, 5 * math.ceil(seconds / 5))} s"
    if seconds < 90 * 60:
        return f"about {math.ceil(seconds / 60)} min"
    return f"about {seconds / 3600:.0f} h"


def _show(stage: Stage, state: TrainingProgress) -> None:
    if state.stage != "train":
        stage.show(state.done, state.total)
        return
    losses = ""
    if not math.isnan(state.loss):
        losses = f"loss {state.loss:.5f}, validation {state.validation_loss:.5f}"
    stage.show(state.done, state.total, losses, line=losses)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("elapsed{task.fields[left]}", markup=False),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
