"""Scores of many cases, pooled exactly in bounded memory, and the figures that come of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.files import output_folder, whole_file, write_text
from anomri.runs.tables import write_tsv
from anomri.scans.boxes import box_around
from anomri.scoring.metrics import (
    Counts,
    Curve,
    Figure,
    LesionCounts,
    Scores,
    bootstrap_weights,
    count_at,
    count_lesions,
    curve_from_counts,
    dice,
    drop_small_components,
    lesion_thresholds,
    mean_interval,
    percentile_interval,
    precision_recall_from_sorted,
)

BOOTSTRAP_STEPS = 2048
CURVE_POINTS = 512


@dataclass(frozen=True)
class PatientScores:
    """One scan's row; Dice and lesions are those at the label-free threshold, with and without the filter."""

    case: str
    patient: str
    lesion_voxels: int
    average_precision: float
    ceil_dice: float
    dice: float | None = None
    lesions: LesionCounts | None = None
    dice_unfiltered: float | None = None
    lesions_unfiltered: LesionCounts | None = None

    def row(self) -> dict[str, object]:
        """The same as flat columns, empty where there is no threshold."""
        row: dict[str, object] = {}
        for name, value in asdict(self).items():
            if name.startswith("lesions"):
                ending = name.removeprefix("lesions")
                counts = value or dict.fromkeys(("lesions", "detected", "false_positives"), "")
                row |= {column + ending: count for column, count in counts.items()}
            else:
                known = value is not None and value == value  # neither missing nor NaN
                row[name] = (
                    "" if not known else f"{value:.6f}" if isinstance(value, float) else value
                )
        return row


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`: what was compared (``protocol``), the table, a row per scan, and the curve.

    ``curve`` holds (threshold, recall, precision, Dice) of the masks above up to 512 thresholds, for plots; the figures
    come from all thresholds. ``failed`` names the cases that could not be used and why.
    """

    protocol: dict[str, str]
    figures: tuple[Figure, ...]
    patients: tuple[PatientScores, ...]
    curve: tuple[tuple[float, float, float, float], ...]
    threshold: float | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """The value of the figure ``name``; raises ``KeyError`` naming those there are."""
        values = {figure.name: figure.value for figure in self.figures}
        if name not in values:
            raise KeyError(f"there is no figure {name!r}; there are {', '.join(values)}")
        return values[name]

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Evaluation:
        """What ``asdict`` made of an evaluation, from JSON."""

        def patient(row: Mapping[str, Any]) -> PatientScores:
            counts = {
                name: row[name] and LesionCounts(**row[name])
                for name in ("lesions", "lesions_unfiltered")
            }
            return PatientScores(**{**row, **counts})

        return cls(
            facts["protocol"],
            tuple(Figure(**figure) for figure in facts["figures"]),
            tuple(patient(row) for row in facts["patients"]),
            tuple(tuple(point) for point in facts["curve"]),
            facts["threshold"],
            facts["failed"],
        )

    def save(self, folder: str | Path) -> None:
        """Write ``metrics.json``, ``patients.tsv`` and ``curve.tsv``."""
        folder = output_folder(Path(folder))
        rows = [patient.row() for patient in self.patients]
        write_tsv(folder / "patients.tsv", list(rows[0]), [list(row.values()) for row in rows])
        write_tsv(folder / "curve.tsv", ("threshold", "recall", "precision", "dice"), self.curve)
        facts = {
            "protocol": self.protocol,
            "figures": [asdict(figure) for figure in self.figures],
            "threshold": self.threshold,
            "failed": self.failed,
        }
        write_text(folder / "metrics.json", json.dumps(facts, indent=2) + "\n")


@dataclass
class Scored:
    """Scores and labels of one case, of the same three axes, or the error that kept it from having them.

    ``threshold`` is the score that makes its mask, if there is one; ``patient`` says whose scan it is, by default one of
    its own.
    """

    case: str
    scores: Scores | None = None
    label: NDArray[np.bool_] | None = None
    max_dropped: int = 0
    error: str | None = None
    threshold: float | None = None
    patient: str | None = None
    notes: Sequence[str] = ()
    """What should be known of its label."""
    lesions: int = 0
    """How many its label has as it was drawn, where it was brought to another grid for this; ``lost`` are not there any more."""
    lost: int = 0


def spool(folder: Path, scored: Scored) -> dict[str, Any]:
    """Write the scores and label of a case, less the margin where all is zero, to ``folder``; returns what `Pool` needs."""
    facts = {
        name: getattr(scored, name)
        for name in ("case", "max_dropped", "error", "threshold", "notes", "lesions", "lost")
    }
    facts["patient"] = scored.patient or scored.case
    if scored.scores is None or scored.label is None:
        return {**facts, "error": scored.error or "no label"}
    inside = box_around((scored.scores != 0) | scored.label)
    box = np.array([(side.start, side.stop) for side in inside])
    with whole_file(folder / f"{scored.case}.npz") as partial, partial.open("wb") as file:
        np.savez(
            file,
            scores=scored.scores[inside],
            label=scored.label[inside],
            box=box,
            shape=scored.scores.shape,
        )
    return facts


class Pool:
    """Scores of many cases, spooled to disk; lesion voxels' scores alone stay in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: list[dict[str, Any]] = []
        """What `spool` gave of each."""
        self.failed: dict[str, str] = {}
        self.voxels = 0
        self._lesion_scores: list[Scores] = []

    def add(self, scored: Scored) -> None:
        """Spool one case and let it count."""
        self.count(spool(self.folder, scored))

    def count(self, facts: Mapping[str, Any]) -> None:
        """Let a case count of which `spool` gave the ``facts``."""
        if facts["error"]:
            self.failed[facts["case"]] = facts["error"]
            return
        with np.load(self.folder / f"{facts['case']}.npz") as spooled:
            self._lesion_scores.append(spooled["scores"][spooled["label"]])
            self.voxels += int(np.prod(spooled["shape"]))
        self.cases.append(dict(facts))

    @property
    def patients(self) -> list[str]:
        """Whose scans they are, each named once."""
        return list(dict.fromkeys(case["patient"] for case in self.cases))

    def evaluate(self, protocol: dict[str, str], threshold: float | None) -> Evaluation:
        """All figures, from two more readings of the spool; ``threshold`` is that of most cases, for a plot."""
        thresholds, _ = lesion_thresholds(self._lesion_scores)
        if not thresholds.size:
            raise AnomriError(
                f"none of the {len(self.cases)} cases has a labelled lesion; there is nothing to find."
            )
        lesion, healthy = np.zeros(len(thresholds), np.int64), np.zeros(len(thresholds), np.int64)
        steps = _coarse_steps(self._lesion_scores)
        names = self.patients
        counted = np.zeros((2, len(names), len(steps)))
        patients = []
        for case, (scores, label) in zip(self.cases, self._read(), strict=True):
            rising = np.sort(scores[label]), np.sort(scores[~label])
            lesion += count_at(rising[0], thresholds)
            healthy += count_at(rising[1], thresholds)
            counted[:, names.index(case["patient"])] += [count_at(one, steps) for one in rising]
            curve = precision_recall_from_sorted(*rising)
            found = (curve.positives, curve.average_precision, curve.ceil_dice)
            row = PatientScores(case["case"], case["patient"], *found)
            its = case["threshold"]
            patients.append(
                row if its is None else _at_threshold(row, case["max_dropped"], scores, label, its)
            )
        curve = curve_from_counts(
            thresholds, lesion, healthy, int(lesion.sum()), self.voxels - int(lesion.sum())
        )

        ceil_filtered = np.zeros(2, np.int64)
        for case, (scores, label) in zip(self.cases, self._read(), strict=True):
            mask = drop_small_components(scores >= curve.best_threshold, case["max_dropped"])
            ceil_filtered += _overlap(mask, label)
        figures = _figures(
            curve, counted, 2 * ceil_filtered[0] / max(ceil_filtered[1], 1), patients
        )
        return Evaluation(
            protocol, figures, tuple(patients), _thinned(curve), threshold, self.failed
        )

    def _read(self) -> Iterator[tuple[Scores, NDArray[np.bool_]]]:
        for case in self.cases:
            with np.load(self.folder / f"{case['case']}.npz") as spooled:
                inside = tuple(slice(*side) for side in spooled["box"])
                scores = np.zeros(spooled["shape"], dtype=spooled["scores"].dtype)
                label = np.zeros(spooled["shape"], dtype=bool)
                scores[inside], label[inside] = spooled["scores"], spooled["label"]
            yield scores, label


def _at_threshold(
    patient: PatientScores, dropped: int, scores: Scores, label: NDArray[np.bool_], threshold: float
) -> PatientScores:
    mask = scores > threshold
    filtered = drop_small_components(mask, dropped)
    # Of a scan without a lesion it says nothing: what is found there are false positive components.
    of_mask, of_filtered = (
        dice(one, label) if label.any() else math.nan for one in (mask, filtered)
    )
    return replace(
        patient,
        dice=of_filtered,
        dice_unfiltered=of_mask,
        lesions=count_lesions(filtered, label),
        lesions_unfiltered=count_lesions(mask, label),
    )


def _figures(
    curve: Curve, counted: NDArray[np.float64], ceil_filtered: float, rows: Sequence[PatientScores]
) -> tuple[Figure, ...]:
    intervals: list[tuple[float, float] | tuple[()]] = [(), ()]
    if counted.shape[1] > 1:  # one patient says nothing of others
        intervals = [percentile_interval(values) for values in _resampled(*counted)]
    figures = [
        Figure("AUPRC, pooled", curve.average_precision, *intervals[0]),
        Figure("ceil-Dice, pooled", curve.ceil_dice, *intervals[1]),
        Figure("ceil-Dice, pooled, components filtered", float(ceil_filtered)),
        _mean("AUPRC, mean of patients", rows, [row.average_precision for row in rows]),
        _mean("ceil-Dice, mean of patients", rows, [row.ceil_dice for row in rows]),
    ]
    rows = [row for row in rows if row.dice is not None]
    if rows:
        for suffix, column in (
            ("components filtered", "lesions"),
            ("unfiltered", "lesions_unfiltered"),
        ):
            dices = [getattr(row, column.replace("lesions", "dice")) for row in rows]
            counts = [getattr(row, column) for row in rows]
            found = [c.detected / c.lesions if c.lesions else float("nan") for c in counts]
            figures += [
                _mean(f"Dice at the threshold, {suffix}, mean of patients", rows, dices),
                _mean(f"lesion-wise sensitivity, {suffix}, mean of patients", rows, found),
                _mean(
                    f"false positive components per scan, {suffix}",
                    rows,
                    [c.false_positives for c in counts],
                ),
            ]
    return tuple(figures)


def _resampled(
    lesion: NDArray[np.float64], healthy: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pooled average precision and ceil-Dice of every bootstrap resample, from counts (patients, rising thresholds)."""
    weights = bootstrap_weights(len(lesion))
    true = np.cumsum((weights @ lesion)[:, ::-1], axis=1)
    found = np.cumsum((weights @ (lesion + healthy))[:, ::-1], axis=1)
    positives = true[:, -1:]
    precision = (np.diff(true, prepend=0.0, axis=1) * true / np.maximum(found, 1)).sum(axis=1)
    best_dice = (2 * true / np.maximum(found + positives, 1)).max(axis=1)
    # Of patients without a lesion alone there is neither.
    precision, best_dice = (
        np.where(positives[:, 0] > 0, values, np.nan)
        for values in (precision / positives[:, 0].clip(1), best_dice)
    )
    return precision, best_dice


def _mean(name: str, rows: Sequence[PatientScores], values: Sequence[float]) -> Figure:
    """The mean over patients of the mean over their scans."""
    of_patient: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        # A scan without a lesion has no average precision and no lesion to find.
        if np.isfinite(value):
            of_patient.setdefault(row.patient, []).append(value)
    known = [float(np.mean(some)) for some in of_patient.values()]
    return Figure(name, float(np.mean(known)), *(mean_interval(known) if len(known) > 1 else ()))


def _coarse_steps(lesion_scores: Sequence[Scores]) -> Scores:
    # Equal shares of lesion voxels between thresholds: the bootstrap's curves are exact at these recalls.
    pooled = np.sort(np.concatenate(lesion_scores))
    return np.unique(
        pooled[np.linspace(0, len(pooled) - 1, min(BOOTSTRAP_STEPS, len(pooled))).astype(int)]
    )


def _thinned(curve: Curve) -> tuple[tuple[float, float, float, float], ...]:
    # Even in recall; the best threshold is among them.
    chosen = np.searchsorted(curve.recall, np.linspace(0, 1, CURVE_POINTS)).clip(
        max=len(curve.recall) - 1
    )
    chosen = np.unique([*chosen, int(np.argmax(curve.dice))])
    # A mask is what lies above its threshold, and these are scores that still belong to it.
    below = np.nextafter(curve.thresholds, -np.inf, dtype=curve.thresholds.dtype)
    columns = (below, curve.recall, curve.precision, curve.dice)
    return tuple(zip(*(column[chosen].astype(float).tolist() for column in columns), strict=True))


def _overlap(mask: NDArray[np.bool_], label: NDArray[np.bool_]) -> Counts:
    return np.array([(mask & label).sum(), mask.sum() + label.sum()], dtype=np.int64)
