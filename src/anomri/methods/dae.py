"""The coarse-noise denoising autoencoder (Kascenas, Pugeault, O'Neil, MIDL 2022), and what may be added to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional

from anomri.errors import AnomriError
from anomri.methods.anomalies import PLAQUE_SHARE, plant_anomalies, segmentation_loss
from anomri.methods.augmentation import Augmentation, augment
from anomri.methods.base import LAPTOP, Method, Preset
from anomri.methods.draws import constants, for_all, uniform
from anomri.methods.networks.unet import UNet
from anomri.methods.noise import Noise, add_on_foreground
from anomri.slices import Box, cut_box, paste_box, rescale
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
"""Of the augmentation: what few patients lack, and too little to take bright tissue for healthy."""
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
"""Added to the gradient, which Adam then divides by its size, decay of any strength takes filters that learn slowly to zero."""
ALONE_SHARE = 0.5
"""Of the slices with channel dropout, how many show one of the channels ``alone``."""
SEGMENTATION_WEIGHT = 0.025
"""Weight of the segmentation head's loss beside the squared error: each is about half of a trained network's loss."""


class DAE(Method):
    """A U-Net that learns to remove coarse noise from healthy slices, and then removes lesions.

    ``widths`` are the network's channels per level; the noise is N(0, ``noise_std``^2) drawn at
    ``noise_resolution`` x ``noise_resolution`` for what the network sees: the whole grid, or the box of the brain
    if training is cropped to it. No noise is added at test.

    Not in the paper, and off unless asked for:

    * Several ``noise_resolution`` (a batch draws one) and ``noise_std`` (a slice draws one between the least and the
      largest); ``noise_kind`` ``simplex``; noise on a ``noise_share`` of the slices, and ``noise_in_blobs`` on half.
    * ``anomalies``: blobs of healthy slices are changed as well (`anomalies.plant_anomalies`), and the network learns
      to give back what was there; a share of the slices, ``plaques``, gets small round ones too. ``segmentation_head``: one more map
      gives the probability that a pixel was changed, for the scores that use it.
    * ``augmentation``: fields of `augmentation.Augmentation`, applied to the target too.
    * ``scales``: a batch draws one, and is seen on a grid coarser by that factor; the network then serves all of them.
    * ``channel_dropout``: the share of training slices of which only a random subset of channels is seen; the network
      then takes scans that have any of its channels. Half of them show one of the channels ``alone`` instead, if the
      network has any of these: what people often have without the others.
    * ``mirror``: the network sees every slice's mirror image beside it, as further channels: brains are nearly
      symmetric, and lesions are not.
    * ``subpixels``: squares of so many pixels a side are one pixel of the network, with as many times the channels, and
      are taken apart again (Shi et al. 2016): a grid twice as fine for little more than the price of the coarse one.
    * ``network_channels``: all that the network has, where a scan's ``channels`` are a part of them. The others are empty to
      it, so that a network which takes subsets of its channels can be gone on from with fewer.
    """

    half_precision = True
    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset({"widths": [64, 128, 256, 512]}, Training()),
        "small": Preset(
            {"widths": SMALL_WIDTHS, "noise_std": 0.25, "augmentation": VARIETY},
            # So small a network gains little time by bfloat16, and may lose by it (docs/notes).
            replace(SCHEDULE, steps=2400, precision="32-true"),
            scaling=Scaling("standard"),
        ),
        "accurate": Preset(
            ACCURATE, replace(FREE, steps=16_000), Scaling("standard"), Score("auto", flips=True)
        ),
        "quick": Preset(
            {**NARROW, "plaques": 0.6},
            replace(FREE, steps=4000),
            Scaling("standard"),
            Score("auto", flips=True),
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
        noise_kind: str = "coarse",
        noise_share: float = 1.0,
        noise_in_blobs: bool = False,
        anomalies: bool = False,
        segmentation_head: bool = False,
        augmentation: Mapping[str, Any] | None = None,
        channel_dropout: float = 0.0,
        alone: Sequence[str] = (),
        scales: Sequence[float] = (1.0,),
        mirror: bool = False,
        subpixels: int = 1,
        plaques: float = PLAQUE_SHARE,
        network_channels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if segmentation_head and not anomalies:
            raise AnomriError(
                "segmentation_head needs anomalies: it learns where they were planted."
            )
        shares = all(0 < scale <= 1 for scale in scales) and all(
            0 <= share <= 1 for share in (channel_dropout, plaques)
        )
        if subpixels < 1 or not scales or not shares:
            raise AnomriError(
                f"subpixels are 1 or more, scales above 0 up to 1, and channel_dropout and plaques from 0 to 1; found "
                f"{subpixels}, {scales}, {channel_dropout} and {plaques}."
            )
        self.channels = tuple(channels)
        self.segmentation_head = segmentation_head
        self.mirror = mirror
        self.subpixels = subpixels
        whole = tuple(network_channels) or self.channels
        if network_channels and (not {*channels} <= {*whole} or len({*whole}) < len(whole)):
            raise AnomriError(
                f"network_channels are the channels and others, each of them once; found {', '.join(whole):.200}."
            )
        # No buffers: processes would wait for each other at every call to make them equal.
        self.places = tuple(whole.index(name) for name in channels)
        self.network_maps = len(whole)
        maps = len(whole) * (1 + mirror), len(whole) + self.segmentation_head
        self.network = UNet(maps[0] * subpixels**2, widths, maps[1] * subpixels**2)
        self.side_multiple = subpixels * 2 ** (len(widths) - 1)
        self.finest_width = widths[0] // subpixels**2
        self.noise_resolution, self.noise_std = noise_resolution, noise_std
        self.noise = Noise(noise_resolution, noise_std, noise_kind, noise_share, noise_in_blobs)
        self.anomalies, self.plaques = anomalies, plaques
        self.augmentation = Augmentation(**(augmentation or {}))
        self.channel_dropout = channel_dropout
        self.alone = tuple(number for number, name in enumerate(channels) if name in alone)
        self.scales = tuple(scales)
        self.takes_subsets = channel_dropout > 0
        self.capturable = len(self.scales) == 1 and noise_kind == "coarse"

    def forward(
        self, x: Tensor, foreground: Tensor, generator: Generator, box: Box | None = None
    ) -> Tensor:
        """Squared error on the foreground, then the mean over all pixels; and the loss of the segmentation head, if there is one."""
        scale = self.scales[
            int(for_all(len(self.scales), 1, generator)) if len(self.scales) > 1 else 0
        ]
        pixel = Grid().size[1] / (scale * x.shape[3])
        x, foreground = self._at_scale(scale, cut_box(x, box), cut_box(foreground, box))
        if self.training:
            x, foreground = augment(x, foreground, self.augmentation, generator)
        kept = self._kept(x, generator)
        changed, where = x, torch.zeros_like(foreground)
        if self.anomalies:
            changed, where = plant_anomalies(
                x, foreground, kept, self.channels, generator, pixel, self.plaques
            )
        seen = self.with_noise(changed, foreground, generator, pixel)
        output = self._output(seen * kept)
        c = x.shape[1]
        loss = ((output[:, :c] - x) * (foreground[:, None] * kept)).square().mean()
        if self.segmentation_head:
            loss = loss + SEGMENTATION_WEIGHT * segmentation_loss(
                output[:, c], where, foreground, pixel
            )
        return loss

    def with_noise(
        self, x: Tensor, foreground: Tensor, generator: Generator, pixel: float = 1.0
    ) -> Tensor:
        """Slices (n, c, h, w) with the training's noise on their foreground (n, h, w)."""
        return add_on_foreground(
            x, self.noise.draw(x, foreground, generator, pixel), foreground[:, None]
        )

    def _at_scale(self, scale: float, x: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
        if scale == 1:
            return x, foreground
        x, inside = (
            rescale(one, scale, self.side_multiple) for one in (x, foreground[:, None].float())
        )
        return x, inside[:, 0] > 0.5

    def _kept(self, x: Tensor, generator: Generator) -> Tensor:
        """Which channels a slice keeps, (n, c, 1, 1): at least one."""
        n, c = x.shape[:2]
        if not (self.training and self.channel_dropout):
            return torch.ones((n, c, 1, 1), device=x.device)
        kept = (uniform((n, c), generator) < 0.5) | (uniform((n, c), generator).argsort(1) == 0)
        if self.alone:
            drawn = (uniform((n, 1), generator) * len(self.alone)).long()
            single = (
                torch.arange(c, device=x.device)
                == constants(self.alone, x.device, torch.int64)[drawn]
            )
            kept = torch.where(uniform((n, 1), generator) < ALONE_SHARE, single, kept)
        kept = kept | (uniform((n, 1), generator) >= self.channel_dropout)
        return kept[..., None, None].float()

    def reconstruct(self, x: Tensor, box: Box | None = None) -> Tensor:
        """``x`` without what the network takes for noise, then the anomaly probability (0 to 1), with a segmentation head; zero outside ``box``."""
        output = self._output(cut_box(x, box))
        if self.segmentation_head:
            c = len(self.channels)
            output = torch.cat([output[:, :c], output[:, c:].sigmoid()], 1)
        return paste_box(output, (x.shape[-2], x.shape[-1]), box)

    def _output(self, x: Tensor) -> Tensor:
        part = self.places != tuple(range(self.network_maps))
        if part:
            x = self._among_all(x)
        seen = torch.cat([x, mirrored(x)], 1) if self.mirror else x
        if self.subpixels == 1:
            output = self.network(seen)
        else:
            output = self.network(functional.pixel_unshuffle(seen, self.subpixels))
            output = functional.pixel_shuffle(output, self.subpixels)
        if part:
            own = self.places + (self.network_maps,) * self.segmentation_head
            output = output.index_select(1, constants(own, output.device, torch.int64))
        return output.float()

    def _among_all(self, x: Tensor) -> Tensor:
        """The channels (n, c, h, w) among those of the network, of which the others are zero; laid out as before."""
        n, _, h, w = x.shape
        places = constants(self.places, x.device, torch.int64)
        whole = x.new_zeros((n, self.network_maps, h, w)).index_copy(1, places, x)
        last = x.is_contiguous(memory_format=torch.channels_last)
        return whole.contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )


def mirrored(x: Tensor) -> Tensor:
    """Slices (n, c, h, w) with left and right, their rows, exchanged about the middle of what is not zero in each."""
    h = x.shape[2]
    inside = (x != 0).any(dim=1).any(dim=2).int()
    first, last = inside.argmax(1), h - 1 - inside.flip(1).argmax(1)
    opposite = (first + last)[:, None] - torch.arange(h, device=x.device)
    within = (opposite >= 0) & (opposite < h)
    return (
        x.gather(2, opposite.clamp(0, h - 1)[:, None, :, None].expand_as(x))
        * within[:, None, :, None]
    )
