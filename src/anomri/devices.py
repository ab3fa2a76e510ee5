"""What this machine computes with: a device, and a precision that it is fast in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from anomri.spec import AnomriError


def resolve_device(device: str) -> torch.device:
    """The device of that name, ``auto`` being the fastest one here; raises `AnomriError` if it is not here."""
    if device == "auto":
        return torch.device(
            torch.accelerator.current_accelerator() or "cpu" if torch.accelerator.is_available() else "cpu"
        )
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise AnomriError(f"the device {device!r} cannot be used ({reason}); try --device cpu.") from error


PRECISIONS = ("auto", "32-true", "bf16-mixed")


def resolve_precision(precision: str, device: str = "cpu") -> Any:
    """``auto`` as the precision that a kind of device computes fastest in: bfloat16 where the hardware has it.

    Raises `AnomriError` if there is no such precision.
    """
    if precision not in PRECISIONS:
        raise AnomriError(f"there is no precision {precision!r}; there are {', '.join(PRECISIONS)}.")
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "32-true"
    if device != "cpu":
        return "32-true"
    # Without such instructions bfloat16 is emulated, several times slower than float32.
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if "avx512_bf16" in flags or "amx_bf16" in flags else "32-true"
