"""Augmentation: the variety that scanners and heads bring to healthy slices."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor
from torch.nn import functional

from anomri.errors import AnomriError
from anomri.methods.draws import between, uniform
from anomri.methods.noise import smooth_field
from anomri.spec import FLOOR


@dataclass(frozen=True)
class Augmentation:
    """How much training slices are varied; all of it is off by default, as in the paper.

    ``flip`` mirrors half of the slices left to right. ``turn`` degrees, ``zoom`` (a share) and
    ``shift`` (a share of half the slice) move them. ``blur`` softens half of the channels by up to
    so many pixels. ``gain`` g multiplies each channel by U(1 - g, 1 + g). ``contrast`` g stretches
    a channel about the mean of its own brain by exp(U(-g, g)), ``brightness`` b adds U(-b, b), and
    ``shading`` adds a smooth field of that standard deviation; these three change the brain only.
    """

    flip: bool = False
    turn: float = 0.0
    zoom: float = 0.0
    shift: float = 0.0
    gain: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    shading: float = 0.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            wants_bool = isinstance(one.default, bool)
            if not isinstance(value, int | float) or isinstance(value, bool) != wants_bool:
                what = "true or false" if wants_bool else "a number"
                raise AnomriError(f"the augmentation {one.name} is {what}; found {value!r:.80}.")


def augment(
    x: Tensor, foreground: Tensor, how: Augmentation, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Vary slices (n, c, h, w) float32, >= 0, and their foreground (n, h, w) bool alike."""
    if how.flip:
        x, foreground = _flip(x, foreground, generator)
    if how.turn or how.zoom or how.shift:
        x, foreground = _move(x, foreground, how, generator)
    if how.blur:
        x = _blur(x, how.blur, generator)
    if how.gain:
        x = x * between(1 - how.gain, 1 + how.gain, (*x.shape[:2], 1, 1), generator)
    if how.contrast or how.brightness or how.shading:
        x = _vary_brain(x, foreground, how, generator)
    return x, foreground


def _flip(x: Tensor, foreground: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    flipped = uniform((len(x),), generator) < 0.5
    # The first axis of an axial slice runs from the patient's right to the left.
    x = torch.where(flipped[:, None, None, None], x.flip(2), x)
    return x, torch.where(flipped[:, None, None], foreground.flip(1), foreground)


def _move(
    x: Tensor, foreground: Tensor, how: Augmentation, generator: Generator
) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    angle = torch.deg2rad(between(-how.turn, how.turn, (n,), generator))
    scale = between(1 - how.zoom, 1 + how.zoom, (n,), generator)
    across, along = between(-how.shift, how.shift, (n, 2), generator).unbind(1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # Sampling points are in units of half the width and half the height.
    rows = [torch.stack([cos, -sin * h / w, across], 1), torch.stack([sin * w / h, cos, along], 1)]
    points = functional.affine_grid(torch.stack(rows, 1), [n, 1, h, w], align_corners=False)
    inside = foreground[:, None].float()
    both = functional.grid_sample(torch.cat([x * inside, inside], 1), points, align_corners=False)
    share = both[:, c:]
    # Divided by the share of brain, so that the edge is no darker than before.
    return both[:, :c] / share.clamp_min(0.3) * (share > 0.5), share[:, 0] > 0.5


def _blur(x: Tensor, largest: float, generator: Generator) -> Tensor:
    """Gaussian filters of standard deviation U(0, ``largest``) pixels, for half of the channels."""
    n, c, h, w = x.shape
    sigma = between(0, largest, (n, c), generator) * (uniform((n, c), generator) < 0.5)
    reach = torch.arange(-2, 3, device=x.device)
    kernel = (-0.5 * (reach / sigma.flatten().clamp_min(1e-2)[:, None]) ** 2).exp()
    kernel = kernel / kernel.sum(1, keepdim=True)
    blurred = functional.pad(x.reshape(1, n * c, h, w), (2, 2, 2, 2), mode="reflect")
    blurred = functional.conv2d(blurred, kernel[:, None, :, None], groups=n * c)
    blurred = functional.conv2d(blurred, kernel[:, None, None, :], groups=n * c)
    return blurred.reshape(n, c, h, w) * (x > 0)


def _vary_brain(x: Tensor, foreground: Tensor, how: Augmentation, generator: Generator) -> Tensor:
    """Vary contrast, brightness and shading of each channel within the brain."""
    n, c, h, w = x.shape
    inside = foreground[:, None]
    size = inside.sum((2, 3), keepdim=True).clamp_min(1)
    mean = (x * inside).sum((2, 3), keepdim=True) / size
    stretch = between(-how.contrast, how.contrast, (n, c, 1, 1), generator).exp()
    varied = mean + (x - mean) * stretch
    varied = varied + between(-how.brightness, how.brightness, (n, c, 1, 1), generator)
    varied = varied + how.shading * smooth_field((n, c, h, w), 4, generator)
    # What a channel does not cover stays empty.
    return torch.where(inside & (x > 0), varied.clamp_min(FLOOR), x)
