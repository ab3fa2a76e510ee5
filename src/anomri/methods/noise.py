"""The coarse noise that the autoencoder learns to remove (Kascenas et al. 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Generator, Tensor
from torch.nn import functional

from anomri.errors import AnomriError
from anomri.methods.anomalies import between, random_blobs
from anomri.methods.draws import for_all, normal, one_of, uniform
from anomri.methods.simplex import simplex_noise

Number = TypeVar("Number", int, float)


def upsample_noise(
    low_resolution: Tensor, size: tuple[int, int], shift: Sequence[int] | Tensor
) -> Tensor:
    """Noise of (n, c, r, r) enlarged bilinearly (corners aligned) to ``size`` and rolled by ``shift`` pixels."""
    noise = functional.interpolate(low_resolution, size=size, mode="bilinear", align_corners=True)
    # Not by torch.roll: where the shift lies on an accelerator, the processor would have to wait for it.
    rows, columns = (
        (torch.arange(side, device=noise.device) - by) % side
        for side, by in zip(size, shift, strict=True)
    )
    return noise[:, :, rows[:, None], columns]


def coarse_noise(
    shape: tuple[int, int, int, int],
    resolution: int,
    std: float,
    generator: Generator | None = None,
) -> Tensor:
    """Draw N(0, std^2) at ``resolution`` x ``resolution``, independent per channel, enlarged to ``shape`` (n, c, h, w).

    The whole batch is rolled by one random shift, so that the coarse grid has no fixed place. Float32, on the
    generator's device.
    """
    n, c, h, w = shape
    low = std * normal((n, c, resolution, resolution), generator)
    return upsample_noise(low, (h, w), for_all(2**31, 2, generator))


def add_on_foreground(x: Tensor, noise: Tensor, foreground: Tensor) -> Tensor:
    """``x`` (n, c, h, w) with ``noise`` added where ``foreground`` (n, 1, h, w) is true."""
    return x + noise * foreground


def _several(value: Number | Sequence[Number]) -> list[Number]:
    return [value] if isinstance(value, int | float) else list(value)


@dataclass(frozen=True)
class Noise:
    """What noise a training adds; the defaults are the paper's.

    Of several ``resolution`` a batch draws one, and between the least and the largest of several ``std`` every slice.
    ``kind`` is ``coarse`` or ``simplex`` (whose first octave is as wide as a pixel of the resolution). A ``share`` of the
    slices gets noise, and with ``in_blobs`` half of them only within a random blob.
    """

    resolution: int | Sequence[int] = 16
    std: float | Sequence[float] = 0.2
    kind: str = "coarse"
    share: float = 1.0
    in_blobs: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("coarse", "simplex"):
            raise AnomriError(f"the noise can be coarse or simplex, not {self.kind!r}.")
        for name, least in (("resolution", 1), ("std", 0)):
            given = getattr(self, name)
            values = _several(given)
            if not values or min(values) < least:
                raise AnomriError(
                    f"the noise's {name} is one number from {least} on, or several; found {given}."
                )

    def draw(
        self, x: Tensor, foreground: Tensor, generator: Generator, pixel: float = 1.0
    ) -> Tensor:
        """Noise for slices (n, c, h, w) with their foreground (n, h, w), of the shape of ``x``; for ``pixel`` see `anomalies`."""
        n, c, h, w = x.shape
        many = not isinstance(self.std, int | float)
        std = 1.0 if many else float(self.std)  # type: ignore[arg-type]

        def of(resolution: int) -> Tensor:
            if self.kind == "coarse":
                return coarse_noise((n, c, h, w), resolution, std, generator)
            return std * simplex_noise((n, c, h, w), w / resolution, generator=generator)

        noise = one_of(_several(self.resolution), of, generator)
        if many:
            noise = noise * between(min(self.std), max(self.std), (n, 1, 1, 1), generator)  # type: ignore[arg-type]
        if self.share < 1:
            noise = noise * (uniform((n, 1, 1, 1), generator) < self.share)
        if self.in_blobs:
            everywhere = uniform((n, 1, 1), generator) < 0.5
            noise = (
                noise
                * torch.where(everywhere, 1.0, random_blobs(foreground, generator, pixel))[:, None]
            )
        return noise
