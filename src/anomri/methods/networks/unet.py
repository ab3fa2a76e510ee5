"""The U-Net of the denoising autoencoder (Kascenas et al.

2022, section 3.2), and what it is built of.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Network = TypeVar("Network", bound=nn.Module)
TINY = 1e-12
"""Nothing of a network's output depends on smaller parameters."""


def group_count(channels: int) -> int:
    """Number of groups of a group norm: the middle one of the sorted divisors of ``channels``.

    >>> [group_count(c) for c in (8, 64, 128, 512)]
    [4, 8, 16, 32]
    """
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    return divisors[len(divisors) // 2]


def standardise_weight(weight: Tensor) -> Tensor:
    """Filters (out, in, h, w) with their mean subtracted, divided by (unbiased std + 1e-5)."""
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    std = weight.std(dim=(1, 2, 3), keepdim=True)
    return (weight - mean) / (std + 1e-5)


class WeightStandardisedConv2d(nn.Conv2d):
    """A convolution whose filters are standardised at every call (Qiao et al. 2019).

    It is 3 x 3 and padded by reflection.
    """

    standardised = False  # True once `fold_weight_standardisation` has done it for good

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of (n, in, h, w)."""
        x = self._padded(x)
        return functional.conv2d(
            x, self.weight if self.standardised else standardise_weight(self.weight), self.bias
        )

    def swish(self, x: Tensor) -> Tensor:
        """Swish of the convolution of (n, in, h, w)."""
        fusible = self.standardised and x.device.type == "cpu" and can_fuse_swish(self.weight.dtype)
        if not fusible or torch.is_grad_enabled():  # the operator has no gradient
            return functional.silu(self(x))
        # One pass over the maps instead of two; autocast does not know the operator.
        x = self._padded(x.to(self.weight.dtype))
        return torch.ops.mkldnn._convolution_pointwise(
            x,
            self.weight,
            self.bias,
            [0, 0],
            self.stride,
            self.dilation,
            self.groups,
            "swish",
            [1.0],
            "",
        )

    def _padded(self, x: Tensor) -> Tensor:
        # Autocast would pad in float32: two more passes over the maps, for the same values.
        with torch.autocast(x.device.type, enabled=False):
            return functional.pad(x, (1, 1, 1, 1), mode="reflect")


@cache
def can_fuse_swish(dtype: torch.dtype) -> bool:
    """Whether torch can fuse a convolution and a Swish on this processor.

    The operator is the one that `torch.compile` uses.
    """
    # Elsewhere oneDNN may have no fast kernel for it.
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    ):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class ConvBlock(nn.Module):
    """Twice: weight-standardised 3 x 3 convolution, padded by reflection; Swish; group norm."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = WeightStandardisedConv2d(channels_in, channels_out, 3)
        self.norm1 = nn.GroupNorm(group_count(channels_out), channels_out)
        self.conv2 = WeightStandardisedConv2d(channels_out, channels_out, 3)
        self.norm2 = nn.GroupNorm(group_count(channels_out), channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, h, w) -> (n, out, h, w)."""
        x = self.norm1(self.conv1.swish(x))
        x = self.norm2(self.conv2.swish(x))
        return x


def halve(x: Tensor) -> Tensor:
    """The mean of every 2 x 2 pixels of (n, c, h, w): ``avg_pool2d(x, 2)``, to the byte.

    Torch pools maps that are not channels last value by value, four times as slowly as it adds.
    """
    slow = x.device.type == "cpu" and x.is_contiguous() and not torch.is_grad_enabled()
    if not slow or x.shape[2] % 2 or x.shape[3] % 2:
        return functional.avg_pool2d(x, 2)
    total = x[..., ::2, ::2] + x[..., ::2, 1::2]
    total += x[..., 1::2, ::2]
    total += x[..., 1::2, 1::2]
    return total.div_(4)


class UNet(nn.Module):
    """U-Net with skip connections: (n, channels, h, w) -> the same shape.

    ``widths`` gives the channels of each level, from the finest to the coarsest; h and w must be
    divisible by 2 ** (len(widths) - 1), and the coarsest map must be at least 2 x 2 for the
    reflection padding.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int] = (64, 128, 256, 512),
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.encoder = nn.ModuleList(
            [ConvBlock(channels, widths[0])] + [ConvBlock(fine, coarse) for fine, coarse in pairs]
        )
        self.upsample = nn.ModuleList(
            [nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairs]
        )
        self.decoder = nn.ModuleList([ConvBlock(2 * fine, fine) for fine, _ in pairs])
        self.head = nn.Conv2d(widths[0], out_channels or channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> (n, out_channels, h, w).

        As many as there are channels unless told.
        """
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else halve(x))
            skips.append(x)
        skips.pop()
        for level in reversed(range(len(self.decoder))):
            x = self.decoder[level](torch.cat([self.upsample[level](x), skips[level]], dim=1))
        # Rounded to bfloat16, a reconstruction would be as coarse as the residuals that it is to
        # show.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.float())


def fold_weight_standardisation(network: Network, dtype: torch.dtype = torch.float32) -> Network:
    """Standardise the filters of ``network`` once, in place, for inference.

    Its output does not change. ``dtype`` is what autocast would round them to at every call, or
    float32 without it. Parameters below `TINY`, which weight decay leaves where a network has no
    use for them, become zero: processors take many times as long for products of subnormal numbers.
    """
    for module in network.modules():
        if isinstance(module, WeightStandardisedConv2d):
            if not module.standardised:
                with torch.no_grad():
                    module.weight.copy_(standardise_weight(module.weight))
            module.standardised = True
            module.to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.masked_fill_(parameter.abs() < TINY, 0)
    return network


def compile_networks(network: nn.Module) -> None:
    """Have every `UNet` of ``network`` compiled at its next call, in place.

    Parameters and their names stay.
    """
    # Left to itself, torch keeps channels first in networks with a convolution that halves the
    # channels, and then turns
    # every map for each convolution.
    options = {"force_layout_optimization": True}
    for module in network.modules():
        if isinstance(module, UNet):
            module.compile(dynamic=False, options=options)


def rename_released_parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the program released with the paper, under the names of `UNet`.

    One of its names is ``down_path.0.block.1.weight``. Raises ``KeyError`` naming the parameter
    that is not one of that program's U-Net.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    levels = 1 + max(
        (int(name.split(".")[1]) for name in state if name.startswith("down_path.")), default=0
    )
    in_block = {"1": "conv1", "3": "norm1", "5": "conv2", "7": "norm2"}
    renamed = {}
    for name, value in state.items():
        part, *rest = name.split(".")
        match part, rest:
            case "down_path", [level, "block", index, kind] if index in in_block:
                new = f"encoder.{level}.{in_block[index]}.{kind}"
            case "up_path", [step, "up", kind]:
                new = f"upsample.{levels - 2 - int(step)}.{kind}"
            case "up_path", [step, "conv_block", "block", index, kind] if index in in_block:
                new = f"decoder.{levels - 2 - int(step)}.{in_block[index]}.{kind}"
            case "last", [kind]:
                new = f"head.{kind}"
            case _:
                raise KeyError(f"{name} is not a parameter of the released U-Net")
        renamed[new] = value
    return renamed
