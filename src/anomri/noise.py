"""The coarse noise that the autoencoder learns to remove (Kascenas et al. 2022, section 3.1)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from anomri.draws import normal


def upsample_noise(low_resolution: Tensor, size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Noise of (n, c, r, r) enlarged bilinearly (corners aligned) to ``size`` and rolled by ``shift`` pixels."""
    noise = functional.interpolate(low_resolution, size=size, mode="bilinear", align_corners=True)
    return torch.roll(noise, shifts=shift, dims=(-2, -1))


def coarse_noise(
    shape: tuple[int, int, int, int], resolution: int, std: float, generator: Generator | None = None
) -> Tensor:
    """Draw N(0, std^2) at ``resolution`` x ``resolution``, independent per channel, enlarged to ``shape`` (n, c, h, w).

    The whole batch is rolled by one random shift, so that the coarse grid has no fixed place. Float32, on the
    generator's device.
    """
    n, c, h, w = shape
    low = std * normal((n, c, resolution, resolution), generator)
    rows, columns = torch.randint(0, 2**31, (2,), generator=generator, device=low.device).tolist()
    return upsample_noise(low, (h, w), (rows % h, columns % w))


def add_on_foreground(x: Tensor, noise: Tensor, foreground: Tensor) -> Tensor:
    """``x`` (n, c, h, w) with ``noise`` added where ``foreground`` (n, 1, h, w) is true."""
    return x + noise * foreground
