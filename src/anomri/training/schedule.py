"""What a training does at a step, by its settings and its seed alone: learning rate and slices."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from anomri.spec import Training


def learning_rate(training: Training, step: int) -> float:
    """The learning rate of a step (from 0), by the training's schedule."""
    highest = training.learning_rate * min(1.0, (step + 1) / max(training.warmup, 1))
    if training.schedule == "constant":
        return highest
    phase = (step // 32) / 100 if training.schedule == "published" else step / training.steps
    return highest * 0.5 * (1 + math.cos(math.pi * phase))


def batch_numbers(slices: int, training: Training, step: int) -> list[int]:
    """Numbers of the slices of a step's batch: one random permutation after another."""
    places = range(step * training.batch_size, (step + 1) * training.batch_size)
    return [
        int(_permutation(slices, training.seed, place // slices)[place % slices])
        for place in places
    ]


@lru_cache(maxsize=2)
def _permutation(slices: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(slices)
