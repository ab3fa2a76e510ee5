"""Generator and critic of the Wasserstein GAN with gradient penalty (Gulrajani et al.

2017), for 128 x 128.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

GRID, COARSEST = 128, 4
MULTIPLES = (1, 2, 4, 8, 8, 8)
"""Channels of the levels from 128 x 128 to 4 x 4, in widths: one level more than the original's 64
x 64."""


class SliceGenerator(nn.Module):
    """Latent vectors (n, latent) -> slices (n, channels, 128, 128)."""

    def __init__(self, channels: int, width: int, latent: int) -> None:
        super().__init__()
        widths = [width * multiple for multiple in reversed(MULTIPLES)]
        self.begin = nn.Linear(latent, widths[0] * COARSEST**2)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b, up=True) for a, b in pairwise(widths)))
        self.end = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1)
        )

    def forward(self, latent: Tensor) -> Tensor:
        """(n, latent) -> (n, channels, 128, 128)."""
        return self.end(self.blocks(self.begin(latent).unflatten(1, (-1, COARSEST, COARSEST))))


class Downward(nn.Module):
    """Slices (n, channels, 128, 128) -> (n, outputs): the critic (one output) and the encoder."""

    def __init__(self, channels: int, width: int, outputs: int) -> None:
        super().__init__()
        widths = [width * multiple for multiple in MULTIPLES]
        blocks = (ResidualBlock(a, b, up=False) for a, b in pairwise(widths))
        self.blocks = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), *blocks, nn.Flatten())
        self.end = nn.Linear(widths[-1] * COARSEST**2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, 128, 128) -> (n, outputs)."""
        return self.end(self.describe(x))

    def describe(self, x: Tensor) -> Tensor:
        """The features (n, f) that the outputs are made of."""
        return self.blocks(x)


class ResidualBlock(nn.Module):
    """Norm, ReLU, 3 x 3 convolution, twice, beside a shortcut.

    Twice as large a map (``up``) or half.
    """

    def __init__(self, channels_in: int, channels_out: int, *, up: bool) -> None:
        super().__init__()
        # A critic must not mix the slices of a batch (its penalty is one slice's), so it has layer
        # norm.
        self.norm1 = nn.BatchNorm2d(channels_in) if up else nn.GroupNorm(1, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels_out) if up else nn.GroupNorm(1, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1)
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) -> (n, out, 2 h, 2 w), or halves."""
        y = functional.relu(self.norm1(x))
        y = functional.interpolate(y, scale_factor=2) if self.up else y
        y = self.conv2(functional.relu(self.norm2(self.conv1(y))))
        if self.up:
            return functional.interpolate(self.shortcut(x), scale_factor=2) + y
        return self.shortcut(functional.avg_pool2d(x, 2)) + functional.avg_pool2d(y, 2)
