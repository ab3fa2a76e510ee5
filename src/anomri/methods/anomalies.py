"""Synthetic anomalies: places where a healthy slice is changed, without looking at any lesion.

They teach a network what to segment, and show on held-out healthy slices which score finds them
(Zavrtanik et al. 2021, DRAEM; Tan et al. 2020, foreign patch interpolation; Kascenas et al. 2023 on
the role of noise). Contrasts are those of the physics: water is bright on T2 and FLAIR, and dark on
T1.

Intensities are in the units of the scaling ``standard``, in which the interquartile range of a
brain is 0.15. Lengths are in pixels of the published grid of 128 x 128, about 1.9 mm; ``pixel`` is
the size of a pixel at hand in these units (0.5 on a grid of 256 x 256). Arrays are float32; all
random numbers come from the generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional

from anomri.methods.draws import between, constants, log_between, normal, uniform
from anomri.methods.noise import smooth_field

RADIUS = (1.5, 28.0)
CHANCES = (0.7, 0.4, 0.25)
"""Of a first, second and third blob in a slice: an eighth of the slices stay healthy."""
PLAQUES, PLAQUE_RADIUS = 8, (0.8, 3.0)
"""The largest number of plaques in a slice, and their radii: like those of multiple sclerosis."""
PLAQUE_SHARE = 0.3
"""Share of the slices with plaques, unless another is asked for."""
TYPICAL = 0.85
"""Share of the anomalies that follow `CONTRASTS`; the others change every channel either way."""
CONTRASTS = {"flair": (0.40, 0.18), "t2": (0.35, 0.22), "t1": (-0.15, 0.12), "t1ce": (-0.08, 0.15)}
"""Mean and standard deviation of a channel's change: oedema, gliosis and most tumours hold
water."""
UNKNOWN_CONTRAST = (0.0, 0.3)
AMPLITUDE = (0.3, 1.6)
VISIBLE = 0.1
"""An anomaly that changes no channel by more than this is not to be found."""
CORES = {"flair": (-0.5, 0.3), "t2": (-0.1, 0.6), "t1": (-0.3, 0.0), "t1ce": (-0.3, 0.05)}
"""Range of a channel's change in the core of a blob, for example necrosis."""
UNKNOWN_CORE = (-0.3, 0.3)
CORE_SHARE, CORE_RADIUS = 0.4, 6
"""Share of the blobs with a core, among those of a larger radius than this."""
RING_CHANNEL, RING_SHARE, RING_SHIFT = "t1ce", 0.6, (0.2, 1.0)
"""A contrast agent lights up around such a share of the cores, by so much."""
NEIGHBOURHOOD, SMALL_WEIGHT = 9, 4.0
"""The less of so large a square an anomaly fills, the more each of its pixels counts, up to this
weight."""


def plant_anomalies(
    x: Tensor,
    foreground: Tensor,
    shown: Tensor,
    channels: Sequence[str],
    generator: Generator,
    pixel: float = 1.0,
    plaques: float = PLAQUE_SHARE,
) -> tuple[Tensor, Tensor]:
    """Plant up to three blobs in each slice, and plaques in a share of them.

    Returns the changed slices (n, c, h, w) and where they were changed (n, h, w) bool. An anomaly
    that cannot be seen in any channel that is ``shown``, (n, c, 1, 1) of 0 and 1, does not count as
    a change: nobody could find it.
    """
    changed, where = x, torch.zeros_like(foreground)
    for chance in CHANCES:
        changed, planted = _plant_blob(
            changed, foreground, shown, channels, chance, generator, pixel
        )
        where = where | planted
    changed, planted = _plant_plaques(
        changed, foreground, shown, channels, generator, pixel, plaques
    )
    return changed.clamp_min(0) * foreground[:, None], where | planted


def segmentation_loss(
    logits: Tensor, where: Tensor, foreground: Tensor, pixel: float = 1.0
) -> Tensor:
    """Cross-entropy over the foreground + half of 1 - Dice.

    ``logits`` and ``where``, the planted anomalies, are (n, h, w). A pixel of a small anomaly
    counts for more than one of a large anomaly or of none, up to `SMALL_WEIGHT`.
    """
    inside, truth = foreground.float(), where.float()
    window = _largest_odd_number(NEIGHBOURHOOD / pixel)
    share = functional.avg_pool2d(truth[:, None], window, 1, window // 2)[:, 0]
    weight = 1 + truth * (share.clamp_min(SMALL_WEIGHT**-2).rsqrt() - 1)
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, weight, reduction="none")
    entropy = (entropy * inside).sum((1, 2)) / inside.sum((1, 2)).clamp_min(1)
    probability = logits.sigmoid() * inside
    overlap = (probability * truth).sum((1, 2))
    # With this constant an unchanged slice that is predicted empty is right, and tiny blobs do not
    # rule the gradient.
    little = 20 / pixel**2
    dice = (2 * overlap + little) / (probability.sum((1, 2)) + truth.sum((1, 2)) + little)
    return entropy.mean() + 0.5 * (1 - dice.mean())


def _largest_odd_number(limit: float) -> int:
    """The largest odd number up to ``limit``, at least 1.

    >>> [_largest_odd_number(limit) for limit in (0.5, 9, 18.9)]
    [1, 9, 17]
    """
    return max((int(limit) - 1) | 1, 1)


def random_depths(
    foreground: Tensor, generator: Generator, pixel: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One ragged ellipse in each (n, h, w) bool foreground: depth and radius.

    The depth (n, h, w) is negative outside; radii (n,) are log-uniform within `RADIUS`, so that
    small ones are as frequent as large ones.
    """
    n, h, w = foreground.shape
    row, column = _random_pixels(foreground, 1, generator)
    rows = pixel * (torch.arange(h, device=foreground.device)[None, :, None] - row[..., None])
    columns = pixel * (torch.arange(w, device=foreground.device)[None, None, :] - column[..., None])
    radius = log_between(*RADIUS, (n, 1, 1), generator)
    stretch = between(-0.4, 0.4, (n, 1, 1), generator).exp()
    angle = between(0, math.pi, (n, 1, 1), generator)
    u = (angle.cos() * rows + angle.sin() * columns) * stretch
    v = (angle.cos() * columns - angle.sin() * rows) / stretch
    away = (u.square() + v.square()).sqrt() / radius
    ragged = sum(smooth_field((n, 1, h, w), resolution, generator)[:, 0] for resolution in (6, 14))
    depth = (1 - away + 0.25 * ragged * (1.8 - away).clamp(0, 1)) * radius
    return depth, radius[:, 0, 0]


def typical_shifts(
    n: int, channels: Sequence[str], generator: Generator, typical: float = TYPICAL
) -> Tensor:
    """Changes (n, c) of the channels in n anomalies.

    A share of them, ``typical``, follows `CONTRASTS`.
    """
    contrasts = tuple(CONTRASTS.get(name, UNKNOWN_CONTRAST) for name in channels)
    mean, spread = constants(contrasts, generator.device).T
    drawn = normal((n, len(channels)), generator)
    follows = uniform((n, 1), generator) < typical
    direction = torch.where(follows, mean + spread * drawn, UNKNOWN_CONTRAST[1] * drawn)
    return log_between(*AMPLITUDE, (n, 1), generator) * direction


def _random_pixels(foreground: Tensor, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Rows and columns, (n, count) each, of pixels drawn from each (n, h, w) bool foreground."""
    n, h, w = foreground.shape
    inside = foreground.flatten(1).cumsum(1)
    # The pixel with the drawn number among those of the foreground; the first of a slice without
    # any.
    drawn = uniform((n, count), generator) * inside[:, -1:]
    number = torch.searchsorted(inside.double(), drawn.double(), right=True).clamp_max(h * w - 1)
    return number // w, number % w


def _plant_blob(
    x: Tensor,
    foreground: Tensor,
    shown: Tensor,
    channels: Sequence[str],
    chance: float,
    generator: Generator,
    pixel: float,
) -> tuple[Tensor, Tensor]:
    """A blob with soft edges in some of the slices, by ``chance``.

    Some of the larger ones have a core. In it every channel is shifted, gets a random texture and
    loses a part of its own detail.
    """
    n, c, h, w = x.shape
    depth, radius = random_depths(foreground, generator, pixel)
    edge = between(0.4 * pixel, 2.0, (n, 1, 1), generator)
    blob = torch.sigmoid(depth / edge) * foreground * (uniform((n, 1, 1), generator) < chance)
    shift = typical_shifts(n, channels, generator)[..., None, None]
    texture = functional.interpolate(
        normal((n, c, 24, 24), generator), size=(h, w), mode="bilinear"
    )
    texture = texture * between(0, 0.1, (n, 1, 1, 1), generator)
    flattened = between(0, 0.9, (n, 1, 1, 1), generator)
    weight = blob[:, None]
    mean = (x * weight).sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True).clamp_min(1e-3)
    x = x + weight * (shift + texture + flattened * (mean - x))
    x = x + _core_and_ring(depth, radius, edge, blob, channels, generator)
    return x, _visible(blob, shift, shown)


def _core_and_ring(
    depth: Tensor,
    radius: Tensor,
    edge: Tensor,
    blob: Tensor,
    channels: Sequence[str],
    generator: Generator,
) -> Tensor:
    """What cores and their rings add to slices (n, c, h, w)."""
    n, device = len(depth), depth.device
    has_core = (uniform((n,), generator) < CORE_SHARE) & (radius > CORE_RADIUS)
    blob = blob * has_core[:, None, None]
    core_radius = between(0.3, 0.75, (n,), generator)[:, None, None]
    below = depth - (1 - core_radius) * radius[:, None, None]
    ranges = constants(tuple(CORES.get(name, UNKNOWN_CORE) for name in channels), device)
    low, high = ranges.T
    shift = low + (high - low) * uniform((n, len(channels)), generator)
    core = (torch.sigmoid(below / edge) * blob)[:, None] * shift[..., None, None]

    ring = (-(below / between(1.0, 3.0, (n, 1, 1), generator)).square()).exp() * blob
    ring = ring * (uniform((n, 1, 1), generator) < RING_SHARE)
    ring = ring * between(*RING_SHIFT, (n, 1, 1), generator)
    takes_up = constants(tuple(float(name == RING_CHANNEL) for name in channels), device)
    return core + ring[:, None] * takes_up[:, None, None]


def _plant_plaques(
    x: Tensor,
    foreground: Tensor,
    shown: Tensor,
    channels: Sequence[str],
    generator: Generator,
    pixel: float,
    share: float,
) -> tuple[Tensor, Tensor]:
    """Up to `PLAQUES` small round anomalies in a share of the slices.

    Within a slice they have about the same contrast.
    """
    n, _, h, w = x.shape
    each = (n, PLAQUES, 1, 1)
    row, column = _random_pixels(foreground, PLAQUES, generator)
    rows = torch.arange(h, device=x.device)[:, None] - row[..., None, None]
    rows = rows + between(-0.5, 0.5, each, generator)
    columns = torch.arange(w, device=x.device) - column[..., None, None]
    columns = columns + between(-0.5, 0.5, each, generator)
    radius = log_between(*PLAQUE_RADIUS, each, generator)
    depth = radius - pixel * (rows.square() + columns.square()).sqrt()
    # How probable each plaque of a slice is: any number from none to all is as likely.
    wanted = uniform((n, 1, 1, 1), generator) * (uniform((n, 1, 1, 1), generator) < share)
    plaques = torch.sigmoid(depth / between(0.3 * pixel, 1.0, each, generator))
    plaques = plaques * (uniform(each, generator) < wanted) * foreground[:, None]
    shift = typical_shifts(n, channels, generator)[..., None, None]
    strength = (plaques * between(0.6, 1.4, each, generator)).amax(1, keepdim=True)
    return x + strength * shift, _visible(plaques.amax(1), shift, shown)


def _visible(blob: Tensor, shift: Tensor, shown: Tensor) -> Tensor:
    """Where a blob (n, h, w) is, if its shift (n, c, 1, 1) is visible in a shown channel."""
    return (blob > 0.5) & ((shift * shown).abs().amax(1) > VISIBLE)
