"""Scores of many cases, pooled exactly in bounded memory, and the figures of the pool."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.evaluation.result import Evaluation, PatientScores
from anomri.evaluation.scored import Scored
from anomri.files import whole_file
from anomri.scans.boxes import box_around
from anomri.scoring.metrics import (
    Counts,
    Curve,
    Figure,
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
"""Thresholds at which the bootstrap counts each patient's voxels."""
CURVE_POINTS = 512
"""Points of the stored curve, at most."""


def spool(folder: Path, scored: Scored) -> dict[str, Any]:
    """Write a case's scores and label to ``folder``, cut to where they are not zero.

    Returns what `Pool` needs to know of the case, as plain numbers and strings; ``files`` are
    relative to the folder's parent.
    """
    facts: dict[str, Any] = {
        "case": scored.case,
        "patient": scored.patient or scored.case,
        "error": scored.error,
        "threshold": scored.threshold,
        "max_dropped": scored.max_dropped,
        "notes": scored.notes,
        "scan_notes": scored.scan_notes,
        "lesions": scored.lesions,
        "lost": scored.lost,
    }
    if scored.scores is None or scored.label is None:
        return {**facts, "error": scored.error or "no label"}
    not_zero = (scored.scores != 0) | scored.label
    ignored: dict[str, Any] = {}
    if scored.ignored is not None:
        not_zero |= scored.ignored
    inside = box_around(not_zero)
    if scored.ignored is not None:
        ignored["ignored"] = scored.ignored[inside]
    path = folder / f"{scored.case}.npz"
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            scores=scored.scores[inside],
            label=scored.label[inside],
            box=np.array([(side.start, side.stop) for side in inside]),
            shape=scored.scores.shape,
            **ignored,
        )
    return {**facts, "files": [f"{folder.name}/{path.name}"]}


@dataclass(frozen=True)
class _Spooled:
    """What `spool` wrote of a case, in the whole field."""

    scores: Scores
    label: NDArray[np.bool_]
    ignored: NDArray[np.bool_] | None

    @property
    def healthy(self) -> NDArray[np.bool_]:
        """Where the label says that there is no lesion."""
        return self.assessed(~self.label)

    def assessed(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The voxels of a mask that count."""
        return mask if self.ignored is None else mask & ~self.ignored


class Pool:
    """Scores of many cases: on disk, but for the scores of lesion voxels, which stay in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases: list[dict[str, Any]] = []
        """What `spool` gave for each case that did not fail."""
        self.failed: dict[str, str] = {}
        self.voxels = 0
        self._lesion_scores: list[Scores] = []

    def add(self, scored: Scored) -> None:
        """Spool one case and count it."""
        self.count(spool(self.folder, scored))

    def count(self, facts: Mapping[str, Any]) -> None:
        """Count a case that `spool` wrote; ``facts`` are what it returned."""
        if facts["error"]:
            self.failed[facts["case"]] = facts["error"]
            return
        with np.load(self.folder / f"{facts['case']}.npz") as spooled:
            self._lesion_scores.append(spooled["scores"][spooled["label"]])
            self.voxels += int(np.prod(spooled["shape"]))
            if "ignored" in spooled:
                self.voxels -= int(np.count_nonzero(spooled["ignored"]))
        self.cases.append(dict(facts))

    @property
    def patients(self) -> list[str]:
        """The patients of the cases, each named once."""
        return list(dict.fromkeys(case["patient"] for case in self.cases))

    def evaluate(self, protocol: dict[str, str], threshold: float | None) -> Evaluation:
        """All figures, from two more readings of the spool; ``threshold`` is that of most cases,
        for a plot.

        Raises `AnomriError` if no case has a lesion.
        """
        thresholds, _ = lesion_thresholds(self._lesion_scores)
        if not thresholds.size:
            raise AnomriError(
                f"none of the {len(self.cases)} cases has a labelled lesion; there is nothing to find."
            )
        lesion, healthy = np.zeros(len(thresholds), np.int64), np.zeros(len(thresholds), np.int64)
        steps = _bootstrap_steps(self._lesion_scores)
        patients = self.patients
        # (lesion or healthy, patients, steps): voxels at or above each step
        counts = np.zeros((2, len(patients), len(steps)))
        rows = []
        for case, spooled in zip(self.cases, self._read(), strict=True):
            scores, label = spooled.scores, spooled.label
            rising_lesion, rising_healthy = np.sort(scores[label]), np.sort(scores[spooled.healthy])
            lesion += count_at(rising_lesion, thresholds)
            healthy += count_at(rising_healthy, thresholds)
            patient = patients.index(case["patient"])
            counts[0, patient] += count_at(rising_lesion, steps)
            counts[1, patient] += count_at(rising_healthy, steps)
            curve = precision_recall_from_sorted(rising_lesion, rising_healthy)
            row = PatientScores(
                case["case"],
                case["patient"],
                lesion_voxels=curve.positives,
                average_precision=curve.average_precision,
                ceil_dice=curve.ceil_dice,
            )
            rows.append(_at_threshold(row, case, spooled))
        curve = curve_from_counts(thresholds, lesion, healthy, int(lesion.sum()))
        figures = _figures(curve, counts, self._filtered_ceil_dice(curve), rows)
        return Evaluation(protocol, figures, tuple(rows), _thinned(curve), threshold, self.failed)

    def _filtered_ceil_dice(self, curve: Curve) -> float:
        """Pooled Dice at the curve's best threshold, small components dropped."""
        overlap = np.zeros(2, np.int64)
        for case, spooled in zip(self.cases, self._read(), strict=True):
            above = spooled.scores >= curve.best_threshold
            mask = spooled.assessed(drop_small_components(above, case["max_dropped"]))
            overlap += _overlap(mask, spooled.label)
        return float(2 * overlap[0] / max(overlap[1], 1))

    def _read(self) -> Iterator[_Spooled]:
        for case in self.cases:
            with np.load(self.folder / f"{case['case']}.npz") as spooled:
                inside = tuple(slice(*side) for side in spooled["box"])
                scores = np.zeros(spooled["shape"], dtype=spooled["scores"].dtype)
                label = np.zeros(spooled["shape"], dtype=bool)
                scores[inside], label[inside] = spooled["scores"], spooled["label"]
                ignored: NDArray[np.bool_] | None = None
                if "ignored" in spooled:
                    ignored = np.zeros(spooled["shape"], dtype=bool)
                    ignored[inside] = spooled["ignored"]
            yield _Spooled(scores, label, ignored)


def _at_threshold(row: PatientScores, case: Mapping[str, Any], spooled: _Spooled) -> PatientScores:
    """The row with Dice and lesions of the mask at the case's threshold, if there is one."""
    if case["threshold"] is None:
        return row
    label = spooled.label
    mask = spooled.scores > case["threshold"]
    filtered = drop_small_components(mask, case["max_dropped"])
    # Where there is no lesion, Dice says nothing: what is found there are false positive
    # components.
    has_lesion = bool(label.any())
    return replace(
        row,
        dice=dice(spooled.assessed(filtered), label) if has_lesion else math.nan,
        dice_unfiltered=dice(spooled.assessed(mask), label) if has_lesion else math.nan,
        lesions=count_lesions(filtered, label, spooled.ignored),
        lesions_unfiltered=count_lesions(mask, label, spooled.ignored),
    )


def _figures(
    curve: Curve,
    counts: NDArray[np.float64],
    filtered_ceil_dice: float,
    rows: Sequence[PatientScores],
) -> tuple[Figure, ...]:
    lesion, healthy = counts
    precision_interval: tuple[float, float] | tuple[()] = ()
    dice_interval: tuple[float, float] | tuple[()] = ()
    if len(lesion) > 1:  # one patient says nothing of others
        precisions, dices = _resampled(lesion, healthy)
        precision_interval = percentile_interval(precisions)
        dice_interval = percentile_interval(dices)
    figures = [
        Figure("AUPRC, pooled", curve.average_precision, *precision_interval),
        Figure("ceil-Dice, pooled", curve.ceil_dice, *dice_interval),
        Figure("ceil-Dice, pooled, components filtered", filtered_ceil_dice),
        _mean("AUPRC, mean of patients", rows, [row.average_precision for row in rows]),
        _mean("ceil-Dice, mean of patients", rows, [row.ceil_dice for row in rows]),
    ]
    rows = [row for row in rows if row.dice is not None]
    if rows:
        figures += _figures_at_threshold(rows, "components filtered", "dice", "lesions")
        figures += _figures_at_threshold(
            rows, "unfiltered", "dice_unfiltered", "lesions_unfiltered"
        )
    return tuple(figures)


def _figures_at_threshold(
    rows: Sequence[PatientScores], suffix: str, dice_field: str, lesions_field: str
) -> list[Figure]:
    dices = [getattr(row, dice_field) for row in rows]
    counts = [getattr(row, lesions_field) for row in rows]
    detected = [one.detected / one.lesions if one.lesions else math.nan for one in counts]
    false_positives = [one.false_positives for one in counts]
    return [
        _mean(f"Dice at the threshold, {suffix}, mean of patients", rows, dices),
        _mean(f"lesion-wise sensitivity, {suffix}, mean of patients", rows, detected),
        _mean(f"false positive components per scan, {suffix}", rows, false_positives),
    ]


def _resampled(
    lesion: NDArray[np.float64], healthy: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pooled average precision and ceil-Dice of every bootstrap resample of patients.

    ``lesion`` and ``healthy`` count voxels, (patients, rising thresholds).
    """
    weights = bootstrap_weights(len(lesion))
    true = np.cumsum((weights @ lesion)[:, ::-1], axis=1)
    found = np.cumsum((weights @ (lesion + healthy))[:, ::-1], axis=1)
    positives = true[:, -1:]
    precision = (np.diff(true, prepend=0.0, axis=1) * true / np.maximum(found, 1)).sum(axis=1)
    precision = precision / positives[:, 0].clip(1)
    best_dice = (2 * true / np.maximum(found + positives, 1)).max(axis=1)
    # A resample of patients without a lesion has neither.
    has_lesion = positives[:, 0] > 0
    return np.where(has_lesion, precision, np.nan), np.where(has_lesion, best_dice, np.nan)


def _mean(name: str, rows: Sequence[PatientScores], values: Sequence[float]) -> Figure:
    """The mean over patients of the mean over their scans."""
    by_patient: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        # A scan without a lesion has no average precision and no lesion to find.
        if np.isfinite(value):
            by_patient.setdefault(row.patient, []).append(value)
    means = [float(np.mean(of_patient)) for of_patient in by_patient.values()]
    interval = mean_interval(means) if len(means) > 1 else ()
    return Figure(name, float(np.mean(means)), *interval)


def _bootstrap_steps(lesion_scores: Sequence[Scores]) -> Scores:
    # Equal shares of lesion voxels between thresholds: the bootstrap's curves are exact at these
    # recalls.
    pooled = np.sort(np.concatenate(lesion_scores))
    places = np.linspace(0, len(pooled) - 1, min(BOOTSTRAP_STEPS, len(pooled)))
    return np.unique(pooled[places.astype(int)])


def _thinned(curve: Curve) -> tuple[tuple[float, float, float, float], ...]:
    """Points of the curve, even in recall, the best threshold among them."""
    chosen = np.searchsorted(curve.recall, np.linspace(0, 1, CURVE_POINTS))
    chosen = chosen.clip(max=len(curve.recall) - 1)
    chosen = np.unique([*chosen, int(np.argmax(curve.dice))])
    # A mask is what lies above its threshold, and these are scores that still belong to it.
    below = np.nextafter(curve.thresholds, -np.inf, dtype=curve.thresholds.dtype)
    columns = (below, curve.recall, curve.precision, curve.dice)
    return tuple(zip(*(column[chosen].astype(float).tolist() for column in columns), strict=True))


def _overlap(mask: NDArray[np.bool_], label: NDArray[np.bool_]) -> Counts:
    """Voxels in both, and the sum of the voxels of each: Dice is twice their ratio."""
    return np.array([(mask & label).sum(), mask.sum() + label.sum()], dtype=np.int64)
