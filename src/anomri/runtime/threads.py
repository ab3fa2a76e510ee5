"""Parts of some work side by side on the processors of one machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_guard = threading.Lock()
_open = 0
_undivided = 1


@contextmanager
def threads_divided(workers: int) -> Iterator[None]:
    """Torch's threads for each operation divided among so many that work at the same time.

    Threads that share every operation wait, busily, for the slowest of them at its end; that is lost wherever something
    else takes a processor for a moment. Threads that have a part each do not wait.
    """
    global _open, _undivided
    with _guard:
        # Torch's number is the whole process's: the last to leave gives back what the first has found.
        _undivided = _undivided if _open else torch.get_num_threads()
        _open += 1
        torch.set_num_threads(max(_undivided // workers, 1))
    try:
        yield
    finally:
        with _guard:
            _open -= 1
            if not _open:
                torch.set_num_threads(_undivided)


@contextmanager
def side_by_side(workers: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads for parts of some work, among which those of torch are divided.

    They take subnormal numbers, for which processors need many times as long, for zero; the caller's thread does not.
    """
    pool = ThreadPoolExecutor(workers, initializer=torch.set_flush_denormal, initargs=(True,))
    with threads_divided(workers), pool:
        yield pool
