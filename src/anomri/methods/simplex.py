"""Simplex noise, smooth at every scale (Perlin 2001.

Gustavson, Simplex noise demystified, 2005), on tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from anomri.methods.draws import uniform

SKEW = (math.sqrt(3) - 1) / 2
UNSKEW = (3 - math.sqrt(3)) / 6
OCTAVE_STD = 0.00544
"""Standard deviation of one octave before it is scaled, over the plane and over gradients of length
1."""


def simplex_noise(
    shape: tuple[int, int, int, int],
    wavelength: float = 64.0,
    octaves: int = 6,
    persistence: float = 0.8,
    generator: Generator | None = None,
) -> Tensor:
    """Draw noise of mean 0 and variance 1, independent per slice and channel: (n, c, h, w) float32.

    The first octave's lattice is ``wavelength`` pixels wide; each further one is half as wide and
    ``persistence`` times as strong. The defaults are AnoDDPM's (Wyatt et al. 2022), which draws in
    three dimensions; every slice is new here, so two suffice. All fields of a call share the
    lattice's random place. On the generator's device.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    total = torch.zeros(shape, device=device)
    strengths = [persistence**octave for octave in range(octaves)]
    for octave, strength in enumerate(strengths):
        total += strength * _octave(shape, wavelength / 2**octave, generator, device)
    return total / (OCTAVE_STD * math.sqrt(sum(strength**2 for strength in strengths)))


def _octave(
    shape: tuple[int, int, int, int],
    wavelength: float,
    generator: Generator | None,
    device: torch.device,
) -> Tensor:
    n, c, h, w = shape
    offset = torch.rand(2, generator=generator, device=device)
    rows = torch.arange(h, device=device)[:, None] / wavelength + offset[0]
    columns = torch.arange(w, device=device)[None, :] / wavelength + offset[1]
    skew = (rows + columns) * SKEW
    i, j = (rows + skew).floor(), (columns + skew).floor()
    unskew = (i + j) * UNSKEW
    y, x = rows - (i - unskew), columns - (j - unskew)
    lower = y > x  # which of the two triangles of the skewed cell
    lattice = (int(i.max()) + 2, int(j.max()) + 2)
    angles = 2 * math.pi * uniform((n, c, lattice[0] * lattice[1]), generator)
    noise = torch.zeros(shape, device=device)
    corners = (
        (torch.zeros_like(y), torch.zeros_like(x)),
        (lower, ~lower),
        (torch.ones_like(y), torch.ones_like(x)),
    )
    for number, (step_i, step_j) in enumerate(corners):
        step_i, step_j = step_i.to(y.dtype), step_j.to(x.dtype)
        dy, dx = y - step_i + number * UNSKEW, x - step_j + number * UNSKEW
        fade = (0.5 - dy.square() - dx.square()).clamp(min=0) ** 4
        angle = angles[:, :, ((i + step_i) * lattice[1] + j + step_j).long()]
        noise += fade * (angle.cos() * dx + angle.sin() * dy)
    return noise
