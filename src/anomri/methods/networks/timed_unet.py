"""Encoder and decoder without skip connections, and a U-Net that knows the time step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomri.methods.networks.unet import ConvBlock, UNet


class Encoder(nn.Module):
    """The way down of the U-Net: (n, channels, h, w) -> (n, widths[-1], h / 2^k, w / 2^k).

    k = len(widths) - 1.
    """

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(*pair) for pair in pairwise([channels, *widths]))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> the coarsest map."""
        for level, block in enumerate(self.blocks):
            x = block(x if level == 0 else functional.avg_pool2d(x, 2))
        return x


class Decoder(nn.Module):
    """The way up of the U-Net without skip connections: back to (n, channels, h, w)."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = list(pairwise(reversed(widths)))
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, 2, stride=2) for coarse, fine in pairs
        )
        self.blocks = nn.ModuleList(ConvBlock(fine, fine) for _, fine in pairs)
        self.head = nn.Conv2d(widths[0], channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The coarsest map -> (n, channels, h, w)."""
        for upsample, block in zip(self.upsample, self.blocks, strict=True):
            x = block(upsample(x))
        return self.head(x)


class TimedUNet(UNet):
    """The U-Net with features scaled and shifted by the embedding of a time (Ho et al. 2020)."""

    frequencies: Tensor

    def __init__(self, channels: int, widths: Sequence[int], embedding: int = 128) -> None:
        super().__init__(channels, widths)
        half = embedding // 2
        self.register_buffer(
            "frequencies",
            torch.exp(-math.log(10_000) * torch.arange(half) / half),
            persistent=False,
        )
        self.embed = nn.Sequential(
            nn.Linear(2 * half, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.modulate_down = nn.ModuleList(nn.Linear(embedding, 2 * width) for width in widths)
        self.modulate_up = nn.ModuleList(nn.Linear(embedding, 2 * width) for width in widths[:-1])

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """(n, channels, h, w) at ``time`` (n,), in steps, -> the same shape.

        Without a time, at 0.
        """
        time = x.new_zeros(len(x)) if time is None else time
        angles = time[:, None].float() * self.frequencies
        embedded = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else functional.avg_pool2d(x, 2))
            x = _modulated(x, self.modulate_down[level](embedded))
            skips.append(x)
        skips.pop()
        for level in reversed(range(len(self.decoder))):
            x = self.decoder[level](torch.cat([self.upsample[level](x), skips[level]], dim=1))
            x = _modulated(x, self.modulate_up[level](embedded))
        return self.head(x)


def _modulated(x: Tensor, modulation: Tensor) -> Tensor:
    scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
    return x * (1 + scale) + shift
