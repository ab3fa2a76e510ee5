"""What a training may spend on choosing a score and thresholds: a tenth of its own time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from anomri.model.detector import Detector
from anomri.slices import SliceStack
from anomri.spec import ModelSpec
from anomri.training.packing import PackedCase, spread_healthy
from anomri.training.spheres import LARGE_SLAB_MM, SMALL_SLAB_MM, slab_slices

TENTH = 0.1
STEP_COST = 5.0
"""What a slice costs in a training step, in passes of the network: forward, backward, augmentation
and the optimiser. Measured: 5.4 for narrow networks, 3.6 for the published one (docs/notes), which
is trained for so long that little more than a hundredth is spent."""
ALWAYS = 256
"""So many slices of healthy scans are looked at, however short a training was."""
FEWEST_LARGE, FEWEST_SMALL = 12, 8
"""Slabs with spheres, likewise."""
Item = TypeVar("Item")


def affordable_passes(spec: ModelSpec) -> float:
    """How many passes of the network take a tenth of a training's time; infinite without one.

    They are counted, not timed: the same training ends with the same model on any machine.
    """
    if spec.training is None:
        return math.inf
    return TENTH * STEP_COST * spec.training.steps * spec.training.batch_size


class Passes:
    """Slices that go through a detector's network, and how many can be ``affordable``."""

    def __init__(
        self,
        detector: Detector,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        affordable: float = math.inf,
    ) -> None:
        self.detector = detector
        self.cost = detector.method.passes * (2.0 if detector.spec.score.flips else 1.0)
        """What a slice costs, in passes of the network."""
        self._affordable = affordable
        self._on_progress = on_progress
        self._done = self._total = 0

    @property
    def affordable_slices(self) -> float:
        """How many slices can be looked at."""
        return self._affordable / self.cost

    @property
    def left(self) -> float:
        """What can still be spent, in passes."""
        return self._affordable - self._done * self.cost

    def expect(self, slices: int) -> None:
        """Say how many slices there will be in all."""
        self._total = slices
        self._on_progress(0, slices)

    def finish(self) -> None:
        """Say that all is done: slabs with spheres may have had fewer slices than expected."""
        self._on_progress(self._total, self._total)

    def output(self, stack: SliceStack) -> Tensor:
        """`Detector.output`."""
        output = self.detector.output(stack)
        self._count(stack)
        return output

    def score(self, stack: SliceStack) -> NDArray[np.float32]:
        """The scores of `Detector.score`."""
        scores, _ = self.detector.score(stack)
        self._count(stack)
        return scores

    def _count(self, stack: SliceStack) -> None:
        self._done += len(stack.x)
        self._on_progress(self._done, max(self._total, self._done))


@dataclass(frozen=True)
class SlabCounts:
    """How many slabs with large and with small spheres go through the network."""

    large: int
    small: int

    def within(self, slices: float, large_slices: int, small_slices: int) -> SlabCounts:
        """As many as fit into ``slices``, in the same proportion; at least the fewest.

        >>> SlabCounts(60, 40).within(150, 3, 3)
        SlabCounts(large=30, small=20)
        """
        share = min(slices / (self.large * large_slices + self.small * small_slices), 1)
        return SlabCounts(
            max(int(self.large * share), min(FEWEST_LARGE, self.large)),
            max(int(self.small * share), min(FEWEST_SMALL, self.small)),
        )


def cases_within(
    cases: Sequence[PackedCase], most: int, slices: float, always: int = ALWAYS
) -> list[PackedCase]:
    """At most ``most`` cases with a healthy slice, evenly spread, of so many slices in all.

    There is at least one if any case has a healthy slice, and ``always`` so many slices.
    """
    chosen = spread_healthy(cases, most)
    while len(chosen) > 1 and sum(case.slices for case in chosen) > max(slices, always):
        chosen = spread_healthy(cases, len(chosen) - 1)
    return chosen


def slab_heights(cases: Sequence[PackedCase]) -> tuple[int, int]:
    """The most slices that slabs with large and with small spheres have."""
    spacing = min((case.spacing_mm[0] for case in cases), default=1.0)
    return slab_slices(LARGE_SLAB_MM, spacing), slab_slices(SMALL_SLAB_MM, spacing)


def every_nth(items: Sequence[Item], most: float) -> list[Item]:
    """At most ``most`` of the items, at least one, at even distances.

    >>> every_nth("abcdefg", 3)
    ['b', 'e']
    """
    stride = math.ceil(len(items) / max(most, 1))
    return list(items[stride // 2 :: max(stride, 1)])
