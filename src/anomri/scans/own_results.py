"""Results of anomri that lie among scans: they are neither masks, labels nor channels of these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from anomri.errors import AnomriError
from anomri.files import read_json
from anomri.scans.case import Case
from anomri.scans.names import OUTPUTS, SUMMARY_KEY, bare_name


def is_own_result(path: Path) -> bool:
    """Whether the summary beside an image says that `anomri detect` wrote it.

    A model without a threshold writes neither masks nor lesions: those are the user's.
    """
    stem, _, kind = bare_name(path).rpartition("_")
    if kind not in OUTPUTS:
        return False
    summary = path.with_name(f"{stem}.json")
    if not summary.is_file():
        return False
    try:
        facts = read_json(summary)
    except AnomriError:
        return False
    has_mask = facts.get("threshold", 0) is not None
    return SUMMARY_KEY in facts and (has_mask or kind not in ("mask", "lesions"))


def without_own_results(case: Case) -> Case:
    """The case without a brain mask or label that an earlier run wrote: its lesions."""
    if case.mask and is_own_result(case.mask):
        case = replace(case, mask=None)
    if case.label and is_own_result(case.label):
        case = replace(case, label=None)
    return case


def drop_own_results(cases: Sequence[Case]) -> tuple[list[Case], list[str]]:
    """The cases without masks and labels that earlier runs wrote, and a note on each."""
    kept = [without_own_results(case) for case in cases]
    notes = []
    for before, after in zip(cases, kept, strict=True):
        for what in ("mask", "label"):
            dropped = getattr(before, what)
            if dropped != getattr(after, what):
                notes.append(
                    f"{before.name}: {dropped} was written by anomri detect, and is not taken for "
                    f"its {what}."
                )
    return kept, notes
