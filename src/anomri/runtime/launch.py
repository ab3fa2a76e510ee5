"""Which of several processes this one is, according to torchrun or SLURM's srun."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from anomri.errors import AnomriError

THREADS = "ANOMRI_THREADS"
"""Environment variable that ``--threads`` sets: how many threads a process may use."""


@dataclass(frozen=True)
class Launch:
    """The place of this process among all processes of the job, and among those on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: Literal["torchrun", "srun"] | None = None


def read_launch() -> Launch:
    """The launcher's environment variables; without a launcher, a single process.

    Raises `AnomriError` if the variables are incomplete or contradict each other.
    """
    try:
        launch = _read_environment()
    except (KeyError, ValueError) as error:
        raise AnomriError(
            f"the environment of torchrun or srun is not complete ({type(error).__name__}: "
            f"{error}); start all processes with torchrun or srun, or unset RANK, WORLD_SIZE and "
            f"SLURM_STEP_NUM_TASKS."
        ) from error
    return launch if launch.world_size > 1 else Launch()


def _read_environment() -> Launch:
    env = os.environ
    # torchrun first: srun may have started it.
    if "TORCHELASTIC_RUN_ID" in env:
        return Launch(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            local_world_size=int(env["LOCAL_WORLD_SIZE"]),
            launcher="torchrun",
        )
    # Not SLURM_NTASKS: a batch script without srun has it too, and is one process.
    tasks, machines = (int(env.get(f"SLURM_STEP_NUM_{name}", 1)) for name in ("TASKS", "NODES"))
    if tasks == 1:
        return Launch()
    if tasks % machines:
        raise ValueError(f"{tasks} tasks on {machines} machines are not the same number on each")
    return Launch(
        rank=int(env["SLURM_PROCID"]),
        world_size=tasks,
        local_rank=int(env["SLURM_LOCALID"]),
        local_world_size=tasks // machines,
        launcher="srun",
    )


def usable_processors() -> int:
    """How many processors this process may use: its share of the job's, and at most `THREADS`."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    share = max(allowed // read_launch().local_world_size, 1)
    limit = os.environ.get(THREADS, "")
    return min(share, max(int(limit), 1)) if limit.isdecimal() else share


def require_single_process(what: str) -> None:
    """Raise `AnomriError` if this is one of several processes: they cannot share ``what``."""
    if read_launch().world_size > 1:
        raise AnomriError(f"{what} runs in one process; start it without torchrun or srun.")
