"""A step of a training: gradient, clipping, optimiser; on a GPU it is recorded."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from anomri.errors import first_line
from anomri.methods.base import Objective
from anomri.runtime.memory import free_memory
from anomri.spec import Training
from anomri.training.batches import Batch, Batches, Loss, Part

SPARE = 0.15
"""Share of a GPU's memory that a recorded step must leave free: its own serves nothing else."""
WARM_UP = 5
"""Steps before one is recorded: in these, libraries choose kernels and networks are compiled."""


def make_optimizer(
    objective: Objective, training: Training, device: torch.device
) -> torch.optim.Optimizer:
    """Adam for the parameters of an objective, as the training asks for it."""
    gpu = device.type == "cuda"
    return torch.optim.Adam(
        objective.module.parameters(),
        # A recorded step reads its learning rate from the GPU.
        torch.tensor(training.learning_rate, device=device) if gpu else training.learning_rate,
        objective.betas,
        weight_decay=training.weight_decay,
        amsgrad=training.amsgrad,
        fused=gpu or None,
        capturable=gpu,
    )


def load_optimizer(optimizer: Any, saved: dict[str, Any]) -> None:
    """Give an optimiser a saved state, which may come from another kind of device."""
    here = [
        {name: group[name] for name in ("lr", "fused", "capturable")}
        for group in optimizer.param_groups
    ]
    groups = [{**group, **mine} for group, mine in zip(saved["param_groups"], here, strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                # The other device may have had another memory layout.
                state[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


@dataclass
class Step:
    """The step of one objective; calling it with a batch moves its parameters and returns the loss.

    Launching the kernels of a step one by one takes the processor longer than the GPU needs to run
    them. They are recorded into a CUDA graph if the method is ``capturable``, one process has the
    whole batch, and memory suffices.
    """

    fabric: Fabric
    batches: Batches
    model: Any
    objective: Objective
    optimizer: Any
    loss: Loss
    clip: float
    calls: int = 0
    capturable: bool = field(init=False)
    graph: torch.cuda.CUDAGraph | None = field(default=None, repr=False)
    part: Part | None = field(default=None, repr=False)
    """Where the recorded step reads its slices and random numbers."""
    recorded_loss: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        one_gpu = self.fabric.device.type == "cuda" and self.batches.processes.world_size == 1
        self.capturable = one_gpu and self.model.capturable

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """Move the objective's parameters at the training's learning rate ``rate``."""
        self._set_rate(self.objective.rate * rate)
        self.calls += 1
        ready = self.capturable and self.calls > WARM_UP and len(batch.parts) == 1
        if ready and self.graph is None:
            self._record(batch.parts[0])
        if self.graph is None or self.part is None or self.recorded_loss is None:
            loss = self.batches.gradient(self.model, self.optimizer, batch, self.loss)
            self._move()
            return loss
        self.part.x.copy_(batch.parts[0].x)
        self.part.generator.manual_seed(batch.seed)
        self.graph.replay()
        return self.recorded_loss.clone()

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _move(self) -> None:
        self.fabric.clip_gradients(
            self.model, self.optimizer, max_norm=self.clip, error_if_nonfinite=False
        )
        self.optimizer.step()

    def _record(self, part: Part) -> None:
        # A graph takes a plain generator; with the whole batch in one process it draws the same.
        part = replace(part, generator=torch.Generator(self.fabric.device))
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(part.generator)
        stream = torch.cuda.current_stream()
        problem = ""
        # The gradients must lie in the graph's own memory.
        self.optimizer.zero_grad()
        try:
            with torch.cuda.graph(graph):
                loss = self.batches.sum(self.model, [part], self.loss)
                self._move()
            free, total = torch.cuda.mem_get_info()
            if free < SPARE * total:
                problem = "beside a recorded step, memory would not hold a validation"
        except RuntimeError as error:
            problem = f"{first_line(error):.200}"
        if not problem:
            self.graph, self.part, self.recorded_loss = graph, part, loss
            return
        self.batches.warn(f"steps are launched kernel by kernel, not recorded: {problem}.")
        self.capturable = False
        # A failed recording may leave its stream in use and the allocator in doubt.
        torch.cuda.set_stream(stream)
        self.optimizer.zero_grad()
        del graph
        with suppress(RuntimeError):
            free_memory()
