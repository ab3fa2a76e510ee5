"""The device that computes, and the precision that it is fast in."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch

from anomri.errors import AnomriError, first_line
from anomri.spec import Precision


def resolve_device(device: str) -> torch.device:
    """The device of this name; ``auto`` is the fastest one of this machine.

    Raises `AnomriError` if this machine does not have it.
    """
    if device == "auto":
        fastest = torch.accelerator.current_accelerator()
        return fastest if fastest and torch.accelerator.is_available() else torch.device("cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise AnomriError(
            f"the device {device!r} cannot be used ({first_line(error)}); try --device cpu."
        ) from error


def resolve_precision(precision: str, device: str = "cpu") -> Any:
    """The precision of this name; ``auto`` is bfloat16 where the hardware computes it fast.

    ``device`` is the type of a device, such as ``cuda``. Raises `AnomriError` for an unknown name.
    """
    known = get_args(Precision)
    if precision not in known:
        raise AnomriError(f"unknown precision {precision!r}; choose one of {', '.join(known)}.")
    if precision != "auto":
        return precision
    return "bf16-mixed" if _has_fast_bfloat16(device) else "32-true"


def _has_fast_bfloat16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    # Without these instructions a processor emulates bfloat16, several times slower than float32.
    return device == "cpu" and bool(processor_flags() & {"avx512_bf16", "amx_bf16"})


@cache
def processor_flags() -> frozenset[str]:
    """The words of ``/proc/cpuinfo``, among them the processor's features; empty elsewhere."""
    facts = Path("/proc/cpuinfo")
    return frozenset(facts.read_text().split()) if facts.exists() else frozenset()


@cache
def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` works on this machine, which needs Triton and a C compiler."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
        return True
    except Exception:  # each missing part raises its own error
        return False
