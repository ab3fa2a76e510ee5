"""The coarse noise that the autoencoder learns to remove (Kascenas et al. 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Generator, Tensor
from torch.nn import functional

from anomri.errors import AnomriError
from anomri.methods.draws import between, for_all, normal, one_of, uniform

Number = TypeVar("Number", int, float)


def upsample_noise(
    low_resolution: Tensor, size: tuple[int, int], shift: Sequence[int] | Tensor
) -> Tensor:
    """Enlarge noise (n, c, r, r) bilinearly to ``size``, and roll it by ``shift`` pixels.

    Corners are aligned.
    """
    noise = functional.interpolate(low_resolution, size=size, mode="bilinear", align_corners=True)
    # Not torch.roll: if the shift is on a GPU, the processor would have to wait for it.
    h, w = size
    rows = (torch.arange(h, device=noise.device) - shift[0]) % h
    columns = (torch.arange(w, device=noise.device) - shift[1]) % w
    return noise[:, :, rows[:, None], columns]


def coarse_noise(
    shape: Sequence[int], resolution: int, std: float, generator: Generator | None = None
) -> Tensor:
    """Draw N(0, std^2) at ``resolution`` x ``resolution``, enlarged to ``shape`` (n, c, h, w).

    Channels are independent. The whole batch is rolled by one random shift, so that the coarse grid
    has no fixed place. Float32, on the generator's device.
    """
    n, c, h, w = shape
    low_resolution = std * normal((n, c, resolution, resolution), generator)
    return upsample_noise(low_resolution, (h, w), for_all(2**31, 2, generator))


def add_on_foreground(x: Tensor, noise: Tensor, foreground: Tensor) -> Tensor:
    """``x`` (n, c, h, w) with ``noise`` added where ``foreground`` (n, 1, h, w) is true."""
    return x + noise * foreground


def smooth_field(shape: Sequence[int], resolution: int, generator: Generator) -> Tensor:
    """N(0, 1) at ``resolution`` x ``resolution``, enlarged smoothly to ``shape`` (n, c, h, w)."""
    n, c, h, w = shape
    low_resolution = normal((n, c, resolution, resolution), generator)
    return functional.interpolate(low_resolution, size=(h, w), mode="bicubic", align_corners=False)


@dataclass(frozen=True)
class Noise:
    """The noise of a training; the defaults are the paper's.

    With several ``resolution`` a batch draws one of them; with several ``std`` every slice draws
    one between the smallest and the largest. A ``share`` of the slices gets noise.
    """

    resolution: int | Sequence[int] = 16
    std: float | Sequence[float] = 0.2
    share: float = 1.0

    def __post_init__(self) -> None:
        self._check("resolution", self.resolution, 1)
        self._check("std", self.std, 0)

    @staticmethod
    def _check(name: str, given: float | Sequence[float], least: int) -> None:
        values = _as_list(given)
        if not values or min(values) < least:
            raise AnomriError(
                f"the noise's {name} is one number from {least} on, or several; found {given}."
            )

    def draw(self, shape: Sequence[int], generator: Generator) -> Tensor:
        """Noise of ``shape`` (n, c, h, w)."""
        one_std = isinstance(self.std, int | float)
        std = _as_list(self.std)

        def at_resolution(resolution: int) -> Tensor:
            return coarse_noise(shape, resolution, float(std[0]) if one_std else 1.0, generator)

        noise = one_of(_as_list(self.resolution), at_resolution, generator)
        each = (shape[0], 1, 1, 1)
        if not one_std:
            noise = noise * between(min(std), max(std), each, generator)
        if self.share < 1:
            noise = noise * (uniform(each, generator) < self.share)
        return noise


def _as_list(value: Number | Sequence[Number]) -> list[Number]:
    return [value] if isinstance(value, int | float) else list(value)
