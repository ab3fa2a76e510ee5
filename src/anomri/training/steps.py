"""A step of a training: gradient, clipping, optimiser; on a GPU recorded once and launched as a whole from then on."""

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
"""Share of a GPU's memory that a recorded step has to leave: what it works in serves nothing else."""
WARM_UP = 5
"""Steps before one is recorded, in which libraries choose their kernels and networks are compiled."""


def optimizer_of(
    objective: Objective, training: Training, device: torch.device
) -> torch.optim.Optimizer:
    """The training's Adam for what a objective moves."""
    gpu = device.type == "cuda"
    return torch.optim.Adam(
        objective.module.parameters(),
        # A recorded step reads its rate from the GPU.
        torch.tensor(training.learning_rate, device=device) if gpu else training.learning_rate,
        objective.betas,
        weight_decay=training.weight_decay,
        amsgrad=training.amsgrad,
        fused=gpu or None,
        capturable=gpu,
    )


def load_optimizer(optimizer: Any, saved: dict[str, Any]) -> None:
    """Give an optimiser the state of another, which may have been on another kind of device."""
    here = [
        {name: group[name] for name in ("lr", "fused", "capturable")}
        for group in optimizer.param_groups
    ]
    groups = [{**group, **mine} for group, mine in zip(saved["param_groups"], here, strict=True)]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                # Laid out in memory like the parameter: the other device may have had another layout.
                state[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


@dataclass
class Step:
    """What a objective does with a batch; calling it returns the loss.

    Launching the kernels of a step one by one takes a processor longer than a GPU needs to run them. Where the model's
    method is ``capturable``, one process has the whole batch, and memory suffices, they are recorded into a CUDA graph.
    """

    fabric: Fabric
    batches: Batches
    model: Any
    optimizer: Any
    loss_of: Loss
    clip: float
    calls: int = 0
    capturable: bool = field(init=False)
    graph: torch.cuda.CUDAGraph | None = field(default=None, repr=False)
    part: Part | None = field(default=None, repr=False)
    """Where the recorded step finds its slices and its random numbers."""
    loss: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        one_gpu = self.fabric.device.type == "cuda" and self.batches.processes.world_size == 1
        self.capturable = one_gpu and self.model.capturable

    def __call__(self, batch: Batch, rate: float) -> Tensor:
        """Move the objective's parameters at a learning rate."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.calls += 1
        if (
            self.capturable
            and self.graph is None
            and self.calls > WARM_UP
            and len(batch.parts) == 1
        ):
            self._record(batch.parts[0])
        if self.graph is None or self.part is None or self.loss is None:
            loss = self.batches.gradient(self.model, self.optimizer, batch, self.loss_of)
            self._move()
            return loss
        self.part.x.copy_(batch.parts[0].x)
        self.part.generator.manual_seed(batch.seed)
        self.graph.replay()
        return self.loss.clone()

    def _move(self) -> None:
        self.fabric.clip_gradients(
            self.model, self.optimizer, max_norm=self.clip, error_if_nonfinite=False
        )
        self.optimizer.step()

    def _record(self, part: Part) -> None:
        # Of the very type that a graph takes; a process with the whole batch draws the same from either.
        graph, part = (
            torch.cuda.CUDAGraph(),
            replace(part, generator=torch.Generator(self.fabric.device)),
        )
        graph.register_generator_state(part.generator)
        stream, problem = torch.cuda.current_stream(), ""
        # Gradients are to lie in the graph's own memory.
        self.optimizer.zero_grad()
        try:
            with torch.cuda.graph(graph):
                loss = self.batches.sum(self.model, [part], self.loss_of)
                self._move()
            free, total = torch.cuda.mem_get_info()
            if free < SPARE * total:
                problem = "beside a recorded one, memory would not hold a validation"
        except RuntimeError as error:
            problem = f"{first_line(error):.200}"
        if not problem:
            self.graph, self.part, self.loss = graph, part, loss
            return
        self.batches.tell(f"steps are launched kernel by kernel, not recorded: {problem}.")
        self.capturable = False
        # A recording that broke off may have left its stream in use, and the allocator in doubt.
        torch.cuda.set_stream(stream)
        self.optimizer.zero_grad()
        del graph
        with suppress(RuntimeError):
            free_memory()
