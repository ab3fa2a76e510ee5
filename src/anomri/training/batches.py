"""Batches of a training, shared by processes, and taken in parts where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Generator, Tensor

from anomri.errors import AnomriError, first_line
from anomri.methods.draws import PartGenerator
from anomri.runtime.memory import free_memory, is_out_of_memory
from anomri.runtime.processes import ProcessGroup
from anomri.training.packing import HealthySlices

Loss = Callable[[Tensor, Generator], Tensor]


@dataclass(frozen=True)
class Part:
    """Slices (n, c, h, w) that go through the network at once.

    ``generator`` gives their random numbers; ``weight`` is their share of the gradient.
    """

    x: Tensor
    generator: Generator
    weight: float


@dataclass
class Batch:
    """The slices ``numbers`` of one step, and this process's ``parts`` of them."""

    numbers: Sequence[int]
    seed: int
    parts: list[Part]


class Batches:
    """Gives each process its slices of a step's batch, and sums up the gradient of the whole.

    The result is that of one process that takes the batch at once, up to the order of sums: a loss
    is a mean over independent slices, and random numbers are drawn as for the whole batch
    (`draws`). Where slices are not independent, or several networks take turns (``divisible`` is
    false), a batch stays in one piece.
    """

    def __init__(
        self,
        fabric: Fabric,
        processes: ProcessGroup,
        slices: HealthySlices,
        batch_size: int,
        accumulate: int = 1,
        divisible: bool = True,
    ) -> None:
        if (processes.world_size > 1 or accumulate > 1) and not divisible:
            raise AnomriError(
                "networks that take turns are trained by one process, with the whole batch at "
                "once; start one process, without --accumulate."
            )
        if processes.world_size > batch_size:
            raise AnomriError(
                f"a batch of {batch_size} slices cannot be shared by {processes.world_size} "
                f"processes; start fewer, or raise --batch-size."
            )
        self.fabric = fabric
        self.processes = processes
        self.slices = slices
        self.divisible = divisible
        self.count = min(max(accumulate, 1), len(processes.batch_rows(batch_size)))
        self._note = ""

    def warn(self, note: str) -> None:
        """Leave a message for the user, which `take_note` returns."""
        self._note = note

    def take_note(self) -> str:
        """The message that was left, once; else an empty string."""
        note, self._note = self._note, ""
        return note

    def load(self, numbers: Sequence[int], seed: int) -> Batch:
        """Read this process's slices of a batch; all that is random follows from ``seed``."""
        total = len(numbers)
        rows = self.processes.batch_rows(total)
        parts = []
        for part in range(self.count):
            chosen = rows[len(rows) * part // self.count : len(rows) * (part + 1) // self.count]
            x = self.slices.batch([numbers[row] for row in chosen])
            generator = PartGenerator(self.fabric.device, chosen.start, total).manual_seed(seed)
            # The gradients of processes are averaged, those of parts are added.
            parts.append(Part(x, generator, len(chosen) * self.processes.world_size / total))
        return Batch(numbers, seed, parts)

    def gradient(
        self, model: Any, optimizer: torch.optim.Optimizer, batch: Batch, loss: Loss
    ) -> Tensor:
        """Leave a batch's gradient in the parameters; returns this process's share of the loss.

        A batch that memory does not hold is tried again in twice as many parts, and so are those
        after it. Raises `AnomriError` where that is not possible.
        """
        while True:
            try:
                optimizer.zero_grad()
                return self.sum(model, batch.parts, loss)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._divide(len(self.processes.batch_rows(len(batch.numbers))), error)
            # Outside the handler, since the error keeps the attempt's tensors.
            batch.parts = []
            free_memory()
            batch.parts = self.load(batch.numbers, batch.seed).parts

    def sum(self, model: Any, parts: Sequence[Part], loss: Loss) -> Tensor:
        """Add the gradient of ``parts`` to that of the parameters; returns their loss."""
        losses = []
        for part in parts[:-1]:
            with self.processes.no_gradient_sync(self.fabric, model):
                losses.append(self._backward(part, loss))
        return torch.stack([*losses, self._backward(parts[-1], loss)]).sum()

    def _backward(self, part: Part, loss: Loss) -> Tensor:
        value = loss(part.x, part.generator)
        if part.weight != 1:
            value = value * part.weight
        self.fabric.backward(value)
        return value.detach()

    def _divide(self, rows: int, error: BaseException) -> None:
        """Take batches in twice as many parts from now on; ``rows`` are this process's slices."""
        can_divide = self.divisible and 2 * self.count <= rows
        # Other processes wait for this one's gradient and cannot begin the step again.
        if not can_divide or self.processes.world_size > 1:
            advice = f"--accumulate {2 * self.count}" if can_divide else "a smaller --batch-size"
            raise AnomriError(
                f"memory does not hold a batch ({first_line(error):.200}); continue with --resume "
                f"and {advice}."
            ) from error
        self.count *= 2
        self.warn(
            f"memory does not hold a batch at once; it is taken in {self.count} parts, with the "
            f"same result."
        )
