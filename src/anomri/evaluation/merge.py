"""`anomri merge`: one folder of results from the shards that wrote to it."""

from __future__ import annotations

from pathlib import Path

from anomri.errors import AnomriError
from anomri.evaluation.evaluate import SCORES, merge_evaluations
from anomri.evaluation.report import EVALUATION
from anomri.runs.detect import merge_detections
from anomri.runs.ledger import PLAN
from anomri.runs.tables import LOGS


def merge(folder: str | Path) -> int:
    """Write the tables, figures and report of runs that were done shard by shard; returns how many
    cases failed.

    Detection, evaluation, or both, whatever the shards in ``folder`` were of. It may be given
    again. Raises `AnomriError` if there is nothing to merge, or naming the cases that are not done
    yet.
    """
    folder = Path(folder)
    jobs = {LOGS: _detections, SCORES: _evaluations}
    begun = [job for place, job in jobs.items() if (folder / place / PLAN).is_file()]
    if _evaluations not in begun and (folder / LOGS / EVALUATION).is_file():
        # Merged already: the scores of an evaluation are not kept.
        begun.append(_evaluations)
    if not begun:
        raise AnomriError(
            f"{folder}: holds no run to merge; name the folder that `anomri detect --shard K/N` wrote."
        )
    return sum(job(folder) for job in begun)


def _detections(folder: Path) -> int:
    return sum(result.error is not None for result in merge_detections(folder))


def _evaluations(folder: Path) -> int:
    return len(merge_evaluations(folder).failed)
