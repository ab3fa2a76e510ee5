"""What a training keeps on disk while it runs: its state, to resume from, and its log."""

from __future__ import annotations

import csv
import io
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from anomri.errors import AnomriError
from anomri.files import whole_file
from anomri.model.files import LOADING_ERRORS

SAVE_EVERY_S = 300.0
"""The most that a training which is killed loses."""
QUICK_S, SAVING_SHARE = 0.1, 0.05
"""A validation is followed by saving if that takes no longer than this, or than this share of the
time since the last."""


@dataclass
class TrainingState:
    """All that a training needs to continue; random numbers follow from its seed and step."""

    NAME: ClassVar[str] = "training.pt"
    step: int = 0
    best_loss: float = float("inf")
    best: dict[str, Tensor] = field(default_factory=dict)
    network: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    """The weights' moving average, if the training keeps one."""
    optimizers: dict[str, Any] = field(default_factory=dict)
    """By the name of the objective whose parameters they move."""
    losses: list[Tensor] = field(default_factory=list)
    """Losses of the steps since the last validation."""
    task: dict[str, Any] = field(default_factory=dict)
    """Settings and cohort: a training does not continue with others."""

    def add(self, loss: Tensor) -> None:
        """Count a step that was taken, and keep its loss."""
        self.step += 1
        self.losses = [*self.losses, loss]

    def keep_best(self, network: nn.Module, loss: float | None) -> None:
        """Keep the network's weights if their validation ``loss`` is the lowest so far."""
        if loss is not None and loss < self.best_loss:
            self.best_loss = loss
            weights = network.state_dict()
            self.best = {name: value.cpu().clone() for name, value in weights.items()}

    def follow(self, network: nn.Module, share: float) -> None:
        """Move the average towards the network's weights; it keeps ``share``, less at first."""
        share = min(share, self.step / (self.step + 9))
        weights = network.state_dict()
        moved = {
            name: value
            for name, value in weights.items()
            if value.is_floating_point() and name in self.average
        }
        self.average = {
            name: self.average[name].to(value.device) if name in moved else value.clone()
            for name, value in weights.items()
        }
        if moved:
            # All at once: on a GPU, one by one takes longer than the step.
            get_ema_multi_avg_fn(share)(
                [self.average[name] for name in moved], list(moved.values()), None
            )

    @contextmanager
    def averaged(self, network: nn.Module) -> Iterator[None]:
        """Give the network the averaged weights, if there are any, while the block runs."""
        if not self.average:
            yield
            return
        weights = {name: value.clone() for name, value in network.state_dict().items()}
        network.load_state_dict(self.average)
        try:
            yield
        finally:
            network.load_state_dict(weights)

    def save(self, folder: Path) -> None:
        """Write the state into a model folder, whole or not at all."""
        with whole_file(folder / self.NAME) as partial:
            # Into memory first: torch reports a full disk as a RuntimeError of its own.
            content = io.BytesIO()
            torch.save(vars(self), content)
            partial.write_bytes(content.getbuffer())

    @classmethod
    def remove(cls, folder: Path) -> None:
        """Remove the state from a model folder, if there is one: the training is finished."""
        (folder / cls.NAME).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path, task: Mapping[str, Any]) -> TrainingState:
        """The state in a folder, or a new one; raises `AnomriError` if it is of another task."""
        path = folder / cls.NAME
        if not path.exists():
            return cls(task=dict(task))
        try:
            # torch does not check the checksums that it writes.
            with zipfile.ZipFile(path) as parts:
                if broken := parts.testzip():
                    raise ValueError(f"the checksum of {broken} does not fit")
            state = cls(**torch.load(path, map_location="cpu", weights_only=True))
        except (*LOADING_ERRORS, zipfile.BadZipFile) as error:
            raise AnomriError(
                f"{path}: is damaged ({error}); delete it to train from the start."
            ) from error
        changed = [name for name in task if state.task.get(name) != task[name]]
        if changed:
            raise AnomriError(
                f"{path}: was begun with another {', '.join(changed)}; resume with the same "
                f"command and cohort, or name another folder."
            )
        return state


class Saver:
    """Saves the state of a training, and knows when that is due."""

    def __init__(self, folder: Path, step: int) -> None:
        self.step = step
        """The last step that was saved."""
        self._folder = folder
        self._saved_at = time.monotonic()
        self._seconds = 0.0

    def is_due(self, validated: bool) -> bool:
        """Whether to save now: after a validation if that is cheap, else from time to time."""
        since = time.monotonic() - self._saved_at
        cheap = self._seconds < QUICK_S + SAVING_SHARE * since
        return since > SAVE_EVERY_S or (validated and cheap)

    def save(self, state: TrainingState, write: bool) -> None:
        """Note that a step is saved; the process that is to ``write`` writes it."""
        begun = time.monotonic()
        if write:
            state.save(self._folder)
        self.step = state.step
        self._saved_at = time.monotonic()
        self._seconds = self._saved_at - begun


class Log:
    """``log.csv`` of a training, and the same for TensorBoard if that is installed.

    Rows after the ``step`` that the training continues from are dropped.
    """

    COLUMNS = ("step", "loss", "validation_loss", "learning_rate", "seconds")

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / "log.csv"
        rows = []
        if step and self._path.exists():
            with self._path.open(newline="") as file:
                rows = [
                    row
                    for row in csv.reader(file)
                    if row and row[0].isdigit() and int(row[0]) <= step
                ]
        with whole_file(self._path) as partial, partial.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([self.COLUMNS, *rows])
        self._start = time.monotonic() - (float(rows[-1][-1]) if rows else 0.0)
        self._board = _tensorboard(folder / "tensorboard", step)

    @classmethod
    def is_log(cls, path: Path) -> bool:
        """Whether a file is the ``log.csv`` of a training, by its first line."""
        try:
            return path.read_text(encoding="utf-8").startswith(",".join(cls.COLUMNS) + "\n")
        except (OSError, ValueError):
            return False

    def add(self, step: int, loss: float, validation_loss: float, learning_rate: float) -> None:
        """Append one row."""
        seconds = time.monotonic() - self._start
        row = (
            step,
            f"{loss:.8g}",
            f"{validation_loss:.8g}",
            f"{learning_rate:.6g}",
            f"{seconds:.2f}",
        )
        with self._path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        if self._board is None:
            return
        values = {"loss": loss, "validation_loss": validation_loss, "learning_rate": learning_rate}
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write the rest of the TensorBoard log."""
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer for TensorBoard; ``None`` without the extra ``tensorboard``.

    Also ``None`` if the folder's name is not UTF-8, which TensorBoard cannot write to: `log.csv`
    has the same numbers.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # slow to import
    except ImportError:
        return None
    try:
        return SummaryWriter(str(folder), purge_step=step + 1)
    except UnicodeEncodeError:
        return None
