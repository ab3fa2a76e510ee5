"""The coarse-noise denoising autoencoder (Kascenas et al., MIDL 2022), and additions to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from anomri.errors import AnomriError
from anomri.methods.anomalies import PLAQUE_SHARE, plant_anomalies, segmentation_loss
from anomri.methods.augmentation import Augmentation, augment
from anomri.methods.base import LAPTOP, Method, Preset
from anomri.methods.draws import constants, uniform
from anomri.methods.networks.unet import UNet
from anomri.methods.noise import Noise, add_on_foreground
from anomri.slices import Box, cut_box, paste_box
from anomri.spec import Grid, Scaling, Score, Training

SMALL_WIDTHS = [16, 32, 64, 128]
VARIETY = {
    "flip": True,
    "turn": 9.0,
    "zoom": 0.1,
    "shift": 0.06,
    "contrast": 0.1,
    "brightness": 0.025,
    "shading": 0.02,
}
"""Augmentation that few patients lack, and too little to take bright tissue for healthy."""
ACCURATE = {
    "widths": [32, 64, 128, 256],
    "noise_resolution": [8, 16, 16, 32],
    "noise_std": [0.03, 0.25],
    "noise_share": 0.5,
    "anomalies": True,
    "segmentation_head": True,
    "channel_dropout": 0.5,
    "alone": ["flair"],
    "augmentation": {**VARIETY, "contrast": 0.2, "brightness": 0.05, "shading": 0.04},
}
NARROW = {**ACCURATE, "widths": SMALL_WIDTHS}
SCHEDULE = replace(
    LAPTOP,
    batch_size=12,
    learning_rate=2e-3,
    warmup=50,
    amsgrad=False,
    gradient_clip=0.025,
    average=0.99,
    validate_every=200,
)
FREE = replace(SCHEDULE, weight_decay=0.0)
"""Without weight decay: Adam divides it by the size of the gradient, so it takes filters that learn
slowly to zero."""
ALONE_SHARE = 0.5
"""Of the slices with channel dropout, the share that shows one of the channels ``alone``."""
SEGMENTATION_WEIGHT = 0.025
"""Weight of the segmentation head's loss beside the squared error: each is about half of a trained
network's loss."""


class DAE(Method):
    """A U-Net learns to remove coarse noise from healthy slices; at test it removes lesions.

    In training, noise N(0, ``noise_std``^2), drawn at ``noise_resolution`` x ``noise_resolution``
    and enlarged, is added to the brain, and the network gives back the slice without it. At test no
    noise is added, and the residual shows what the network changed. ``widths`` are the channels of
    the network at each level. The noise covers what the network sees: the whole grid, or the box of
    the brain if a training is cropped to it.

    Not in the paper, and off by default:

    * Several ``noise_resolution``: each batch draws one. Several ``noise_std``: each slice draws
      one between the smallest and the largest. ``noise_share``: the share of the slices that get
      noise.
    * ``augmentation``: fields of `augmentation.Augmentation`, applied to the target too.
    * ``anomalies``: synthetic anomalies are planted in healthy slices
      (`anomalies.plant_anomalies`), and the network learns to give back what was there; ``plaques``
      is the share of slices that get several small ones.
    * ``segmentation_head``: one more map of the network, the probability that a pixel belongs to
      such an anomaly.
    * ``channel_dropout``: the share of the slices that show a random subset of their channels; the
      network then takes scans with any of its channels. Half of these slices show one of the
      channels ``alone``, if the network has any of these: channels that people often have without
      the others.
    * ``network_channels``: all channels of the network, if a scan's ``channels`` are a part of
      them. The network sees zeros in place of the others. A network that takes subsets can be
      trained further with fewer channels this way.
    """

    half_precision = True
    capturable = True
    exportable = True
    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset({"widths": [64, 128, 256, 512]}, Training()),
        "small": Preset(
            {"widths": SMALL_WIDTHS, "noise_std": 0.25, "augmentation": VARIETY},
            # So small a network gains little time by bfloat16, and may lose by it (docs/notes).
            replace(SCHEDULE, steps=2400, precision="32-true"),
            scaling=Scaling("standard"),
        ),
        "accurate": Preset(
            ACCURATE, replace(FREE, steps=16_000), Scaling("standard"), Score("auto")
        ),
        "quick": Preset(
            {**NARROW, "plaques": 0.6},
            replace(FREE, steps=4000),
            Scaling("standard"),
            Score("auto"),
        ),
        "demo": Preset(
            NARROW,
            replace(FREE, steps=250, validate_every=125, validation_slices=64),
            Scaling("standard"),
            Score("auto"),
        ),
    }

    def __init__(
        self,
        channels: Sequence[str],
        widths: Sequence[int] = (64, 128, 256, 512),
        noise_resolution: int | Sequence[int] = 16,
        noise_std: float | Sequence[float] = 0.2,
        noise_share: float = 1.0,
        anomalies: bool = False,
        segmentation_head: bool = False,
        augmentation: Mapping[str, Any] | None = None,
        channel_dropout: float = 0.0,
        alone: Sequence[str] = (),
        plaques: float = PLAQUE_SHARE,
        network_channels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if segmentation_head and not anomalies:
            raise AnomriError(
                "segmentation_head needs anomalies: it learns where they were planted."
            )
        if not (0 <= channel_dropout <= 1 and 0 <= plaques <= 1):
            raise AnomriError(
                f"channel_dropout and plaques are from 0 to 1; found {channel_dropout} and "
                f"{plaques}."
            )
        every = tuple(network_channels) or tuple(channels)
        if not set(channels) <= set(every) or (network_channels and len(set(every)) < len(every)):
            raise AnomriError(
                "network_channels are the channels and others, each of them once; found "
                f"{', '.join(every):.200}."
            )
        self.channels = tuple(channels)
        # Plain tuples, no buffers: several processes would synchronise buffers at every call.
        self.channel_numbers = tuple(every.index(name) for name in channels)
        self.network_maps = len(every)
        self.network = UNet(len(every), widths, len(every) + segmentation_head)
        self.side_multiple = 2 ** (len(widths) - 1)
        self.finest_width = widths[0]
        self.noise_resolution, self.noise_std = noise_resolution, noise_std
        self.noise = Noise(noise_resolution, noise_std, noise_share)
        self.augmentation = Augmentation(**(augmentation or {}))
        self.anomalies, self.plaques = anomalies, plaques
        self.segmentation_head = segmentation_head
        self.channel_dropout = channel_dropout
        self.takes_subsets = channel_dropout > 0
        self.alone = tuple(number for number, name in enumerate(channels) if name in alone)

    def forward(
        self, x: Tensor, foreground: Tensor, generator: Generator, box: Box | None = None
    ) -> Tensor:
        """Squared error of the denoised slice on the foreground, mean over all pixels.

        + the segmentation head's loss.
        """
        pixel = Grid().size[1] / x.shape[3]
        x, foreground = cut_box(x, box), cut_box(foreground, box)
        if self.training:
            x, foreground = augment(x, foreground, self.augmentation, generator)
        kept = self._kept_channels(x, generator)
        changed, planted = x, torch.zeros_like(foreground)
        if self.anomalies:
            changed, planted = plant_anomalies(
                x, foreground, kept, self.channels, generator, pixel, self.plaques
            )
        noise = self.noise.draw(changed.shape, generator)
        noisy = add_on_foreground(changed, noise, foreground[:, None])
        output = self._denoise(noisy * kept)
        c = x.shape[1]
        loss = ((output[:, :c] - x) * (foreground[:, None] * kept)).square().mean()
        if self.segmentation_head:
            head = segmentation_loss(output[:, c], planted, foreground, pixel)
            loss = loss + SEGMENTATION_WEIGHT * head
        return loss

    def reconstruct(self, x: Tensor, box: Box | None = None) -> Tensor:
        """The denoised slice, then the anomaly probability (0 to 1) with a segmentation head.

        Zero outside ``box``.
        """
        output = self._denoise(cut_box(x, box))
        if self.segmentation_head:
            c = len(self.channels)
            output = torch.cat([output[:, :c], output[:, c:].sigmoid()], 1)
        return paste_box(output, (x.shape[-2], x.shape[-1]), box)

    def _denoise(self, x: Tensor) -> Tensor:
        """What the network makes of slices (n, c, h, w), float32.

        With a segmentation head, its logits follow.
        """
        if self.channel_numbers == tuple(range(self.network_maps)):
            output: Tensor = self.network(x)
            return output.float()
        maps = self.channel_numbers + (self.network_maps,) * self.segmentation_head
        output = self.network(self._with_empty_channels(x))
        return output.index_select(1, constants(maps, output.device, torch.int64)).float()

    def _with_empty_channels(self, x: Tensor) -> Tensor:
        """The channels (n, c, h, w) among all of the network, the others zero.

        The memory format stays.
        """
        n, _, h, w = x.shape
        numbers = constants(self.channel_numbers, x.device, torch.int64)
        every = x.new_zeros((n, self.network_maps, h, w)).index_copy(1, numbers, x)
        if x.is_contiguous(memory_format=torch.channels_last):
            return every.contiguous(memory_format=torch.channels_last)
        return every

    def _kept_channels(self, x: Tensor, generator: Generator) -> Tensor:
        """Which channels each slice shows, (n, c, 1, 1) of 0 and 1: at least one.

        All of them without channel dropout.
        """
        n, c = x.shape[:2]
        if not (self.training and self.channel_dropout):
            return torch.ones((n, c, 1, 1), device=x.device)
        # Each channel by the toss of a coin, and one that is kept whatever the coins say.
        kept = (uniform((n, c), generator) < 0.5) | (uniform((n, c), generator).argsort(1) == 0)
        if self.alone:
            drawn = (uniform((n, 1), generator) * len(self.alone)).long()
            number = constants(self.alone, x.device, torch.int64)[drawn]
            single = torch.arange(c, device=x.device) == number
            kept = torch.where(uniform((n, 1), generator) < ALONE_SHARE, single, kept)
        kept = kept | (uniform((n, 1), generator) >= self.channel_dropout)
        return kept[..., None, None].float()
