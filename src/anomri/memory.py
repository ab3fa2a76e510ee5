"""What to do when memory does not suffice: the same work in smaller parts."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


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
