"""A diffusion model that noises a slice part of the way and denoises it back (AnoDDPM.

Wyatt et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from anomri.errors import AnomriError
from anomri.methods.base import LAPTOP, Method, Preset
from anomri.methods.draws import integers, normal
from anomri.methods.networks.timed_unet import TimedUNet
from anomri.methods.noise import coarse_noise
from anomri.methods.simplex import simplex_noise
from anomri.slices import Box, cut_box, paste_box
from anomri.spec import Training

SMALL = replace(LAPTOP, steps=1200)
TEST_SEED = 2022


class Diffusion(Method):
    """The U-Net, told the time, learns the noise in a slice noised to a random step of ``steps``.

    A slice is noised to step ``start`` (a quarter of the way, as AnoDDPM) and denoised back in
    ``strides`` jumps that are even in time; ``start`` of them is step by step. ``eta`` is the share
    of fresh noise at each jump (Song et al. 2021): 1 is Ho et al.'s ancestral sampling, 0 none.
    ``noise`` is ``gaussian`` (Ho et al. 2020), ``simplex`` (AnoDDPM) or ``coarse`` (Kascenas et al.
    2022), all of variance near 1; ``schedule`` ``linear`` (Ho et al.) or ``cosine`` (Nichol and
    Dhariwal 2021). ``paper`` is this package's network with AnoDDPM's scheme; ``small`` takes 10
    jumps, which a processor has time for. What is drawn at test is the same in every call.
    """

    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset(
            {"widths": [64, 128, 256, 512], "strides": 250, "eta": 1.0},
            Training(schedule="cosine", weight_decay=0.0),
        ),
        "small": Preset({"widths": [16, 32, 64, 128]}, SMALL),
        "demo": Preset(
            {"widths": [16, 32, 64, 128], "strides": 5},
            replace(SMALL, steps=300, learning_rate=2e-3),
        ),
    }
    signal: Tensor

    def __init__(
        self,
        channels: Sequence[str],
        widths: Sequence[int] = (64, 128, 256, 512),
        noise: Literal["gaussian", "simplex", "coarse"] = "simplex",
        schedule: Literal["linear", "cosine"] = "linear",
        steps: int = 1000,
        start: int = 250,
        strides: int = 10,
        eta: float = 0.0,
    ) -> None:
        super().__init__()
        if noise not in ("gaussian", "simplex", "coarse"):
            raise AnomriError(
                f"diffusion knows no noise {noise!r}; it has gaussian, simplex and coarse."
            )
        if not 0 <= start <= steps or strides < 1:
            raise AnomriError(
                f"diffusion can start at steps 0 to {steps} and needs a stride, not {start} and "
                f"{strides}."
            )
        self.network = TimedUNet(len(channels), widths)
        self.side_multiple = 2 ** (len(widths) - 1)
        self.noise, self.eta = noise, eta
        self.register_buffer("signal", signal_share(steps, schedule), persistent=False)
        jumps = max(min(strides, start), 1)
        self.times = (
            [round(start * (1 - jump / jumps)) for jump in range(jumps + 1)] if start else [0]
        )
        self.passes = max(len(self.times) - 1, 1)

    def forward(
        self, x: Tensor, foreground: Tensor, generator: Generator, box: Box | None = None
    ) -> Tensor:
        """Mean squared error, over all pixels, of the noise predicted at a random step."""
        x = to_unit_range(cut_box(x, box))
        time = integers(1, len(self.signal), (len(x),), generator)
        noise = self.draw(x, generator)
        share = self.signal[time][:, None, None, None]
        return (
            (self.network(share.sqrt() * x + (1 - share).sqrt() * noise, time) - noise)
            .square()
            .mean()
        )

    def reconstruct(self, x: Tensor, box: Box | None = None) -> Tensor:
        """``x`` noised to the start and denoised back; zero outside ``box``.

        All slices get the same noise, so that none depends on those beside it.
        """
        generator = Generator(x.device).manual_seed(TEST_SEED)
        part = to_unit_range(cut_box(x, box))
        share = self.signal[self.times[0]]
        part = share.sqrt() * part + (1 - share).sqrt() * self.draw(part[:1], generator)
        for now, then in zip(self.times, self.times[1:], strict=False):
            part = self.denoise(part, now, then, generator)
        return paste_box(from_unit_range(part), (x.shape[-2], x.shape[-1]), box)

    def denoise(self, x: Tensor, now: int, then: int, generator: Generator) -> Tensor:
        """Noisy slices of step ``now`` as they are at the earlier step ``then`` (Song et al.

        2021, equation 12).
        """
        noise = self.network(x, torch.full((len(x),), now, device=x.device)).float()
        share, earlier = self.signal[now], self.signal[then]
        clean = (x - (1 - share).sqrt() * noise) / share.sqrt()
        fresh = self.eta * ((1 - earlier) / (1 - share) * (1 - share / earlier)).sqrt()
        x = earlier.sqrt() * clean + (1 - earlier - fresh.square()).clamp(min=0).sqrt() * noise
        return x + fresh * self.draw(x[:1], generator) if self.eta else x

    def draw(self, x: Tensor, generator: Generator) -> Tensor:
        """Noise of the model's kind, of the shape of ``x``."""
        n, c, h, w = x.shape
        if self.noise == "gaussian":
            return normal(x.shape, generator)
        if self.noise == "simplex":
            return simplex_noise((n, c, h, w), generator=generator)
        # Enlarged, four ninths of the variance are left on average.
        return coarse_noise((n, c, h, w), 16, 1.5, generator)


def signal_share(steps: int, schedule: str) -> Tensor:
    """The share of a slice's variance that is left at steps 0 (all) to ``steps``.

    These are the cumulative alphas, (steps + 1,).
    """
    if schedule == "linear":  # Ho et al. 2020: 1e-4 to 0.02 over 1,000 steps
        beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    elif schedule == "cosine":  # Nichol and Dhariwal 2021, equation 17
        phase = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008
        level = (phase * math.pi / 2).cos().square()
        beta = 1 - level[1:] / level[:-1]
    else:
        raise AnomriError(f"diffusion knows no schedule {schedule!r}; it has linear and cosine.")
    share = (1 - beta.clamp(max=0.999)).cumprod(dim=0).float()
    return torch.cat([torch.ones(1), share])


def to_unit_range(x: Tensor) -> Tensor:
    """Slices, mostly within 0 and 1, to mostly within -1 and 1.

    Noise of variance 1 drowns them there.
    """
    return 2 * x - 1


def from_unit_range(x: Tensor) -> Tensor:
    """The inverse of `to_unit_range`."""
    return (x + 1) / 2
