"""Variety in healthy slices that a scanner or a head brings: side, place, contrast, shading, sharpness."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor
from torch.nn import functional

from anomri.errors import AnomriError
from anomri.methods.anomalies import between, smooth_field
from anomri.methods.draws import uniform
from anomri.spec import FLOOR


@dataclass(frozen=True)
class Augmentation:
    """How much training slices are varied; all of it is off unless asked for, as in the paper.

    ``flip`` mirrors half of the slices left to right. ``turn`` degrees, ``zoom`` (a share) and ``shift`` (a share of
    half the slice) move them. ``gain`` g multiplies each channel by U(1 - g, 1 + g). ``contrast`` g stretches a channel
    about its own brain's mean by exp(U(-g, g)), ``brightness`` adds U(-b, b) and ``shading`` a smooth field of that
    deviation, both to the brain alone. ``blur`` softens half of the channels by up to so many pixels.
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
            if isinstance(value, bool) != isinstance(one.default, bool) or not isinstance(
                value, int | float
            ):
                what = "true or false" if isinstance(one.default, bool) else "a number"
                raise AnomriError(f"the augmentation {one.name} is {what}; found {value!r:.80}.")


def augment(
    x: Tensor, foreground: Tensor, how: Augmentation, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Vary slices (n, c, h, w) float32, >= 0, and their foreground (n, h, w) bool in the same way."""
    n, c, h, w = x.shape
    if how.flip:
        mirrored = uniform((n,), generator) < 0.5
        # The first axis of an axial slice runs from the patient's right to the left.
        x = torch.where(mirrored[:, None, None, None], x.flip(2), x)
        foreground = torch.where(mirrored[:, None, None], foreground.flip(1), foreground)
    if how.turn or how.zoom or how.shift:
        x, foreground = _moved(x, foreground, how, generator)
    if how.blur:
        x = _softened(x, how.blur, generator)
    if how.gain:
        x = x * between(1 - how.gain, 1 + how.gain, (n, c, 1, 1), generator)
    if how.contrast or how.brightness or how.shading:
        inside = foreground[:, None]
        level = (x * inside).sum((2, 3), keepdim=True) / inside.sum((2, 3), keepdim=True).clamp_min(
            1
        )
        varied = (
            level
            + (x - level) * between(-how.contrast, how.contrast, (n, c, 1, 1), generator).exp()
        )
        varied = varied + between(-how.brightness, how.brightness, (n, c, 1, 1), generator)
        varied = varied + how.shading * smooth_field((n, c, h, w), 4, generator)
        # What a channel does not cover stays empty.
        x = torch.where(inside & (x > 0), varied.clamp_min(FLOOR), x)
    return x, foreground


def _moved(
    x: Tensor, foreground: Tensor, how: Augmentation, generator: Generator
) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    angle = torch.deg2rad(between(-how.turn, how.turn, (n,), generator))
    scale = between(1 - how.zoom, 1 + how.zoom, (n,), generator)
    across, along = between(-how.shift, how.shift, (n, 2), generator).unbind(1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # Sampling places are in units of half the width and half the height.
    rows = [torch.stack([cos, -sin * h / w, across], 1), torch.stack([sin * w / h, cos, along], 1)]
    places = functional.affine_grid(torch.stack(rows, 1), [n, 1, h, w], align_corners=False)
    inside = foreground[:, None].float()
    both = functional.grid_sample(torch.cat([x * inside, inside], 1), places, align_corners=False)
    share = both[:, c:]
    # Divided by the share of brain, so that the edge is no darker than before.
    return both[:, :c] / share.clamp_min(0.3) * (share > 0.5), share[:, 0] > 0.5


def _softened(x: Tensor, most: float, generator: Generator) -> Tensor:
    n, c, h, w = x.shape
    sigma = (between(0, most, (n, c), generator) * (uniform((n, c), generator) < 0.5)).flatten()
    reach = torch.arange(-2, 3, device=x.device)
    kernel = (-0.5 * (reach / sigma.clamp_min(1e-2)[:, None]) ** 2).exp()
    kernel = kernel / kernel.sum(1, keepdim=True)
    flat = functional.pad(x.reshape(1, n * c, h, w), (2, 2, 2, 2), mode="reflect")
    flat = functional.conv2d(flat, kernel[:, None, :, None], groups=n * c)
    return functional.conv2d(flat, kernel[:, None, None, :], groups=n * c).reshape(n, c, h, w) * (
        x > 0
    )
