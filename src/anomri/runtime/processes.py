"""Work shared by any number of processes on any number of machines, through Lightning Fabric; nothing where there is one."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from anomri.errors import AnomriError
from anomri.runtime.devices import resolve_device
from anomri.runtime.folders import sole_use
from anomri.runtime.launch import launched

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PATIENCE = timedelta(days=2)
"""How long a process waits for the others; a launcher ends those that wait for one that is dead."""
T = TypeVar("T")


class ToldElsewhere(AnomriError):
    """An error that process 0 tells the user; the others only have to end."""

    told = True


@dataclass(frozen=True)
class Processes:
    """This process (``rank``, from 0) among ``count`` that do one job; their calls have to be the same and in order."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes what there is once."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> list[T]:
        """This process's share of a list: every ``count``-th, so that neighbours of like size are spread."""
        return list(items[self.rank :: self.count])

    def rows(self, total: int) -> range:
        """This process's share of a batch of ``total``, in one piece."""
        return range(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def each(self, work: Callable[[], T]) -> list[T]:
        """Every process does its ``work``; all get all results, or all raise the `AnomriError` of those that failed."""
        result: T | None = None
        problem: str | None = None
        try:
            result = work()
        except AnomriError as error:
            if self.count == 1:
                raise
            problem = str(error)
        if self.count == 1:
            return [result]  # type: ignore[list-item]
        answers: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(answers, (result, problem))
        problems = list(dict.fromkeys(text for _, text in answers if text is not None))
        if problems:
            raise (AnomriError if self.first else ToldElsewhere)("\n".join(problems))
        return [answer for answer, _ in answers]

    def once(self, work: Callable[[], T]) -> T:
        """Process 0 does the ``work``; all get its result or raise its `AnomriError`."""
        return self.each(lambda: work() if self.first else None)[0]  # type: ignore[return-value]

    @contextmanager
    def sole_use(self, folder: Path) -> Iterator[None]:
        """`folders.sole_use` for all processes together, held by process 0."""
        with ExitStack() as held:
            self.once(lambda: held.enter_context(sole_use(folder)))
            yield

    def agree(self, value: object, problem: str) -> None:
        """Raise `AnomriError` saying ``problem``, in all processes, if ``value`` is not the same in all."""
        values = self.each(lambda: value)

        def compare() -> None:
            if any(one != value for one in values):
                raise AnomriError(problem)

        self.once(compare)

    def mean(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The elementwise mean of a tensor over the processes."""
        if self.count == 1:
            return values
        values = values.to(device)
        torch.distributed.all_reduce(values)
        return values / self.count

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of a whole number over the processes."""
        if self.count == 1:
            return number
        largest = torch.tensor(number, device=device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return int(largest)

    def unsynchronised(self, fabric: Fabric, model: Any) -> Any:
        """A context in which gradients stay with their process, to be summed up with those of a later part."""
        return fabric.no_backward_sync(model) if self.count > 1 else nullcontext()


def fabric_of(device: str = "auto", precision: Any = "32-true") -> Fabric:
    """A Fabric on the processes that torchrun or srun started, one accelerator each, or on this process alone."""
    # Here, since it takes longer to import than torch, and detection by one process does without.
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import environments
    from lightning_fabric.strategies.ddp import DDPStrategy

    place, accelerator = launched(), resolve_device(device).type
    kinds: Any = environments
    if place.launcher is None:
        # Named, since Fabric by itself takes a batch script of SLURM for one of many processes.
        return Fabric(
            accelerator=accelerator,
            devices=1,
            precision=precision,
            plugins=[kinds.LightningEnvironment()],
        )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if place.launcher == "srun":
        # Fabric insists on the option of this name; --ntasks alone says as much.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(place.local_count))
        environment = kinds.SLURMEnvironment(auto_requeue=False)
    else:
        environment = kinds.TorchElasticEnvironment()
    fabric = Fabric(
        accelerator=accelerator,
        devices=place.local_count,
        num_nodes=place.count // place.local_count,
        strategy=DDPStrategy(timeout=PATIENCE),
        precision=precision,
        plugins=[environment],
    )
    fabric.launch()
    atexit.register(_leave)
    return fabric


def _leave() -> None:
    # A thread of gloo that lets go of a tensor while the interpreter ends aborts the process; for NCCL Fabric does this.
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def processes(device: str = "auto") -> Processes:
    """The processes of this job, connected with each other when first asked for; each takes a device of its own."""
    place = launched()
    if place.launcher is not None:
        _connect(resolve_device(device).type)
    return Processes(place.rank, place.count)


@cache
def _connect(device: str) -> None:
    fabric_of(device)
