"""Threads for parts of some work, and torch's own threads divided among them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_open_blocks = 0
_threads_before = 1


@contextmanager
def divide_torch_threads(workers: int) -> Iterator[None]:
    """Divide torch's threads for each operation among ``workers`` that work at the same time.

    Threads that share an operation wait, busily, for the slowest of them. That time is lost
    whenever another program takes a processor for a moment. Threads with work of their own do not
    wait.
    """
    global _open_blocks, _threads_before
    with _lock:
        # Torch's number is the process's: the last block to end restores what the first found.
        if not _open_blocks:
            _threads_before = torch.get_num_threads()
        _open_blocks += 1
        torch.set_num_threads(max(_threads_before // workers, 1))
    try:
        yield
    finally:
        with _lock:
            _open_blocks -= 1
            if not _open_blocks:
                torch.set_num_threads(_threads_before)


@contextmanager
def worker_threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads for parts of some work; torch's threads are divided among them.

    The pool's threads treat subnormal numbers, which slow a processor down, as zero; the caller's
    thread does not.
    """
    pool = ThreadPoolExecutor(workers, initializer=torch.set_flush_denormal, initargs=(True,))
    with divide_torch_threads(workers), pool:
        yield pool
