"""The coarse-noise denoising autoencoder (Kascenas, Pugeault, O'Neil, MIDL 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from anomri.draws import uniform
from anomri.methods import LAPTOP, Box, Preset
from anomri.networks import UNet
from anomri.noise import add_on_foreground, coarse_noise
from anomri.residual import mean_absolute_residual
from anomri.slices import cut_box, paste_box
from anomri.spec import Training


class DAE(nn.Module):
    """A U-Net that learns to remove coarse noise from healthy slices, and then removes lesions.

    ``widths`` are the network's channels per level; the noise is N(0, ``noise_std``^2) drawn at
    ``noise_resolution`` x ``noise_resolution`` for what the network sees: the whole grid, or the box of the brain
    if training is cropped to it. No noise is added at test.

    Not in the paper, and off unless asked for: ``flip`` mirrors half of the training slices left to right, and
    ``gain_jitter`` g multiplies each channel of a slice by a factor from U(1 - g, 1 + g), target included. With few
    patients the network otherwise takes an unseen patient's overall brightness for noise.
    """

    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset({"widths": [64, 128, 256, 512]}, Training()),
        "demo": Preset(
            {"widths": [16, 32, 64, 128]},
            replace(LAPTOP, steps=400, learning_rate=2e-3, validation_slices=64),
        ),
        "small": Preset(
            {"widths": [16, 32, 64, 128], "flip": True, "gain_jitter": 0.4}, replace(LAPTOP, validate_every=200)
        ),
    }

    def __init__(
        self,
        channels: Sequence[str],
        widths: Sequence[int] = (64, 128, 256, 512),
        noise_resolution: int = 16,
        noise_std: float = 0.2,
        flip: bool = False,
        gain_jitter: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = UNet(len(channels), widths)
        self.box_multiple = 2 ** (len(widths) - 1)
        self.noise_resolution = noise_resolution
        self.noise_std = noise_std
        self.flip = flip
        self.gain_jitter = gain_jitter

    def forward(self, x: Tensor, foreground: Tensor, generator: Generator, box: Box | None = None) -> Tensor:
        """Squared error on the foreground, then the mean over all pixels."""
        x, foreground = cut_box(x, box), cut_box(foreground, box)
        if self.training:
            x, foreground = self._augment(x, foreground, generator)
        n, c, h, w = x.shape
        noise = coarse_noise((n, c, h, w), self.noise_resolution, self.noise_std, generator)
        reconstruction = self.reconstruct(add_on_foreground(x, noise, foreground[:, None]))
        return ((reconstruction - x) * foreground[:, None]).square().mean()

    def _augment(self, x: Tensor, foreground: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        n, c = x.shape[:2]
        if self.flip:
            mirrored = uniform((n,), generator) < 0.5
            # The first axis of an axial slice runs from the patient's right to the left.
            x = torch.where(mirrored[:, None, None, None], x.flip(2), x)
            foreground = torch.where(mirrored[:, None, None], foreground.flip(1), foreground)
        if self.gain_jitter:
            gain = uniform((n, c, 1, 1), generator) * 2 - 1
            x = x * (1 + self.gain_jitter * gain)
        return x, foreground

    def reconstruct(self, x: Tensor, box: Box | None = None) -> Tensor:
        """``x`` without what the network takes for noise; zero outside ``box``."""
        return paste_box(self.network(cut_box(x, box)).float(), (x.shape[-2], x.shape[-1]), box)

    def raw_score(self, x: Tensor, reconstruction: Tensor, foreground: Tensor) -> Tensor:
        """Mean over the channels of the absolute residual."""
        return mean_absolute_residual(x, reconstruction)
