"""Progress bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from anomri.training.train import Progress as TrainingProgress

STAGES = {
    "make": "making scans",
    "pack": "packing",
    "train": "training",
    "score": "score and thresholds",
    "evaluate": "test scans",
}


@contextmanager
def training_progress(console: Console) -> Iterator[Callable[[TrainingProgress], None]]:
    """Give a function that shows where a training is, with its losses and the time left."""
    with _bar(console) as bar:
        tasks: dict[str, TaskID] = {}

        def show(state: TrainingProgress) -> None:
            name = STAGES[state.stage]
            if state.stage not in tasks:
                tasks[state.stage] = bar.add_task(name, total=state.total, losses="")
                if not console.is_terminal:
                    console.print(f"{name} ...")
            if state.note:
                console.print(f"note: {state.note}", soft_wrap=True)
            losses = ""
            if state.loss == state.loss:  # not NaN: there is one
                losses = f"loss {state.loss:.5f}, validation {state.validation_loss:.5f}"
            bar.update(tasks[state.stage], completed=state.done, total=state.total, losses=losses)
            if not console.is_terminal and losses and losses != shown.get(state.stage):
                shown[state.stage] = losses
                console.print(f"{name} {state.done}/{state.total}: {losses}")

        shown: dict[str, str] = {}
        yield show


@contextmanager
def comparison_progress(console: Console) -> Iterator[Callable[[str, TrainingProgress], None]]:
    """Give a function that shows where each job of a comparison is: a bar on a terminal, a line a stage elsewhere."""
    with _bar(console) as bar:
        tasks: dict[tuple[str, str], TaskID] = {}

        def show(job: str, state: TrainingProgress) -> None:
            key = (job, state.stage)
            if key not in tasks:
                tasks[key] = bar.add_task(
                    f"{job}: {STAGES[state.stage]}", total=state.total, losses=""
                )
                if not console.is_terminal:
                    console.print(f"{job}: {STAGES[state.stage]}")
            losses = "" if state.loss != state.loss else f"loss {state.loss:.5f}"
            bar.update(tasks[key], completed=state.done, total=state.total, losses=losses)

        yield show


@contextmanager
def case_progress(console: Console) -> Iterator[Callable[[str, int], None]]:
    """Give a function to be called with each case that is done and how many there are."""
    with _bar(console) as bar:
        task = bar.add_task("cases", total=None, losses="")

        def advance(case: str, total: int) -> None:
            bar.update(task, advance=1, total=total, losses=case)

        yield advance


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
