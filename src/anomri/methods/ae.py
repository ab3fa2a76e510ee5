"""The plain autoencoder with a spatial bottleneck (Baur et al., Medical Image Analysis 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Generator, Tensor, nn

from anomri.methods.base import LAPTOP, Method, Preset
from anomri.methods.networks.timed_unet import Decoder, Encoder
from anomri.slices import Box, cut_box, paste_box
from anomri.spec import Training

SMALL = replace(LAPTOP, steps=900)


class AE(Method):
    """The network of the denoising autoencoder without skip connections, and without noise.

    ``bottleneck`` is the number of channels of the coarsest map (16 x 16 of a whole slice): few, or
    the network learns to copy lesions as well. 16 is our choice; with it 4 channels of 128 x 128
    are squeezed 16-fold.
    """

    exportable = True
    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset({"widths": [64, 128, 256, 512]}, Training()),
        "small": Preset({"widths": [16, 32, 64, 128]}, SMALL),
        "demo": Preset(
            {"widths": [16, 32, 64, 128]}, replace(SMALL, steps=200, learning_rate=2e-3)
        ),
    }

    def __init__(
        self,
        channels: Sequence[str],
        widths: Sequence[int] = (64, 128, 256, 512),
        bottleneck: int = 16,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(len(channels), widths)
        self.squeeze = nn.Conv2d(widths[-1], bottleneck, 1)
        self.expand = nn.Conv2d(bottleneck, widths[-1], 1)
        self.decoder = Decoder(len(channels), widths)
        self.side_multiple = 2 ** (len(widths) - 1)

    def forward(
        self, x: Tensor, foreground: Tensor, generator: Generator, box: Box | None = None
    ) -> Tensor:
        """Squared error on the foreground, then the mean over all pixels."""
        x, foreground = cut_box(x, box), cut_box(foreground, box)
        return ((self.reconstruct(x) - x) * foreground[:, None]).square().mean()

    def reconstruct(self, x: Tensor, box: Box | None = None) -> Tensor:
        """What comes through the bottleneck; zero outside ``box``."""
        code = self.squeeze(self.encoder(cut_box(x, box)))
        return paste_box(self.decoder(self.expand(code)).float(), (x.shape[-2], x.shape[-1]), box)
