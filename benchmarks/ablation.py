"""What each choice of the preset `accurate` gives: each taken back, on test patients.

python benchmarks/ablation.py ../shared/data/brats18 runs/ablation --model runs/accurate      #
scores only: minutes python benchmarks/ablation.py ../shared/data/brats18 runs/ablation --train
[--steps 600]      # and training's choices python benchmarks/ablation.py ../shared/data/brats18
runs/folds --folds 3 --steps 1000        # without test patients

The last is for choosing: as many networks as folds, each scored on patients that it has not seen,
none of them for testing. It prints a Markdown table; trainings that are finished in the folder are
reused, and a stopped one goes on.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import anomri
from anomri.errors import AnomriError
from anomri.evaluation.pooling import Pool
from anomri.evaluation.scored import Scored
from anomri.methods.dae import DAE
from anomri.model.detector import Detector
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.volume import Volume
from anomri.scoring.filters import anomaly_score
from anomri.scoring.scores import BRIGHT, describe, raw_score
from anomri.slices import SliceStack, on_published_grid, slice_volume
from anomri.spec import Scaling, Score

SCORES: dict[str, dict[str, Any]] = {
    "the paper's score": asdict(Score("absolute")),
    "positive residual, all channels": asdict(Score("positive")),
    "positive residual, FLAIR and T2": asdict(Score("positive", BRIGHT)),
    "+ smoothed": asdict(Score("positive", BRIGHT, smoothing_mm=1.7)),
    "SSIM": asdict(Score("ssim")),
    "probability": asdict(Score("anomaly_probability", median=3, smoothing_mm=1.7)),
    "probability x positive residual": asdict(
        Score("probability_with_residual", BRIGHT, median=3, smoothing_mm=1.7)
    ),
    "probability x positive residual, as the chosen score otherwise": {
        "kind": "probability_with_residual"
    },
    "probability x residual by position": {"kind": "probability_with_residual_by_position"},
    "residual by position": {"kind": "positive_by_position"},
    "not smoothed": {"smoothing_mm": 0.0},
    "median of 3 x 3": {"median": 3},
    "median of 5 x 5": {"median": 5},
    "without erosion": {"erosion": 0},
    "without flips": {"flips": False},
}
"""What is changed of the score that the model chose."""
PARTS = (("flair",), ("t2",), ("t1",), ("flair", "t1"), ("flair", "t1", "t2"))
TRAININGS: dict[str, dict[str, Any]] = {
    "all choices": {},
    "no anomalies, no segmentation head": {
        "settings": {"anomalies": False, "segmentation_head": False}
    },
    "anomalies without a segmentation head": {"settings": {"segmentation_head": False}},
    "one noise (16, 0.25, every slice)": {
        "settings": {"noise_resolution": 16, "noise_std": 0.25, "noise_share": 1.0},
    },
    "no augmentation": {"settings": {"augmentation": {}}},
    "no channel dropout": {"settings": {"channel_dropout": 0.0}},
    "no channel seen alone more often": {"settings": {"alone": []}},
    "a network of twice the width": {"settings": {"widths": [32, 64, 128, 256]}},
    "no averaged weights": {"training": {"average": 0.0}},
    "the paper's scaling": {"scaling": Scaling()},
}


class Trial:
    """Scans read once, and reconstructed once for all scores that look at the same.

    ``groups`` are the cases of each model: one group for a table of one model, or one for each
    fold.
    """

    def __init__(self, groups: Sequence[Sequence[Case]]) -> None:
        self.groups = [[case for case in group if case.label] for group in groups]
        self._outputs: dict[Any, list[tuple[Volume, SliceStack, Tensor]]] = {}

    def row(self, name: str, detectors: Iterable[Detector]) -> None:
        """Print a row of the table: all groups pooled, or why the models cannot fill it."""
        try:
            cells = self._cells(detectors)
        except AnomriError as error:
            cells = [f"not possible: {error}", "", ""]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)

    def _cells(self, detectors: Iterable[Detector]) -> list[str]:
        with tempfile.TemporaryDirectory() as place:
            pool = Pool(Path(place))
            for cases, detector in zip(self.groups, detectors, strict=True):
                score = detector.spec.score
                for case, (volume, stack, output) in zip(
                    cases, self._seen(cases, detector), strict=True
                ):
                    raw = raw_score(stack.x, output, detector.spec.channels, score, stack.position)
                    scores = anomaly_score(raw, stack.foreground, score, stack.spacing_mm)
                    *found, voxel_mm3 = on_published_grid(scores, stack, volume, detector.spec.grid)
                    dropped = score.max_dropped(stack.spacing_mm, voxel_mm3)
                    pool.add(Scored(case.name, *found, dropped, patient=case.patient))
            figures = {figure.name: str(figure) for figure in pool.evaluate({}, None).figures}
        names = ("AUPRC, pooled", "ceil-Dice, pooled", "AUPRC, mean of patients")
        return [figures[one] for one in names]

    def _seen(
        self, cases: Sequence[Case], detector: Detector
    ) -> list[tuple[Volume, SliceStack, Tensor]]:
        score = detector.spec.score
        key = detector.method, detector.channels, score.flips
        if key not in self._outputs:
            if len(self._outputs) >= 2 * len(self.groups):
                self._outputs.clear()
            seen = self._outputs[key] = []
            for volume in map(detector.read, cases):
                stack = slice_volume(volume, detector.spec.grid, detector.spec.scaling)
                seen.append((volume, stack, detector.output(stack)))
        return self._outputs[key]


def make_folds(cases: Sequence[Case], folds: int) -> list[list[Case]]:
    """The cohort ``folds`` times without its test patients.

    Every case is once ``test``; two of the others are ``val``.
    """
    usable = sorted(
        (case for case in cases if case.split in ("train", "val")), key=lambda case: case.name
    )
    found = []
    for fold in range(folds):
        others = [case for number, case in enumerate(usable) if number % folds != fold]
        val = others[len(others) // 4 :: len(others) // 2][:2]
        splits = [replace(case, split="val" if case in val else "train") for case in others]
        found.append([*splits, *(replace(case, split="test") for case in usable[fold::folds])])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cohort", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="A trained model to try all scores on.")
    parser.add_argument(
        "--train", action="store_true", help="Also take back each choice of the training."
    )
    parser.add_argument("--steps", type=int, help="Instead of the preset's.")
    parser.add_argument("--split", default="test", help="val to choose by; test for the table.")
    parser.add_argument("--only", nargs="*", help="Rows to print, by the beginning of their name.")
    parser.add_argument(
        "--folds", type=int, help="Train so many networks without test patients instead."
    )
    parser.add_argument("--preset", default="accurate", help="Of the folds.")
    arguments = parser.parse_args()
    if arguments.folds and (arguments.model or arguments.train):
        parser.error(
            "--folds trains networks of its own, on other patients; give it without --model and "
            "--train."
        )
    wanted = tuple(arguments.only or ("",))
    steps = {"steps": arguments.steps} if arguments.steps else {}
    cases = find_cases(arguments.cohort)
    groups, detectors = [[case for case in cases if case.split == arguments.split]], []
    if arguments.model:
        detectors = [anomri.load(arguments.model)]
    if arguments.folds:
        splits = make_folds(cases, arguments.folds)
        groups = [[case for case in split if case.split == "test"] for split in splits]
        detectors = [
            anomri.train(
                split,
                arguments.out / f"fold{fold}",
                preset=arguments.preset,
                training=steps,
                resume=True,
            )
            for fold, split in enumerate(splits)
        ]
    trial = Trial(groups)
    print(
        "| | AUPRC, pooled | ceil-Dice, pooled | AUPRC, mean of patients |\n|---|---|---|---|",
        flush=True,
    )
    if detectors:
        chosen = "; ".join(dict.fromkeys(describe(detector.spec.score) for detector in detectors))
        trial.row(f"**as trained**: {chosen}", detectors)
        for name, score in SCORES.items():
            if name.startswith(wanted):
                trial.row(name, (detector.with_score(**score) for detector in detectors))
        for part in PARTS:
            if (name := f"only {', '.join(part)}").startswith(wanted):
                trial.row(name, (detector.with_channels(part) for detector in detectors))
    if arguments.train:
        base = DAE.PRESETS["accurate"]
        for name, change in TRAININGS.items():
            if not name.startswith(wanted):
                continue
            DAE.PRESETS["ablation"] = replace(base, scaling=change.get("scaling", base.scaling))
            folder = arguments.out / "".join(letter if letter.isalnum() else "-" for letter in name)
            model = anomri.train(
                arguments.cohort,
                folder,
                preset="ablation",
                settings=change.get("settings"),
                training={**steps, **change.get("training", {})},
                score=change.get("score"),
                grid=change.get("grid"),
                resume=True,
            )
            trial.row(f"trained with {name}: {describe(model.spec.score)}", [model])


if __name__ == "__main__":
    main()
