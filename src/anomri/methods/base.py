"""What every method offers: `Method`, its presets, the objectives of its training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Generator, Tensor, nn

from anomri.scoring.scores import mean_absolute_residual
from anomri.slices import Box
from anomri.spec import Grid, Scaling, Score, Training


@dataclass(frozen=True)
class Preset:
    """A named choice of a method's settings, training, scaling, score and grid."""

    settings: dict[str, Any] = field(default_factory=dict)
    training: Training | None = None
    """``None``: there is nothing to train."""
    scaling: Scaling = field(default_factory=Scaling)
    score: Score = field(default_factory=Score)
    """The kind ``auto`` is chosen on held-out healthy slices at the end of the training."""
    grid: Grid = field(default_factory=Grid)
    weights_of: str | None = None
    """A method whose preset of the same name has the same weights: a comparison trains them
    once."""


LAPTOP = Training(
    steps=1600,
    learning_rate=1e-3,
    schedule="cosine",
    precision="auto",
    crop_to_brain=True,
    validate_every=100,
    validation_slices=128,
)
"""A training of some minutes on two cores; the presets ``small`` and ``demo`` start from it."""


def always(step: int, steps: int) -> bool:
    """Take part in every step."""
    return True


@dataclass(frozen=True)
class Objective:
    """One loss of a training, with its own optimiser: most methods have one, a GAN has several.

    ``module`` holds the parameters that it trains. ``rate`` multiplies the learning rate of the
    training; ``betas`` are those of Adam. ``active(step, steps)`` says whether it takes part in a
    step, counted from 0, of ``steps``. Its loss is ``method(x, foreground, generator, box,
    objective=name)``, without ``objective`` if it has no name.
    """

    module: nn.Module
    name: str = ""
    rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    active: Callable[[int, int], bool] = always

    @property
    def arguments(self) -> dict[str, str]:
        """Keyword arguments of its loss, beside the batch."""
        return {"objective": self.name} if self.name else {}


class Method(nn.Module, ABC):
    """A way to find anomalies, learnt from healthy slices.

    It reconstructs any slice as if it were healthy. A subclass is built from (channels, settings)
    and has at least `PRESETS`, `forward` and `reconstruct`. The attributes below describe it to the
    rest of the package; a class or an instance sets those that differ.

    Tensors are slices (n, c, h, w) float32 on the working grid, and foregrounds (n, h, w) bool. A
    ``box`` (first row, last + 1, first column, last + 1) holds all of the foreground; nothing
    outside has to be computed.

    A subclass can also be built on torch's ``meta`` device, without values, and keeps most of its
    parameters and buffers in its state: the size of a model from elsewhere is known before any
    memory is taken. Settings are numbers of at most a million, texts and short lists.
    """

    PRESETS: ClassVar[dict[str, Preset]]
    """At least ``paper`` (as published) and ``small`` (for a laptop)."""
    passes: int = 1
    """What `reconstruct` costs a slice, in forward passes of the network."""
    side_multiple: int = 1
    """The sides of a slice and of a box are multiples of this."""
    fixed_size: bool = False
    """Whether it takes slices of `side_multiple` x `side_multiple` only."""
    takes_subsets: bool = False
    """Whether a scan may lack some of the channels; they are zero then."""
    segmentation_head: bool = False
    """Whether the anomaly probability follows the channels of a reconstruction."""
    half_precision: bool = False
    """Whether `reconstruct` may be computed in bfloat16."""
    exportable: bool = False
    """Whether `reconstruct` is one forward pass of a network, which ONNX can express; `residual` is
    then as here."""
    capturable: bool = False
    """Whether its loss may be captured in a CUDA graph: always the same kernels, and it never waits
    for the GPU."""
    finest_width: int | None = None
    """Feature channels at full resolution, for batches that fit a processor's cache; ``None`` if
    the reconstruction of a slice depends on those beside it in a batch."""

    @abstractmethod
    def forward(
        self, x: Tensor, foreground: Tensor, generator: Generator, box: Box | None = None
    ) -> Tensor:
        """Training loss of a batch, a scalar; random numbers come from ``generator``.

        Never called without training.
        """

    @abstractmethod
    def reconstruct(self, x: Tensor, box: Box | None = None) -> Tensor:
        """The healthy version of ``x``, of the same shape.

        With a segmentation head, the anomaly probability follows.
        """

    def residual(self, x: Tensor, reconstruction: Tensor, foreground: Tensor) -> Tensor:
        """How anomalous each pixel is, (n, h, w) >= 0, before any filter.

        ``x`` holds all slices of one scan. By default the mean over the channels of the absolute
        residual.
        """
        return mean_absolute_residual(x, reconstruction)

    def objectives(self) -> Sequence[Objective]:
        """The losses of its training; by default one, which trains everything."""
        return [Objective(self)]
