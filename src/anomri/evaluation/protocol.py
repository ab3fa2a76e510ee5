"""The protocol of an evaluation: in words, what was compared and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anomri.spec import Score

GRIDS = {
    "model": "every pixel of the slices with brain, on the model's working grid (of a finer one: on "
    "128 x 128)",
    "input": "every voxel of the scan's own grid",
}
"""What is counted on each grid that can be chosen."""
MOST_NOTES = 5
"""How many notes on labels are listed, and how many on scans or maps."""


@dataclass(frozen=True)
class Protocol:
    """What an evaluation compares, before any case is scored.

    ``scored`` names the model or the maps, ``chosen`` the cases, and ``threshold`` the score that
    makes the mask, which is the user's (``given``) or the model's.
    """

    scored: str
    chosen: str
    grid: str
    threshold: float | None
    given: bool
    dropped: str

    def table(
        self, cases: Sequence[dict[str, Any]], patients: int, voxels: int, failed: int
    ) -> dict[str, str]:
        """The protocol with what the scored ``cases`` add: entries of the ledger, as `Pool` has
        them."""
        chosen = f"{len(cases)} ({self.chosen})"
        if failed:
            chosen += f"; {failed} failed"
        intervals = "95 %, 2,000 bootstrap resamples of patients"
        if patients < len(cases):
            intervals += f" ({patients}, of {len(cases)} scans)"
        table = {
            "scored": self.scored,
            "cases": chosen,
            "voxels": f"{GRIDS[self.grid]}, background counted: {voxels:,}",
            "lesion": _lesion_words(cases),
        }
        for row, kind in (("labels", "notes"), ("scans", "scan_notes")):
            notes = [note for case in cases for note in case.get(kind, ())]
            if notes:
                table[row] = " ".join(notes[:MOST_NOTES])
            if len(notes) > MOST_NOTES:
                table[row] += f" And {len(notes) - MOST_NOTES} more."
        return table | {
            "AUPRC": "average precision over all voxels, every distinct score a threshold",
            "ceil-Dice": "best Dice over all thresholds, chosen on these labels: an upper bound",
            "threshold": self._threshold_words(cases),
            "Dice at the threshold": "mean of scans with a lesion; in others, findings are false "
            "positive components",
            "lesion-wise": "26-connected lesions; detected if one voxel is in the mask",
            "intervals": intervals,
            "components": f"26-connected ones of {self.dropped} are dropped where filtered",
        }

    def _threshold_words(self, cases: Sequence[dict[str, Any]]) -> str:
        if self.threshold is None:
            return "none"
        source = "given by the user" if self.given else "the model's, without labels"
        words = f"{self.threshold:.5g}, {source}"
        others = sum(case["threshold"] != self.threshold for case in cases)
        if others:
            words += f"; for {others} that lack channels, the one for the channels they have, if there is one"
        return words


def dropped_words(score: Score) -> str:
    """Which components of a mask are dropped by a model with this score."""
    if score.min_volume_mm3 is not None:
        return f"less than {score.min_volume_mm3:g} mm3"
    return f"at most {score.max_dropped_voxels} voxels of the working grid, were they 1 mm high,"


def _lesion_words(cases: Sequence[dict[str, Any]]) -> str:
    words = (
        "every label above zero is one class; of a label that interpolation made soft, values from a half "
        "on"
    )
    lost, drawn = (sum(case.get(name, 0) for case in cases) for name in ("lost", "lesions"))
    if lost:
        words += f"; {lost} of {drawn} lesions vanish on this grid, or grow together; --grid input keeps them"
    return words
