"""Random numbers of a batch that is divided: every part gets the rows that the whole batch would have had."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Generator, Tensor


class PartGenerator(Generator):
    """A generator for the rows from ``first`` of a batch of ``total``, seeded as that of the whole batch.

    A process draws for the whole batch and keeps its own rows: what is drawn for no row in particular (a shift) is
    then the same for all, and no process has to know of the others.
    """

    first: int
    total: int
    host: Generator | None
    """Draws what the processor has to know, where the rest is drawn on an accelerator: it does not wait for that."""

    def __new__(cls, device: torch.device, first: int, total: int) -> PartGenerator:  # noqa: D102
        generator = super().__new__(cls, device)  # type: ignore[call-arg]
        generator.first, generator.total = first, total
        generator.host = None if device.type == "cpu" else Generator()
        return generator

    def manual_seed(self, seed: int) -> PartGenerator:
        """Begin anew from ``seed``."""
        super().manual_seed(seed)
        if self.host is not None:
            self.host.manual_seed(seed)
        return self


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


def for_all(below: int, count: int, generator: Generator | None) -> list[int]:
    """So many whole numbers from 0 up to ``below`` - 1, the same for all slices of a batch."""
    source = generator.host or generator if isinstance(generator, PartGenerator) else generator
    return torch.randint(0, below, (count,), generator=source, device=_device(source)).tolist()


@lru_cache(maxsize=64)
def constants(values: Sequence[float] | Sequence[tuple[float, float]], device: torch.device) -> Tensor:
    """Numbers that stay on a device: while they are copied to an accelerator, the processor waits for all before."""
    return torch.tensor(values, device=device)


def _rows(shape: Sequence[int], generator: Generator | None) -> tuple[tuple[int, ...], slice]:
    if not isinstance(generator, PartGenerator):
        return tuple(shape), slice(None)
    return (generator.total, *shape[1:]), slice(generator.first, generator.first + shape[0])


def _device(generator: Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
