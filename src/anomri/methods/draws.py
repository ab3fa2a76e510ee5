"""Random numbers for a batch that several processes divide.

Each part gets the rows that the whole batch would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Generator, Tensor

Option = TypeVar("Option")


class PartGenerator(Generator):
    """A generator for the rows from ``first`` of a batch of ``total``.

    Its seed is that of the whole batch. A process draws for the whole batch and keeps its own rows.
    What is drawn once for a batch, such as a shift, is then the same for all processes, and none
    has to know of the others.
    """

    first: int
    total: int

    def __new__(cls, device: torch.device, first: int, total: int) -> PartGenerator:  # noqa: D102
        generator = super().__new__(cls, device)  # type: ignore[call-arg]
        generator.first, generator.total = first, total
        return generator


def normal(shape: Sequence[int], generator: Generator | None) -> Tensor:
    """N(0, 1) of ``shape`` (n, ...), a row for each slice; float32, on the generator's device."""
    drawn = torch.randn(
        _whole_batch(shape, generator), generator=generator, device=_device(generator)
    )
    return _own_rows(drawn, shape, generator)


def uniform(shape: Sequence[int], generator: Generator | None) -> Tensor:
    """U(0, 1) of ``shape`` (n, ...), a row for each slice; float32, on the generator's device."""
    drawn = torch.rand(
        _whole_batch(shape, generator), generator=generator, device=_device(generator)
    )
    return _own_rows(drawn, shape, generator)


def integers(low: int, high: int, shape: Sequence[int], generator: Generator | None) -> Tensor:
    """Whole numbers from ``low`` to ``high`` - 1 of ``shape`` (n, ...), a row for each slice.

    Int64.
    """
    drawn = torch.randint(
        low, high, _whole_batch(shape, generator), generator=generator, device=_device(generator)
    )
    return _own_rows(drawn, shape, generator)


def between(low: float, high: float, shape: Sequence[int], generator: Generator | None) -> Tensor:
    """U(low, high) of ``shape`` (n, ...), a row for each slice."""
    return low + (high - low) * uniform(shape, generator)


def log_between(
    low: float, high: float, shape: Sequence[int], generator: Generator | None
) -> Tensor:
    """Numbers from ``low`` to ``high`` of ``shape`` (n, ...), every octave as likely.

    There is a row for each slice.
    """
    return between(math.log(low), math.log(high), shape, generator).exp()


def for_all(below: int, count: int, generator: Generator | None) -> Tensor:
    """``count`` whole numbers from 0 to ``below`` - 1, the same for all slices of a batch.

    Int64.
    """
    return torch.randint(0, below, (count,), generator=generator, device=_device(generator))


def one_of(
    options: Sequence[Option], make: Callable[[Option], Tensor], generator: Generator | None
) -> Tensor:
    """``make(option)`` of one of the options, drawn for the whole batch.

    On a GPU all different options are made and one is taken: to know which one, the processor would
    have to wait.
    """
    if len(options) == 1:
        return make(options[0])
    drawn = for_all(len(options), 1, generator)
    if drawn.device.type == "cpu":
        return make(options[int(drawn)])
    different = list(dict.fromkeys(options))
    numbers = tuple(different.index(option) for option in options)
    number = constants(numbers, drawn.device, torch.int64)[drawn]
    return torch.stack([make(option) for option in different]).index_select(0, number)[0]


@lru_cache(maxsize=64)
def constants(
    values: Sequence[float] | Sequence[tuple[float, float]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A tensor of constants, kept on its device.

    To copy it to a GPU again, the processor would have to wait.
    """
    return torch.tensor(values, device=device, dtype=dtype)


def _whole_batch(shape: Sequence[int], generator: Generator | None) -> tuple[int, ...]:
    if isinstance(generator, PartGenerator):
        return (generator.total, *shape[1:])
    return tuple(shape)


def _own_rows(drawn: Tensor, shape: Sequence[int], generator: Generator | None) -> Tensor:
    if isinstance(generator, PartGenerator):
        return drawn[generator.first : generator.first + shape[0]]
    return drawn


def _device(generator: Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
