"""The methods, one file each, and the little that each must offer.

A new method here is a file with a class that fits `Method`, and a line in `_METHODS`; one of another package is known by
an entry point of the group ``anomri.methods``, or by `register`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Protocol, get_type_hints, runtime_checkable

from torch import Generator, Tensor, nn

from anomri.errors import AnomriError
from anomri.spec import Grid, ModelSpec, Scaling, Score, Training

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Preset:
    """A named choice of a method's settings, its training (``None``: nothing to train), scaling, score and grid."""

    settings: dict[str, Any] = field(default_factory=dict)
    training: Training | None = None
    scaling: Scaling = field(default_factory=Scaling)
    score: Score = field(default_factory=Score)
    """The kind ``auto``: chosen on held-out healthy slices when the training ends."""
    grid: Grid = field(default_factory=Grid)
    weights_of: str | None = None
    """A method whose weights, from its preset of the same name, serve this one too: a comparison trains once."""


@dataclass(frozen=True)
class Objective:
    """One side of a training in which several networks take turns, each with a loss and an optimiser of its own.

    ``module`` holds what it moves; ``rate`` multiplies the training's learning rate; ``betas`` are Adam's;
    ``active(step, steps)`` says whether it has a turn at a step (from 0) of so many. Its loss is
    ``method(x, foreground, generator, box, objective=name)``, or the method's plain loss if it has no name.
    """

    module: nn.Module
    name: str = ""
    rate: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    active: Callable[[int, int], bool] = lambda step, steps: True

    @property
    def arguments(self) -> dict[str, str]:
        """What its loss is called with beside the batch."""
        return {"objective": self.name} if self.name else {}


LAPTOP = Training(
    steps=1600,
    learning_rate=1e-3,
    schedule="cosine",
    precision="auto",
    crop_to_brain=True,
    validate_every=100,
    validation_slices=128,
)
"""A training of some minutes on two cores, from which the presets ``small`` and ``demo`` start."""

_METHODS = {
    "ae": "anomri.methods.ae:AE",
    "dae": "anomri.methods.dae:DAE",
    "diffusion": "anomri.methods.diffusion:Diffusion",
    "fanogan": "anomri.methods.fanogan:FAnoGAN",
    "thresholding": "anomri.methods.thresholding:Thresholding",
    "vae": "anomri.methods.vae:VAE",
    "vae-restoration": "anomri.methods.vae:VAERestoration",
}


@runtime_checkable
class Method(Protocol):
    """What a method offers: an ``nn.Module`` built from (channels, settings) with these three calls.

    Tensors are (n, c, h, w) float32 slices on the working grid and (n, h, w) bool foregrounds. ``box``
    (first row, last + 1, first column, last + 1) holds all of the foreground: nothing outside needs computing.
    A method whose networks train against each other also has ``objectives() -> list[Objective]``; one that takes scans
    without some channels, ``takes_subsets``; one that can reconstruct from noise, ``with_noise``; one whose
    ``reconstruct`` bears rounding to bfloat16, ``half_precision``; one whose loss is always the same kernels on arrays
    of the same shape and never waits for them, ``capturable``; one whose slices do not change with those beside them,
    ``values_per_pixel``, how many values its finest maps have for each pixel; one for slices of ``box_multiple`` x
    ``box_multiple`` and no others, ``whole_grid``.

    It can also be built on torch's ``meta`` device, without values, and most of its parameters and buffers are in its state:
    so a stranger's model is measured before it is built. Settings are numbers of at most a million, texts, and short lists.
    """

    PRESETS: ClassVar[dict[str, Preset]]
    """At least ``paper`` (as published) and ``small`` (a laptop's); without training, `forward` is never called."""
    box_multiple: int
    """What the sides of a box must be divisible by."""

    def forward(
        self, x: Tensor, foreground: Tensor, generator: Generator, box: Box | None = None
    ) -> Tensor:
        """Training loss of a batch, a scalar; what is random comes from ``generator``."""

    def reconstruct(self, x: Tensor, box: Box | None = None) -> Tensor:
        """What the method takes for the healthy version of ``x``, of the same shape; further maps may follow its channels."""

    def raw_score(self, x: Tensor, reconstruction: Tensor, foreground: Tensor) -> Tensor:
        """How anomalous each pixel is before erosion and median, (n, h, w), from 0 up; ``x`` is all slices of one scan."""


def names() -> list[str]:
    """Names of all methods."""
    return sorted(_places())


def register(name: str, place: str) -> None:
    """Make a class known as the method ``name`` in this process; ``place`` is ``module:Class``, and it fits `Method`.

    For the command line, a package names it as an entry point of the group ``anomri.methods`` instead. Raises
    `AnomriError` if there is another method of that name.
    """
    if _places().setdefault(name, place) != place:
        raise AnomriError(f"there is a method {name!r} already; call it otherwise.")
    _METHODS[name] = place


def preset(method: str, name: str) -> Preset:
    """The preset ``name`` of a method; raises `AnomriError` that lists what there is."""
    presets: dict[str, Preset] = _class(method).PRESETS
    if name not in presets:
        raise AnomriError(f"{method} has no preset {name!r}; it has {', '.join(presets)}.")
    return presets[name]


def build(spec: ModelSpec) -> Any:
    """The method that ``spec`` describes, with weights not yet trained; raises `AnomriError` if there is none."""
    method = _class(spec.method)
    parameters = inspect.signature(method).parameters
    known = list(parameters)[1:]  # channels come first
    unknown = [name for name in spec.settings if name not in known]
    if unknown and not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        raise AnomriError(
            f"{spec.method} has no setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}."
        )
    _check_types(spec, method)
    try:
        return method(spec.channels, **spec.settings)
    except (TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        raise AnomriError(
            f"the settings {spec.settings} do not fit the method {spec.method}: {error}"
        ) from error


def _check_types(spec: ModelSpec, method: Any) -> None:
    """Raise `AnomriError` for a setting that is not of the type it is declared with: any text would be true."""
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    try:
        hints = get_type_hints(method.__init__)
    except (
        NameError,
        TypeError,
        AttributeError,
    ):  # a method of others may declare what only its checker knows
        return
    for name, value in spec.settings.items():
        try:
            # As model.json holds it, where a tuple is a list.
            TypeAdapter(hints.get(name, Any)).validate_json(json.dumps(value), strict=True)
        except (PydanticUserError, TypeError):
            continue
        except ValidationError as error:
            what = error.errors()[0]["msg"][:1].lower() + error.errors()[0]["msg"][1:]
            raise AnomriError(
                f"the setting {name} of {spec.method}: {what}; found {value!r:.80}."
            ) from error


def objectives(method: Any) -> Sequence[Objective]:
    """Who takes turns in the training of a method: one objective that moves everything, unless it names several."""
    return method.objectives() if hasattr(method, "objectives") else [Objective(method)]


def _class(method: str) -> Any:
    # What other packages offer takes a look at all that are installed.
    place = _METHODS.get(method) or _places().get(method)
    if place is None:
        raise AnomriError(f"there is no method {method!r}; the methods are {', '.join(names())}.")
    try:
        return EntryPoint(method, place, "anomri.methods").load()
    except (ImportError, AttributeError, ValueError) as error:
        raise AnomriError(
            f"the method {method!r} cannot be loaded from {place!r} ({error})."
        ) from error


def _places() -> dict[str, str]:
    """Where the class of each method is: of this package's, those of others, which cannot replace one of its."""
    return {one.name: one.value for one in entry_points(group="anomri.methods")} | _METHODS
