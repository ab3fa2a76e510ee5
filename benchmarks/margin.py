"""How much further one model's pooled AUPRC is than another's on the same patients, with a paired
bootstrap interval.

python benchmarks/margin.py ../shared/data/brats18 runs/accurate runs/thresholding [--split test]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import anomri
from anomri.scans.find import find_cases

STEPS, RESAMPLES = 4000, 2000


def counts_of(model: Path, cohort: Path, split: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """True and false positives (patients, thresholds) at falling thresholds, every pixel of every
    slice with brain."""
    detector, found = anomri.load(model), []
    for case in find_cases(cohort):
        if case.split == split and case.label is not None:
            detection = detector.detect(case)
            assert detection.stack.label is not None
            found.append((detection.scores.ravel(), detection.stack.label.numpy().ravel()))
    lesion = np.concatenate([scores[label] for scores, label in found])
    thresholds = np.unique(np.quantile(lesion, np.linspace(0, 1, STEPS)))
    rows = []
    for scores, label in found:
        for part in (scores[label], scores[~label]):
            rows.append(len(part) - np.searchsorted(np.sort(part), thresholds, side="left"))
    counts = np.array(rows)[:, ::-1]
    return counts[0::2], counts[1::2]


def average_precision(true: NDArray[np.int64], false: NDArray[np.int64], positives: int) -> float:
    """The area under the steps of precision over recall."""
    recall = true / positives
    precision = true / np.maximum(true + false, 1)
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def main() -> None:
    """Print both figures and their difference."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cohort", type=Path)
    parser.add_argument("models", type=Path, nargs=2)
    parser.add_argument("--split", default="test")
    arguments = parser.parse_args()
    both = [counts_of(model, arguments.cohort, arguments.split) for model in arguments.models]
    patients = len(both[0][0])
    draws = [
        np.arange(patients),
        *np.random.default_rng(0).integers(0, patients, (RESAMPLES, patients)),
    ]
    # The lowest threshold is the least lesion score, so all lesion voxels lie above it.
    figures = np.array(
        [
            [average_precision(t[d].sum(0), f[d].sum(0), int(t[d, -1].sum())) for t, f in both]
            for d in draws
        ]
    )
    margin = figures[:, 0] - figures[:, 1]
    low, high = np.quantile(margin[1:], [0.025, 0.975])
    print(f"AUPRC, pooled: {figures[0, 0]:.3f} and {figures[0, 1]:.3f}; {patients} patients")
    print(
        f"margin {margin[0]:.3f}, 95 % interval {low:.3f} to {high:.3f} ({RESAMPLES:,} resamples of patients)"
    )


if __name__ == "__main__":
    main()
