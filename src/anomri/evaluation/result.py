"""The result of an evaluation, and its files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anomri.files import output_folder, write_text
from anomri.runs.tables import write_tsv
from anomri.scoring.metrics import Figure, LesionCounts

LESION_COUNTS = ("lesions", "lesions_unfiltered")
"""Fields of `PatientScores` that count lesions."""


@dataclass(frozen=True)
class PatientScores:
    """The scores of one scan, with and without the filter of small components.

    Dice and lesion counts are those at the label-free threshold.
    """

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
        """The same as flat columns; a value that is missing or not a number is an empty text."""
        row: dict[str, object] = {}
        for name, value in asdict(self).items():
            if name in LESION_COUNTS:
                ending = name.removeprefix("lesions")
                counts = value or dict.fromkeys(("lesions", "detected", "false_positives"), "")
                row |= {column + ending: count for column, count in counts.items()}
            elif isinstance(value, float):
                row[name] = "" if math.isnan(value) else f"{value:.6f}"
            else:
                row[name] = "" if value is None else value
        return row

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> PatientScores:
        """What ``asdict`` gave, from JSON."""
        counts = {name: facts[name] and LesionCounts(**facts[name]) for name in LESION_COUNTS}
        return cls(**{**facts, **counts})


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    ``protocol`` says what was compared and how; ``figures`` are pooled and means of patients;
    ``patients`` holds a row per scan.

    ``curve`` holds (threshold, recall, precision, Dice) of the masks above up to 512 thresholds,
    for plots; the figures come from all thresholds. ``failed`` names the cases that could not be
    used and why.
    """

    protocol: dict[str, str]
    figures: tuple[Figure, ...]
    patients: tuple[PatientScores, ...]
    curve: tuple[tuple[float, float, float, float], ...] = field(repr=False)
    threshold: float | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """The value of the figure ``name``; raises ``KeyError`` naming the figures there are."""
        values = {figure.name: figure.value for figure in self.figures}
        if name not in values:
            raise KeyError(f"there is no figure {name!r}; there are {', '.join(values)}")
        return values[name]

    def __str__(self) -> str:
        """The figures, a line each, and the cases that failed.

        >>> print(Evaluation({}, (Figure("AUPRC", 0.8, 0.7, 0.9),), (), (), failed={"a": "damaged"}))
        AUPRC: 0.800 [0.700 - 0.900]
        a failed: damaged
        """
        lines = [f"{figure.name}: {figure}" for figure in self.figures]
        lines += [f"{case} failed: {reason}" for case, reason in self.failed.items()]
        return "\n".join(lines)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Evaluation:
        """What ``asdict`` gave, from JSON."""
        return cls(
            protocol=facts["protocol"],
            figures=tuple(Figure(**figure) for figure in facts["figures"]),
            patients=tuple(PatientScores.from_json(row) for row in facts["patients"]),
            curve=tuple(tuple(point) for point in facts["curve"]),
            threshold=facts["threshold"],
            failed=facts["failed"],
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
