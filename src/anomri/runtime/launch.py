"""Which of several processes this one is, by what torchrun or SLURM's srun say; one process where nobody says anything."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from anomri.errors import AnomriError


@dataclass(frozen=True)
class Launch:
    """The place of a process among all (``rank`` of ``count``) and among those of its machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    launcher: Literal["torchrun", "srun"] | None = None


def launched() -> Launch:
    """What the launcher's environment says; raises `AnomriError` if it does not fit together."""
    try:
        return _launched()
    except (KeyError, ValueError) as error:
        raise AnomriError(
            f"the environment of torchrun or srun is not complete ({type(error).__name__}: {error}); start all processes "
            f"with torchrun or srun, or clear RANK, WORLD_SIZE and SLURM_STEP_NUM_TASKS."
        ) from error


def processors() -> int:
    """How many processors this process may use: its share of those that it is allowed, among the processes of a machine."""
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(allowed // launched().local_count, 1)


def alone(what: str) -> None:
    """Raise `AnomriError` if this is one of several processes, for ``what`` does not share its work."""
    if launched().count > 1:
        raise AnomriError(f"{what} is done by one process; start it without torchrun or srun.")


def _launched() -> Launch:
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        rank, count = int(env["RANK"]), int(env["WORLD_SIZE"])
        place = Launch(
            rank, count, int(env["LOCAL_RANK"]), int(env["LOCAL_WORLD_SIZE"]), "torchrun"
        )
    # Not SLURM_NTASKS: a batch script without srun has that as well, and is one process.
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        count, machines = int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_STEP_NUM_NODES", 1))
        if count % machines:
            raise ValueError(
                f"{count} tasks on {machines} machines are not the same number on each"
            )
        place = Launch(
            int(env["SLURM_PROCID"]), count, int(env["SLURM_LOCALID"]), count // machines, "srun"
        )
    else:
        return Launch()
    return place if place.count > 1 else Launch()
