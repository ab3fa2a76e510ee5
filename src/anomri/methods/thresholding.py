"""Thresholding of one bright channel, without a network (Meissen et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor

from anomri.errors import AnomriError
from anomri.methods.base import Method, Preset
from anomri.slices import Box


class Thresholding(Method):
    """Histogram-equalised FLAIR in the brain: the share that is darker than a pixel.

    ``channel`` names another channel in which lesions are bright; FLAIR is taken if there is one,
    else the first.
    """

    PRESETS: ClassVar[dict[str, Preset]] = {"paper": Preset(), "small": Preset(), "demo": Preset()}

    def __init__(self, channels: Sequence[str], channel: str | None = None) -> None:
        super().__init__()
        name = channel or ("flair" if "flair" in channels else channels[0])
        if name not in channels:
            raise AnomriError(
                f"thresholding needs channel {name}, but the channels are {', '.join(channels)}."
            )
        self.channel = list(channels).index(name)

    def forward(
        self, x: Tensor, foreground: Tensor, generator: Generator, box: Box | None = None
    ) -> Tensor:
        """There is nothing to learn."""
        raise NotImplementedError("thresholding is not trained")

    def reconstruct(self, x: Tensor, box: Box | None = None) -> Tensor:
        """The channels as they are: this method has no idea of what is healthy."""
        return x

    def residual(self, x: Tensor, reconstruction: Tensor, foreground: Tensor) -> Tensor:
        """The share of the foreground that is at most as bright: histogram equalisation."""
        image = x[:, self.channel].contiguous()
        inside = image[foreground]
        rank = torch.searchsorted(inside.sort().values, inside, right=True)
        equalised = torch.zeros_like(image)
        equalised[foreground] = rank.float() / max(inside.numel(), 1)
        return equalised
