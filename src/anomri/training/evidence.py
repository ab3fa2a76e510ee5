"""What a network makes of healthy scans and of spheres in them: each slice goes through it once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from anomri.runtime.threads import worker_threads
from anomri.scoring.filters import anomaly_score
from anomri.scoring.scores import raw_score
from anomri.slices import SliceStack
from anomri.spec import ModelSpec, Score
from anomri.training.passes import Passes, SlabCounts
from anomri.training.spheres import (
    HealthyScans,
    ScoredSlabs,
    Scores,
    Slab,
    large_spheres,
    small_spheres,
    sphere_curve,
    steps_inside,
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Seen:
    """Slices, and what the method made of them: their scores need no network any more."""

    stacks: list[SliceStack]
    outputs: list[Tensor]
    raw: dict[tuple[str, tuple[str, ...]], list[Tensor]] = field(default_factory=dict)
    """Scores before filters, by kind and channels: many candidates differ in filters only."""

    @classmethod
    def look(cls, passes: Passes, stacks: Iterable[SliceStack]) -> Seen:
        """Send the slices through the network."""
        stacks = list(stacks)
        return cls(stacks, [passes.output(stack) for stack in stacks])

    def scores(self, spec: ModelSpec, score: Score) -> list[Scores]:
        """A score of the slices, (n, h, w) for each stack."""
        key = score.kind, score.channels
        numbers = range(len(self.stacks))

        def unfiltered(number: int) -> Tensor:
            stack = self.stacks[number]
            return raw_score(stack.x, self.outputs[number], spec.channels, score, stack.position)

        def filtered(number: int) -> Scores:
            stack = self.stacks[number]
            return anomaly_score(self.raw[key][number], stack.foreground, score, stack.spacing_mm)

        if key not in self.raw:
            self.raw[key] = _side_by_side(unfiltered, numbers)
        return _side_by_side(filtered, numbers)


@dataclass(frozen=True)
class Planted:
    """Slabs with spheres, and what the method made of them."""

    slabs: list[Slab]
    seen: Seen

    @classmethod
    def look(cls, passes: Passes, slabs: list[Slab]) -> Planted:
        """Send the slabs through the network."""
        return cls(slabs, Seen.look(passes, (slab.stack for slab in slabs)))

    def scored(self, spec: ModelSpec, score: Score) -> ScoredSlabs:
        """The slabs with a score."""
        return ScoredSlabs(self.slabs, self.seen.scores(spec, score))


@dataclass(frozen=True)
class Evidence:
    """Healthy scans, and slabs of them with large and with small spheres."""

    spec: ModelSpec
    healthy: Seen
    large: Planted
    small: Planted

    def average_precision(self, score: Score, planted: Planted, steps: int) -> float:
        """Average precision of a score over the foreground of a mean scan with spheres."""
        scored = planted.scored(self.spec, score)
        thresholds = steps_inside([scored], steps)
        return sphere_curve(scored, self.healthy_scans(score), thresholds).average_precision

    def healthy_scans(self, score: Score) -> HealthyScans:
        """A score of the healthy scans."""
        foreground = [stack.foreground.numpy() for stack in self.healthy.stacks]
        return HealthyScans(self.healthy.scores(self.spec, score), foreground)


def plant_slabs(
    scans: Sequence[SliceStack], channels: Sequence[str], counts: SlabCounts
) -> tuple[list[Slab], list[Slab]]:
    """Slabs with large and with small spheres in ``scans``, which have foreground."""
    if not scans:
        return [], []
    return (
        large_spheres(scans, channels, counts.large),
        small_spheres(scans, channels, counts.small),
    )


def _side_by_side(work: Callable[[int], Result], numbers: Sequence[int]) -> list[Result]:
    with worker_threads(torch.get_num_threads()) as pool:
        return list(pool.map(work, numbers))
