"""Thresholds without labels: scores that healthy tissue of patients not trained on rarely exceeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from anomri.detector import Detector
from anomri.packing import PackedCase
from anomri.slices import SliceStack, Window, foreground_of
from anomri.spec import Thresholds

FALSE_POSITIVE_RATES = (0.05, 0.01, 0.005, 0.001)
DEFAULT_RATE = 0.01
MAX_CASES = 64
"""More held-out cases than this do not move the quantiles; their scores are held in memory at once."""


def healthy_thresholds(
    detector: Detector, held_out: Sequence[PackedCase], progress: Callable[[int, int], None] = lambda done, total: None
) -> Thresholds | None:
    """Quantiles of the scores of healthy slices' foreground voxels, pooled over ``held_out`` cases.

    ``None`` if they have no healthy slice. ``progress`` is told how many cases are done, and of how many.
    """
    usable = [case for case in held_out if case.healthy]
    usable = [usable[k] for k in np.linspace(0, len(usable) - 1, min(len(usable), MAX_CASES)).astype(int)]
    if not usable:
        return None
    pooled = []
    for done, case in enumerate(usable):
        progress(done, len(usable))
        # A method may look at a scan as a whole, so all of it is scored and only the healthy slices are counted.
        x = torch.from_numpy(case.memory_map.astype(np.float32))
        stack = SliceStack(
            x, foreground_of(x, detector.spec.scaling), range(len(x)), (), None, Window(0, 0, *x.shape[2:])
        )
        scores, _ = detector.score(stack)
        healthy = list(case.healthy)
        pooled.append(scores[healthy][stack.foreground.numpy()[healthy]])
    quantiles = np.quantile(np.concatenate(pooled), [1 - rate for rate in FALSE_POSITIVE_RATES])
    return Thresholds(
        false_positive_rate=FALSE_POSITIVE_RATES,
        value=tuple(float(value) for value in quantiles),
        chosen=DEFAULT_RATE,
        healthy_slices=sum(len(case.healthy) for case in usable),
        healthy_cases=len(usable),
    )
