"""The views of a scan over which a method's output is averaged: noised, mirrored, coarser, a part of its channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from anomri.errors import AnomriError
from anomri.methods.base import Method
from anomri.model.inference import Inference
from anomri.scoring.registry import find
from anomri.scoring.scores import MEDIANS
from anomri.slices import Box, SliceStack, cut_box, paste_box, present_channels, rescale, resize
from anomri.spec import Score

TEST_SEED = 2022
"""Of the noise that a score's passes add: a scan gets the same map every time."""


def averaged_output(
    inference: Inference, stack: SliceStack, channels: Sequence[str], score: Score, box: Box | None
) -> Tensor:
    """What a method makes of a scan's slices in the box: (n, c + its further maps, h, w), mean of a score's views.

    A channel's reconstruction is the mean of the views that show it, and zero if the scan does not have it; ``channels``
    names those of the stack. Raises `AnomriError` if the score asks for what the method does not make (`check_score`).
    """
    check_score(inference.method, score, channels)
    total: Tensor | None = None
    views = torch.zeros(())
    for shown, output in _views(inference, stack, channels, score, box):
        counted = torch.tensor([*shown, *[True] * (output.shape[1] - len(shown))])
        output[:, ~counted] = 0
        # In place: an output is as large as the scan.
        total = output if total is None else total.add_(output)
        views = views + counted
    assert total is not None
    return total.div_(views.clamp_min(1)[:, None, None]) if views.max() > 1 else total


def _views(
    inference: Inference, stack: SliceStack, channels: Sequence[str], score: Score, box: Box | None
) -> Iterator[tuple[list[bool], Tensor]]:
    """Which channels each view shows, and what the method makes of it."""
    present = present_channels(stack.x)
    for shown in (present, *_parts(present, channels, score.parts)):
        for noised in _noised(inference.method, stack, present, score.passes):
            seen = noised if shown is present else noised * torch.tensor(shown)[:, None, None]
            for mirrored in (False, True) if score.flips else (False,):
                for scale in score.scales:
                    yield shown, _look(inference, seen, box, mirrored, scale)


def check_score(method: Method, score: Score, channels: Sequence[str]) -> None:
    """Raise `AnomriError` if there is no such score, or it asks for what a model of ``channels`` does not make."""
    if find(score.kind).needs_segmentation_head and not method.segmentation_head:
        raise AnomriError(
            f"the score {score.kind} needs a segmentation head, which the model does not have; train with the settings "
            f"anomalies and segmentation_head (preset quick or accurate)."
        )
    if score.passes and not hasattr(method, "with_noise"):
        raise AnomriError(
            f"{type(method).__name__} cannot reconstruct from noise; leave passes at 0."
        )
    if score.passes < 0 or score.erosion < 0 or not score.scales or min(score.scales) <= 0:
        raise AnomriError(
            f"passes and erosion are 0 or more, and scales above 0; found {score.passes}, {score.erosion} and {score.scales}."
        )
    unknown = {*score.channels, *(name for part in score.parts for name in part.split("+"))} - {
        *channels
    }
    if unknown:
        raise AnomriError(
            f"the score looks at {', '.join(sorted(unknown))}; the model's channels are {', '.join(channels)}."
        )
    if score.median_slices == 1 and score.median not in MEDIANS:
        raise AnomriError(
            f"a median filter of a slice can be {', '.join(map(str, MEDIANS))} wide, not {score.median}."
        )
    if score.parts and not method.takes_subsets:
        raise AnomriError(
            f"the score looks at {', '.join(score.parts)} alone too, but the model needs all of its channels; train it "
            f"with channel_dropout, or take parts out of the score's settings."
        )


def _parts(present: list[bool], channels: Sequence[str], parts: Sequence[str]) -> list[list[bool]]:
    """Which of the ``present`` channels each part shows; one that shows none, or all of them, is no view of its own."""
    shown = [
        [there and name in part.split("+") for name, there in zip(channels, present, strict=True)]
        for part in parts
    ]
    return [kept for kept in shown if any(kept) and kept != present]


def _noised(method: Any, stack: SliceStack, present: list[bool], passes: int) -> Iterator[Tensor]:
    if not passes:
        yield stack.x
        return
    generator = Generator().manual_seed(TEST_SEED)
    for _ in range(passes):
        # As in a training, noise is taken off the channels that are not there.
        yield (
            method.with_noise(stack.x, stack.foreground, generator)
            * torch.tensor(present)[:, None, None]
        )


def _look(inference: Inference, x: Tensor, box: Box | None, mirrored: bool, scale: float) -> Tensor:
    if scale == 1:
        return inference(x, box, mirrored)
    inside = cut_box(x, box)
    size, c = (inside.shape[2], inside.shape[3]), x.shape[1]
    coarse = rescale(inside, scale, inference.method.side_multiple)
    output = inference(coarse, mirrored=mirrored)
    # Subtracted while both are coarse: what is lost on the way there and back is no residual.
    output[:, :c] = coarse - output[:, :c]
    output = resize(output, size)
    output[:, :c] = inside - output[:, :c]
    return paste_box(output, (x.shape[2], x.shape[3]), box)
