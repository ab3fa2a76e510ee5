"""The scores by name: what each is, what it needs, and when a training may choose it.

A new score is a function from `scores.Evidence` to (n, h, w), and a line in `SCORES`. Neither torch
nor a function is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from anomri.errors import AnomriError

if TYPE_CHECKING:
    from torch import Tensor

    from anomri.scoring.scores import Evidence

DEFAULT_RATE = 0.01
"""Share of healthy voxels above the threshold: healthy tissue differs a little from its
reconstruction nearly everywhere."""
SPARING_RATE = 0.002
"""The same for scores by sign or probability: healthy tissue is seldom much brighter, and seldom
segmented.

Both had the best Dice on 23 cross-validated patients (docs/notes).
"""
AutoChannels = Literal["all", "each bright", "bright"]
"""Channels that ``auto`` tries a score on: all, FLAIR and T2 one by one, or FLAIR and T2
together."""


@dataclass(frozen=True)
class ScoreKind:
    """What the package has to know of a score before it computes one."""

    help: str
    place: str = ""
    """Module and name of its function; empty for ``own`` and ``auto``, which stand for others."""
    false_positive_rate: float = DEFAULT_RATE
    """Share of healthy voxels above its threshold, unless another is asked for or chosen."""
    auto: tuple[AutoChannels, ...] = ()
    """The channels on which ``auto`` tries it; empty: ``auto`` never chooses it."""
    needs_segmentation_head: bool = False
    needs_healthy_residual: bool = False
    """Whether it needs `Score.healthy_mean` and `Score.healthy_spread`."""
    needs_healthy_maps: bool = False
    """Whether it needs `Score.healthy_maps`: the same for each part of the brain."""
    without_flair: str = ""
    """The score that takes its place for a scan without FLAIR; empty: itself."""

    @property
    def needs_healthy_slices(self) -> bool:
        """Whether a training has to measure the residual of healthy tissue for it."""
        return self.needs_healthy_residual or self.needs_healthy_maps


_SCORES = "anomri.scoring.scores"
SCORES = {
    "own": ScoreKind("the method's own residual"),
    "auto": ScoreKind("chosen at the end of a training, on synthetic spheres in healthy slices"),
    "absolute": ScoreKind(
        "mean absolute residual, as in the paper", f"{_SCORES}:absolute", auto=("all",)
    ),
    "positive": ScoreKind(
        "how much brighter than reconstructed",
        f"{_SCORES}:positive",
        SPARING_RATE,
        auto=("all", "each bright", "bright"),
    ),
    "negative": ScoreKind("how much darker than reconstructed", f"{_SCORES}:negative"),
    "standardised": ScoreKind(
        "absolute residual in standard deviations of healthy tissue",
        f"{_SCORES}:standardised",
        auto=("all",),
        needs_healthy_residual=True,
    ),
    "standardised_by_position": ScoreKind(
        "the same, of healthy tissue in that part of the brain",
        f"{_SCORES}:standardised_by_position",
        needs_healthy_maps=True,
    ),
    "positive_by_position": ScoreKind(
        "how much brighter, in standard deviations of healthy tissue in that part of the brain",
        f"{_SCORES}:positive_by_position",
        SPARING_RATE,
        needs_healthy_maps=True,
    ),
    "ssim": ScoreKind("1 - structural similarity", f"{_SCORES}:ssim", auto=("all",)),
    "anomaly_probability": ScoreKind(
        "the segmentation head's probability",
        f"{_SCORES}:anomaly_probability",
        SPARING_RATE,
        needs_segmentation_head=True,
    ),
    # Neither the probability alone nor a residual by position alone is tried by ``auto``: each wins
    # on synthetic
    # spheres at times, but both together are better on tumours of patients not seen (docs/notes).
    "probability_with_residual": ScoreKind(
        "probability and positive residual together",
        f"{_SCORES}:probability_with_residual",
        SPARING_RATE,
        auto=("bright",),
        needs_segmentation_head=True,
        without_flair="anomaly_probability",
    ),
    "probability_with_residual_by_position": ScoreKind(
        "probability and positive residual by position together",
        f"{_SCORES}:probability_with_residual_by_position",
        SPARING_RATE,
        auto=("bright",),
        needs_segmentation_head=True,
        needs_healthy_maps=True,
        without_flair="anomaly_probability",
    ),
}


def names() -> list[str]:
    """Names of all scores."""
    return list(SCORES)


def find(name: str) -> ScoreKind:
    """The score of that name; raises `AnomriError` with those that there are."""
    if name not in SCORES:
        raise AnomriError(f"there is no score {name!r}; the scores are {', '.join(SCORES)}.")
    return SCORES[name]


@cache
def load(name: str) -> Callable[[Evidence], Tensor]:
    """The function of a score.

    Raises `AnomriError` if there is none of that name, or it only stands for another.
    """
    place = find(name).place
    if not place:
        raise AnomriError(f"the score {name!r} stands for another one; name that.")
    module, _, function = place.partition(":")
    found: Callable[[Evidence], Tensor] = getattr(import_module(module), function)
    return found
