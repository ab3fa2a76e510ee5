"""Synthetic anomalies: places where a healthy slice is changed; no lesion is looked at.

They teach a network what to segment, and they tell on held-out healthy slices which score finds them (Zavrtanik et al. 2021,
DRAEM; Tan et al. 2020, foreign patch interpolation; Kascenas et al. 2023 on the role of noise). Contrasts are those of
the physics: water is bright on T2 and FLAIR and dark on T1. Random numbers come from the generator, arrays are float32
in the units of the scaling ``standard``, of which 0.15 is the interquartile range of a brain. Lengths are in pixels of the
published grid of 128 x 128, some 1.9 mm; ``pixel`` says how large those at hand are (0.5 on a grid of 256 x 256).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional

from anomri.methods.draws import constants, normal, uniform

RADIUS = (1.5, 28.0)
CHANCES = (0.7, 0.4, 0.25)
"""Of a first, second and third blob in a slice: an eighth of the slices stay healthy."""
PLAQUES, PLAQUE_SHARE, PLAQUE_RADIUS = 8, 0.3, (0.8, 3.0)
"""At most so many small ones at once, in this share of the slices unless another is asked for, of these radii: like those of
multiple sclerosis."""
TYPICAL = 0.85
"""Share of the blobs that follow `CONTRASTS`; the others change every channel either way."""
CONTRASTS = {"flair": (0.40, 0.18), "t2": (0.35, 0.22), "t1": (-0.15, 0.12), "t1ce": (-0.08, 0.15)}
"""Mean and spread of a channel's change: oedema, gliosis and most tumours hold water."""
UNKNOWN_CONTRAST = (0.0, 0.3)
AMPLITUDE = (0.3, 1.6)
VISIBLE = 0.1
"""A blob that changes no channel by more than this is not asked for."""
CORES = {"flair": (-0.5, 0.3), "t2": (-0.1, 0.6), "t1": (-0.3, 0.0), "t1ce": (-0.3, 0.05)}
"""Range of the change in a core, as of necrosis, inside a blob."""
RING = ("t1ce", (0.2, 1.0))
"""What a contrast agent does around such a core."""
NEIGHBOURHOOD, SMALL_WEIGHT = 9, 4.0
"""The less an anomaly fills of so much squared around, the more a pixel of it counts: at most so much."""


def between(low: float, high: float, shape: Sequence[int], generator: Generator) -> Tensor:
    """Uniform random numbers from ``low`` to ``high``, of ``shape`` (n, ...)."""
    return low + (high - low) * uniform(shape, generator)


def log_between(low: float, high: float, shape: Sequence[int], generator: Generator) -> Tensor:
    """Random numbers from ``low`` to ``high``, every octave as likely, of ``shape`` (n, ...)."""
    return between(math.log(low), math.log(high), shape, generator).exp()


def smooth_field(shape: tuple[int, int, int, int], resolution: int, generator: Generator) -> Tensor:
    """Standard normal noise at ``resolution`` x ``resolution``, enlarged smoothly to ``shape`` (n, c, h, w)."""
    low = normal((*shape[:2], resolution, resolution), generator)
    return functional.interpolate(low, size=shape[2:], mode="bicubic", align_corners=False)


def random_places(foreground: Tensor, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Rows and columns, (n, count) twice, of pixels drawn from each (n, h, w) bool foreground."""
    n, h, w = foreground.shape
    inside = foreground.flatten(1).cumsum(1)
    # The pixel whose place among the foreground's is drawn; a slice without any takes its first.
    drawn = uniform((n, count), generator) * inside[:, -1:]
    pixel = torch.searchsorted(inside.double(), drawn.double(), right=True).clamp_max(h * w - 1)
    return pixel // w, pixel % w


def random_depths(
    foreground: Tensor, generator: Generator, pixel: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One ragged ellipse somewhere in each (n, h, w) bool foreground: depth below its edge, and its radius.

    The depth (n, h, w) is negative outside; radii (n,) are log-uniform within `RADIUS`, so that small ones are
    as frequent as large ones.
    """
    n, h, w = foreground.shape
    row, column = random_places(foreground, 1, generator)
    rows = pixel * (torch.arange(h, device=foreground.device)[None, :, None] - row[..., None])
    columns = pixel * (torch.arange(w, device=foreground.device)[None, None, :] - column[..., None])
    radius = log_between(*RADIUS, (n, 1, 1), generator)
    stretch, angle = (
        between(-0.4, 0.4, (n, 1, 1), generator).exp(),
        between(0, math.pi, (n, 1, 1), generator),
    )
    u = (angle.cos() * rows + angle.sin() * columns) * stretch
    v = (angle.cos() * columns - angle.sin() * rows) / stretch
    away = (u.square() + v.square()).sqrt() / radius
    ragged = sum(smooth_field((n, 1, h, w), resolution, generator)[:, 0] for resolution in (6, 14))
    return (1 - away + 0.25 * ragged * (1.8 - away).clamp(0, 1)) * radius, radius[:, 0, 0]


def random_blobs(foreground: Tensor, generator: Generator, pixel: float = 1.0) -> Tensor:
    """One ragged blob with soft edges in each (n, h, w) bool foreground: (n, h, w) float32 from 0 to 1."""
    depth, _ = random_depths(foreground, generator, pixel)
    return (
        torch.sigmoid(depth / between(0.4 * pixel, 2.0, (len(depth), 1, 1), generator)) * foreground
    )


def plant_anomalies(
    x: Tensor,
    foreground: Tensor,
    shown: Tensor,
    channels: Sequence[str],
    generator: Generator,
    pixel: float = 1.0,
    plaques: float = PLAQUE_SHARE,
) -> tuple[Tensor, Tensor]:
    """Change up to three blobs of each slice, and plaques in a share; returns them (n, c, h, w) and where (n, h, w) bool.

    In a blob every channel is shifted, gets a random texture and loses a part of its own detail; some of the larger
    ones have a core, and some of the cores a ring. What changed in no channel that is ``shown``, (n, c, 1, 1) of 0 and 1,
    did not change: nobody could find it.
    """
    changed, where = x, torch.zeros_like(foreground)
    for chance in CHANCES:
        changed, there = _plant(changed, foreground, shown, channels, chance, generator, pixel)
        where = where | there
    changed, there = _plant_plaques(changed, foreground, shown, channels, generator, pixel, plaques)
    where = where | there
    return changed.clamp_min(0) * foreground[:, None], where


def segmentation_loss(
    logits: Tensor, where: Tensor, foreground: Tensor, pixel: float = 1.0
) -> Tensor:
    """Cross-entropy over the foreground + half of 1 - Dice, between anomaly probabilities (n, h, w) and what changed (n, h, w).

    A pixel of a small anomaly counts for more, up to `SMALL_WEIGHT`, than one of a large anomaly or of none.
    """
    inside, truth = foreground.float(), where.float()
    window = max(
        (int(NEIGHBOURHOOD / pixel) - 1) | 1, 1
    )  # the largest odd number of pixels that fits
    share = functional.avg_pool2d(truth[:, None], window, 1, window // 2)[:, 0]
    weight = 1 + truth * (share.clamp_min(SMALL_WEIGHT**-2).rsqrt() - 1)
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, weight, reduction="none")
    entropy = (entropy * inside).sum((1, 2)) / inside.sum((1, 2)).clamp_min(1)
    probability = logits.sigmoid() * inside
    # The constant counts an unchanged slice that is predicted empty as right, and keeps tiny blobs from ruling the gradient.
    little = 20 / pixel**2
    dice = (2 * (probability * truth).sum((1, 2)) + little) / (
        probability.sum((1, 2)) + truth.sum((1, 2)) + little
    )
    return entropy.mean() + 0.5 * (1 - dice.mean())


def typical_shifts(
    n: int, channels: Sequence[str], generator: Generator, typical: float = TYPICAL
) -> Tensor:
    """Changes (n, c) of the channels in n anomalies; a share of them, ``typical``, follows `CONTRASTS`."""
    contrasts = tuple(CONTRASTS.get(name, UNKNOWN_CONTRAST) for name in channels)
    mean, spread = constants(contrasts, generator.device).T
    drawn = normal((n, len(channels)), generator)
    follows = uniform((n, 1), generator) < typical
    direction = torch.where(follows, mean + spread * drawn, UNKNOWN_CONTRAST[1] * drawn)
    return log_between(*AMPLITUDE, (n, 1), generator) * direction


def _plant(
    x: Tensor,
    foreground: Tensor,
    shown: Tensor,
    channels: Sequence[str],
    chance: float,
    generator: Generator,
    pixel: float,
) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    depth, radius = random_depths(foreground, generator, pixel)
    edge = between(0.4 * pixel, 2.0, (n, 1, 1), generator)
    blob = torch.sigmoid(depth / edge) * foreground * (uniform((n, 1, 1), generator) < chance)
    shift = typical_shifts(n, channels, generator)[..., None, None]
    texture = normal((n, c, 24, 24), generator)
    texture = functional.interpolate(texture, size=(h, w), mode="bilinear") * between(
        0, 0.1, (n, 1, 1, 1), generator
    )
    flattened = between(0, 0.9, (n, 1, 1, 1), generator)
    weight = blob[:, None]
    mean = (x * weight).sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True).clamp_min(1e-3)
    x = x + weight * (shift + texture + flattened * (mean - x))
    x = x + _core(depth, radius, edge, blob, channels, generator)
    return x, _visible(blob, shift, shown)


def _plant_plaques(
    x: Tensor,
    foreground: Tensor,
    shown: Tensor,
    channels: Sequence[str],
    generator: Generator,
    pixel: float,
    share: float,
) -> tuple[Tensor, Tensor]:
    """Small round anomalies in a share of the slices, of about the same contrast within a slice."""
    n, _, h, w = x.shape
    row, column = (
        place[..., None, None] for place in random_places(foreground, PLAQUES, generator)
    )
    shape = (n, PLAQUES, 1, 1)
    rows = torch.arange(h, device=x.device)[:, None] - row + between(-0.5, 0.5, shape, generator)
    columns = torch.arange(w, device=x.device) - column + between(-0.5, 0.5, shape, generator)
    depth = (
        log_between(*PLAQUE_RADIUS, shape, generator)
        - pixel * (rows.square() + columns.square()).sqrt()
    )
    wanted = uniform((n, 1, 1, 1), generator) * (uniform((n, 1, 1, 1), generator) < share)
    plaques = torch.sigmoid(depth / between(0.3 * pixel, 1.0, shape, generator)) * (
        uniform(shape, generator) < wanted
    )
    plaques = plaques * foreground[:, None]
    shift = typical_shifts(n, channels, generator)[..., None, None]
    changed = x + (plaques * between(0.6, 1.4, shape, generator)).amax(1, keepdim=True) * shift
    return changed, _visible(plaques.amax(1), shift, shown)


def _visible(blob: Tensor, shift: Tensor, shown: Tensor) -> Tensor:
    """Where a blob (n, h, w) is, if its shift (n, c, 1, 1) can be seen in a channel that is shown."""
    return (blob > 0.5) & ((shift * shown).abs().amax(1) > VISIBLE)


def _core(
    depth: Tensor,
    radius: Tensor,
    edge: Tensor,
    blob: Tensor,
    channels: Sequence[str],
    generator: Generator,
) -> Tensor:
    """What a core and its ring add to (n, c, h, w): two of five blobs that are larger than 6 pixels have one."""
    n = len(depth)
    blob = blob * ((uniform((n,), generator) < 0.4) & (radius > 6))[:, None, None]
    below = depth - (1 - between(0.3, 0.75, (n,), generator))[:, None, None] * radius[:, None, None]
    ranges = constants(tuple(CORES.get(name, (-0.3, 0.3)) for name in channels), depth.device)
    shift = ranges[:, 0] + (ranges[:, 1] - ranges[:, 0]) * uniform((n, len(channels)), generator)
    added = (torch.sigmoid(below / edge) * blob)[:, None] * shift[..., None, None]
    ring = (-(below / between(1.0, 3.0, (n, 1, 1), generator)).square()).exp() * blob
    ring = ring * (uniform((n, 1, 1), generator) < 0.6) * between(*RING[1], (n, 1, 1), generator)
    takes_up = constants(tuple(float(name == RING[0]) for name in channels), depth.device)
    return added + ring[:, None] * takes_up[:, None, None]
