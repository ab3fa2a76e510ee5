"""A step that cannot be recorded goes on as before, and says so; what recording does is in
``test_gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from anomri.methods.base import Objective
from anomri.runtime.processes import ProcessGroup, make_fabric
from anomri.scans.find import find_cases
from anomri.spec import Grid, Scaling, Training
from anomri.training import steps
from anomri.training.batches import Batches
from anomri.training.packing import HealthySlices, pack_cohort


class NoGraph:
    def register_generator_state(self, generator: Generator) -> None:
        """What a graph does with it only a GPU can show."""


@contextmanager
def forbidden(graph: NoGraph) -> Iterator[None]:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")
    yield


def trained(slices: HealthySlices, capturable: bool) -> tuple[list[Tensor], list[Tensor], str]:
    """Losses and weights after some steps of a small network, and what the user is told."""
    torch.manual_seed(0)
    fabric = make_fabric("cpu")
    objective = Objective(torch.nn.Conv2d(2, 2, 3, padding=1))
    model, optimizer = fabric.setup(
        objective.module, steps.make_optimizer(objective, Training(), fabric.device)
    )
    batches = Batches(fabric, ProcessGroup(), slices, 4)

    def loss(x: Tensor, generator: Generator) -> Tensor:
        value: Tensor = (model(x) - x + torch.rand((), generator=generator)).square().mean()
        return value

    step = steps.Step(fabric, batches, model, objective, optimizer, loss, 0.5)
    assert not step.capturable
    step.capturable = capturable
    losses = [step(batches.load(range(k, k + 4), k), 0.01) for k in range(steps.WARM_UP + 3)]
    assert step.graph is None and not step.capturable
    return losses, [weight.detach().clone() for weight in model.parameters()], batches.take_note()


@pytest.mark.parametrize("reason", ["forbidden", "memory"])
def test_a_step_that_cannot_be_recorded_runs_directly(
    cohort: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    slices = HealthySlices(
        pack_cohort(find_cases(cohort)[:2], ("flair", "t1"), Grid(), Scaling(), cache)
    )
    plain, weights, told = trained(slices, False)
    assert told == ""
    streams: list[str] = []
    monkeypatch.setattr("torch.cuda.CUDAGraph", NoGraph)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: "the one before")
    monkeypatch.setattr("torch.cuda.set_stream", streams.append)
    if reason == "forbidden":
        monkeypatch.setattr("torch.cuda.graph", forbidden)
    else:
        monkeypatch.setattr("torch.cuda.graph", nullcontext)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (14, 100))
    losses, moved, told = trained(slices, True)
    assert streams == ["the one before"]
    if reason == "forbidden":
        assert "not recorded: operation not permitted when stream is capturing." in told
        assert torch.equal(torch.stack(losses), torch.stack(plain))
        assert all(map(torch.equal, moved, weights))
    else:
        assert "memory would not hold a validation" in told
