"""The views of a scan over which a method's output is averaged: noised, mirrored, coarser."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from anomri.inference import Inference
from anomri.methods import Box
from anomri.slices import SliceStack, cut_box, paste_box, rescale, resize
from anomri.spec import AnomriError, Score

TEST_SEED = 2022
"""Of the noise that a score's passes add: a scan gets the same map every time."""


def averaged_output(inference: Inference, stack: SliceStack, score: Score, box: Box | None) -> Tensor:
    """What a method makes of a scan's slices in the box: (n, c + its further maps, h, w), mean of a score's views.

    Raises `AnomriError` if the score asks for ``passes`` of a method that cannot reconstruct from noise.
    """
    outputs = [
        _look(inference, x, box, mirrored, scale)
        for x in _noised(inference.method, stack, score.passes)
        for mirrored in ((False, True) if score.flips else (False,))
        for scale in score.scales
    ]
    return torch.stack(outputs).mean(0) if len(outputs) > 1 else outputs[0]


def _noised(method: object, stack: SliceStack, passes: int) -> Iterator[Tensor]:
    if not passes:
        yield stack.x
        return
    if not hasattr(method, "with_noise"):
        raise AnomriError(f"{type(method).__name__} cannot reconstruct from noise; leave passes at 0.")
    generator = Generator().manual_seed(TEST_SEED)
    for _ in range(passes):
        yield method.with_noise(stack.x, stack.foreground, generator)


def _look(inference: Inference, x: Tensor, box: Box | None, mirrored: bool, scale: float) -> Tensor:
    if mirrored:
        box = box and (x.shape[2] - box[1], x.shape[2] - box[0], *box[2:])
        return _look(inference, x.flip(2), box, False, scale).flip(2)
    if scale == 1:
        return inference(x, box)
    inside = cut_box(x, box)
    size, c = (inside.shape[2], inside.shape[3]), x.shape[1]
    coarse = rescale(inside, scale, inference.method.box_multiple)
    output = inference(coarse)
    # Subtracted while both are coarse: what is lost on the way there and back is no residual.
    output[:, :c] = coarse - output[:, :c]
    output = resize(output, size)
    output[:, :c] = inside - output[:, :c]
    return paste_box(output, (x.shape[2], x.shape[3]), box)
