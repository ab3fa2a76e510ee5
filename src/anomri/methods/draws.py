"""Random numbers of a batch that is divided: every part gets the rows that the whole batch would have had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Generator, Tensor

Option = TypeVar("Option")


class PartGenerator(Generator):
    """A generator for the rows from ``first`` of a batch of ``total``, seeded as that of the whole batch.

    A process draws for the whole batch and keeps its own rows: what is drawn for no row in particular (a shift) is
    then the same for all, and no process has to know of the others.
    """

    first: int
    total: int

    def __new__(cls, device: torch.device, first: int, total: int) -> PartGenerator:  # noqa: D102
        generator = super().__new__(cls, device)  # type: ignore[call-arg]
        generator.first, generator.total = first, total
        return generator


def normal(shape: Sequence[int], generator: Generator | None) -> Tensor:
    """N(0, 1) of ``shape`` (n, ...), a row for each slice; float32, on the generator's device."""
    rows, place = _rows(shape, generator)
    return torch.randn(rows, generator=generator, device=_device(generator))[place]


def uniform(shape: Sequence[int], generator: Generator | None) -> Tensor:
    """U(0, 1) of ``shape`` (n, ...), a row for each slice; float32, on the generator's device."""
    rows, place = _rows(shape, generator)
    return torch.rand(rows, generator=generator, device=_device(generator))[place]


def integers(low: int, high: int, shape: Sequence[int], generator: Generator | None) -> Tensor:
    """Whole numbers from ``low`` up to ``high`` - 1 of ``shape`` (n, ...), a row for each slice; int64."""
    rows, place = _rows(shape, generator)
    return torch.randint(low, high, rows, generator=generator, device=_device(generator))[place]


def for_all(below: int, count: int, generator: Generator | None) -> Tensor:
    """So many whole numbers from 0 up to ``below`` - 1, the same for all slices of a batch; int64."""
    return torch.randint(0, below, (count,), generator=generator, device=_device(generator))


def one_of(
    options: Sequence[Option], make: Callable[[Option], Tensor], generator: Generator | None
) -> Tensor:
    """What ``make`` makes of one of the options, drawn for the whole batch.

    An accelerator makes something of each and takes one: a processor that has to know which would wait for it.
    """
    if len(options) == 1:
        return make(options[0])
    drawn, kinds = for_all(len(options), 1, generator), list(dict.fromkeys(options))
    if drawn.device.type == "cpu":
        return make(options[int(drawn)])
    kind = constants(tuple(kinds.index(option) for option in options), drawn.device, torch.int64)[
        drawn
    ]
    return torch.stack([make(option) for option in kinds]).index_select(0, kind)[0]


@lru_cache(maxsize=64)
def constants(
    values: Sequence[float] | Sequence[tuple[float, float]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Numbers that stay on a device: a processor that copies them to an accelerator waits for all that it does before."""
    return torch.tensor(values, device=device, dtype=dtype)


def _rows(shape: Sequence[int], generator: Generator | None) -> tuple[tuple[int, ...], slice]:
    if not isinstance(generator, PartGenerator):
        return tuple(shape), slice(None)
    return (generator.total, *shape[1:]), slice(generator.first, generator.first + shape[0])


def _device(generator: Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
