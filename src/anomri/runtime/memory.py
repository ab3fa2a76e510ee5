"""Memory: kept between the layers of a network, and what to do when it runs out."""

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
"""Bytes. Larger blocks, and more free memory at the end of the heap, are given back."""
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


@cache
def keep_memory() -> None:
    """Make this process keep freed memory instead of returning it to the kernel (glibc only).

    By default glibc returns large blocks and asks for new ones, whose pages the kernel has to find
    and zero, for every layer of a network and every channel of a scan. On a virtual machine this
    takes a quarter of the time. All threads share one heap, so that each can reuse what another
    has freed.
    """
    setter = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if setter is not None:
        setter(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)
        setter(M_TRIM_THRESHOLD, MOST_KEPT)
        setter(M_ARENA_MAX, 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the processor or of an accelerator ran out.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    True
    >>> is_out_of_memory(RuntimeError("shapes do not match"))
    False
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY_TEXTS)


def free_memory() -> None:
    """Free what a failed attempt still holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def smaller_until_it_fits(work: Callable[[int], None], size: int) -> int:
    """Call ``work(size)``, halving the size when memory runs out; returns the size that fits.

    Raises the error of ``work`` if even a size of 1 is too much.
    """
    while True:
        try:
            work(size)
            return size
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Outside the handler, because the error keeps the tensors of the attempt alive.
        size //= 2
        free_memory()
