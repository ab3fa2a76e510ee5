"""One job shared by several processes, on any number of machines, through Lightning Fabric.

With one process every call below does its work at once and communicates with nobody.
"""

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
from anomri.runtime.launch import read_launch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TIMEOUT = timedelta(days=2)
"""How long a process waits for the others. The launcher ends those that wait for a dead one."""
T = TypeVar("T")


class ReportedElsewhere(AnomriError):
    """An error that the main process reports to the user; this process only has to end."""

    reported = True


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one job, seen from one of them: ``rank`` (from 0) of ``world_size``.

    `share` and `batch_rows` divide work. All other methods are collective: every process must call
    them, in the same order.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints the messages of the job."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's items: every ``world_size``-th, because neighbours are often of like size.

        >>> ProcessGroup(rank=1, world_size=3).share("abcdefg")
        ['b', 'e']
        """
        return list(items[self.rank :: self.world_size])

    def batch_rows(self, batch_size: int) -> range:
        """This process's rows of a batch, in one piece.

        >>> [ProcessGroup(rank, 3).batch_rows(7) for rank in range(3)]
        [range(0, 2), range(2, 4), range(4, 7)]
        """
        first = batch_size * self.rank // self.world_size
        last = batch_size * (self.rank + 1) // self.world_size
        return range(first, last)

    def run_on_all(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` in every process; each gets the results of all, in the order of their ranks.

        If some raise `AnomriError`, all processes raise it.
        """
        if self.world_size == 1:
            return [work()]
        result: T | None = None
        problem: str | None = None
        try:
            result = work()
        except AnomriError as error:
            problem = str(error)
        answers: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(answers, (result, problem))
        problems = list(dict.fromkeys(text for _, text in answers if text is not None))
        if problems:
            raise (AnomriError if self.is_main else ReportedElsewhere)("\n".join(problems))
        return [answer for answer, _ in answers]

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the main process alone; all get its result or its `AnomriError`."""
        results = self.run_on_all(lambda: work() if self.is_main else None)
        return results[0]  # type: ignore[return-value]

    @contextmanager
    def sole_use(self, folder: Path) -> Iterator[None]:
        """`folders.sole_use` for the whole job; the main process holds the lock."""
        with ExitStack() as held:
            self.run_on_main(lambda: held.enter_context(sole_use(folder)))
            yield

    def check_same(self, value: object, problem: str) -> None:
        """Raise `AnomriError` with the text ``problem`` if ``value`` differs between processes."""
        values = self.run_on_all(lambda: value)

        def compare() -> None:
            if any(other != value for other in values):
                raise AnomriError(problem)

        self.run_on_main(compare)

    def all_reduce_mean(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The elementwise mean of a tensor over the processes."""
        if self.world_size == 1:
            return values
        values = values.to(device)
        torch.distributed.all_reduce(values)
        return values / self.world_size

    def all_reduce_max(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """The largest of each of some whole numbers over the processes."""
        if self.world_size == 1:
            return list(numbers)
        largest = torch.tensor(numbers, device=device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return [int(number) for number in largest.tolist()]

    def no_gradient_sync(self, fabric: Fabric, model: Any) -> Any:
        """A context for all but the last part of a batch: gradients stay in this process."""
        return fabric.no_backward_sync(model) if self.world_size > 1 else nullcontext()


def join_processes(device: str = "auto") -> ProcessGroup:
    """Connect this process with the others that torchrun or srun started; one device each.

    Only the first call connects. Without a launcher the group is this process alone.
    """
    place = read_launch()
    if place.launcher is not None:
        _connect(resolve_device(device).type)
    return ProcessGroup(place.rank, place.world_size)


@cache
def _connect(device: str) -> None:
    make_fabric(device)


def make_fabric(device: str = "auto", precision: Any = "32-true") -> Fabric:
    """A Fabric on all processes of torchrun or srun, one accelerator each, or on this one."""
    # Imported here: it takes longer than torch, and detection in one process does without it.
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import environments
    from lightning_fabric.strategies.ddp import DDPStrategy

    place, found = read_launch(), resolve_device(device)
    accelerator = found.type
    kinds: Any = environments
    if place.launcher is None:
        # Named, because Fabric takes a SLURM batch script for one of many processes.
        return Fabric(
            accelerator=accelerator,
            # A list of one: that very GPU. Named cuda alone, it is the first.
            devices=1 if found.index is None else [found.index],
            precision=precision,
            plugins=[kinds.LightningEnvironment()],
        )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if place.launcher == "srun":
        # Fabric insists on this variable, though --ntasks alone is enough.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(place.local_world_size))
        environment = kinds.SLURMEnvironment(auto_requeue=False)
    else:
        environment = kinds.TorchElasticEnvironment()
    fabric = Fabric(
        accelerator=accelerator,
        devices=place.local_world_size,
        num_nodes=place.world_size // place.local_world_size,
        strategy=DDPStrategy(timeout=TIMEOUT),
        precision=precision,
        plugins=[environment],
    )
    fabric.launch()
    atexit.register(_leave_gloo)
    return fabric


def _leave_gloo() -> None:
    # A gloo thread that frees a tensor while the interpreter ends aborts the process.
    # Fabric itself does this for NCCL.
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
