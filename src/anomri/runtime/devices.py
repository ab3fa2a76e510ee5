"""What this machine computes with: a device, and a precision that it is fast in."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, get_args

import torch

from anomri.errors import AnomriError, first_line
from anomri.spec import Precision


def resolve_device(device: str) -> torch.device:
    """The device of that name, ``auto`` being the fastest one here; raises `AnomriError` if it is not here."""
    if device == "auto":
        return torch.device(
            torch.accelerator.current_accelerator() or "cpu"
            if torch.accelerator.is_available()
            else "cpu"
        )
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise AnomriError(
            f"the device {device!r} cannot be used ({first_line(error)}); try --device cpu."
        ) from error


def resolve_precision(precision: str, device: str = "cpu") -> Any:
    """``auto`` as the precision that a kind of device computes fastest in: bfloat16 where the hardware has it.

    Raises `AnomriError` if there is no such precision.
    """
    if precision not in get_args(Precision):
        raise AnomriError(
            f"there is no precision {precision!r}; there are {', '.join(get_args(Precision))}."
        )
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    if device != "cpu":
        return "32-true"
    # Without such instructions bfloat16 is emulated, several times slower than float32.
    return "bf16-mixed" if _processor_flags() & {"avx512_bf16", "amx_bf16"} else "32-true"


@cache
def _processor_flags() -> frozenset[str]:
    facts = Path("/proc/cpuinfo")
    return frozenset(facts.read_text().split()) if facts.exists() else frozenset()


@cache
def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` works here for a device: Triton and a C compiler may be missing, or not fit."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
        return True
    except Exception:  # whatever a part that is missing raises
        return False
