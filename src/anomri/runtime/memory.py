"""Memory kept from one layer or scan to the next, and what to do when it does not suffice: the same work in smaller parts."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from functools import cache

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's ``mallopt``."""
LARGEST_KEPT_BLOCK, MOST_KEPT = 2**27, 2**30
"""Bytes: blocks larger than the one, and what is free at the end of the heap beyond the other, are given back."""
SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


@cache
def keep_memory() -> None:
    """Have this process keep freed memory, where the C library is glibc, instead of giving it back to the kernel.

    By itself glibc gives large blocks back, and gets each one again as pages that the kernel finds and zeroes one by one:
    for every layer of a network and every channel of a scan, a quarter of the time on a virtual machine. All threads take
    from one heap, so that what one of them has freed serves the others.
    """
    setter = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if setter is not None:
        setter(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)
        setter(M_TRIM_THRESHOLD, MOST_KEPT)
        setter(M_ARENA_MAX, 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the processor or of an accelerator, does not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def free_memory() -> None:
    """Give back what an attempt that failed still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller_until_it_fits(work: Callable[[int], None], size: int) -> int:
    """Call ``work(size)`` with half the size whenever memory does not suffice; returns the size that was enough.

    Raises what ``work`` does when one at a time is too much.
    """
    while True:
        try:
            work(size)
            return size
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Out of the handler: the error holds on to the attempt's tensors.
        size //= 2
        free_memory()
