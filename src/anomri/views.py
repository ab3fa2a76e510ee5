"""The views of a scan over which a method's output is averaged: noised, mirrored, coarser, a part of its channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from anomri.inference import Inference
from anomri.methods import Box
from anomri.slices import SliceStack, cut_box, paste_box, rescale, resize
from anomri.spec import AnomriError, Score

TEST_SEED = 2022
"""Of the noise that a score's passes add: a scan gets the same map every time."""


def averaged_output(
    inference: Inference, stack: SliceStack, channels: Sequence[str], score: Score, box: Box | None
) -> Tensor:
    """What a method makes of a scan's slices in the box: (n, c + its further maps, h, w), mean of a score's views.

    A channel's reconstruction is the mean of the views that show it; ``channels`` names those of the stack. Raises
    `AnomriError` if the score asks for ``passes`` of a method that cannot reconstruct from noise, or for ``parts`` of the
    channels of one that needs them all.
    """
    check_parts(inference.method, score)
    c = stack.x.shape[1]
    total, views = torch.zeros(()), torch.zeros(())
    for kept in _parts(stack.x, channels, score.parts):
        shown = torch.tensor(kept)[:, None, None]
        for noised in _noised(inference.method, stack, score.passes):
            seen = noised if all(kept) else noised * shown
            for mirrored in (False, True) if score.flips else (False,):
                for scale in score.scales:
                    output = _look(inference, seen, box, mirrored, scale)
                    counted = torch.ones((output.shape[1], 1, 1))
                    counted[:c] = shown
                    total, views = total + output * counted, views + counted
    return total / views.clamp_min(1)


def check_parts(method: object, score: Score) -> None:
    """Raise `AnomriError` if a score asks for parts of the channels of a method that needs them all."""
    if score.parts and not getattr(method, "takes_subsets", False):
        raise AnomriError(
            f"the score looks at {', '.join(score.parts)} alone too, but the model needs all of its channels; train it "
            f"with channel_dropout, or take parts out of the score's settings."
        )


def _parts(x: Tensor, channels: Sequence[str], parts: Sequence[str]) -> list[list[bool]]:
    """Which channels are shown: first all, then those of each part, as far as the scan (n, c, h, w) has them."""
    present = [bool(x[:, k].any()) for k in range(x.shape[1])]
    shown = [[True] * len(present)]
    for part in parts:
        kept = [there and name in part.split("+") for name, there in zip(channels, present, strict=True)]
        if any(kept) and kept != present:
            shown.append(kept)
    return shown


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
