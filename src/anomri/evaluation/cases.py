"""Which cases of a cohort are evaluated: those with a label that the model has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anomri.errors import AnomriError
from anomri.scans.case import Case


def choose_cases(
    cases: Sequence[Case], split: str | None, seen: Mapping[str, str] | None = None
) -> tuple[list[Case], str]:
    """The cases of a split that have a label, and in words how they were chosen.

    ``seen`` gives the split that cases and patients had when the model was trained. Unless a split
    is asked for, cases of its training and validation are left out, and the split ``test`` is taken
    if there is one. Raises `AnomriError` if no case is left.
    """
    seen_cases: set[str] = set()
    if split is None:
        seen_names = {name for name, part in (seen or {}).items() if part in ("train", "val")}
        seen_cases = {case.name for case in cases if seen_names & {case.name, case.patient}}
        test_cases = {case.name for case in cases if case.split == "test"}
        if test_cases - seen_cases:
            split = "test"
            seen_cases &= test_cases
    unseen = [
        case
        for case in cases
        if (split is None or case.split == split) and case.name not in seen_cases
    ]
    if seen_cases and not unseen:
        raise AnomriError(
            f"the model was trained or validated on all {len(cases)} cases; evaluate on others, or ask "
            f"for --split val, knowing that those chose the model."
        )
    labelled = [case for case in unseen if case.label is not None]
    if not labelled:
        where = f"split {split!r}" if split else "cohort"
        raise AnomriError(
            f"no case of the {where} has a label (<case>_seg.nii.gz; in BIDS "
            f"*_label-lesion_mask.nii.gz); there is nothing to compare with."
        )
    words = [f"split {split}" if split else "all cases"]
    if len(labelled) < len(unseen):
        words.append(f"without {len(unseen) - len(labelled)} that have no label")
    if seen_cases:
        words.append(f"without {len(seen_cases)} that the model was trained or validated on")
    return labelled, ", ".join(words)
