"""A method at work on the slices of a scan: on which device, in which arithmetic, how many slices at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anomri.devices import resolve_precision
from anomri.memory import keep_memory, smaller_until_it_fits
from anomri.methods import Box
from anomri.networks import fold_weight_standardisation


class Inference:
    """Calls ``method.reconstruct`` on any number of slices; weight standardisation is folded into the filters, in place.

    ``precision`` is ``auto``, ``32-true`` or ``bf16-mixed``. A method whose ``half_precision`` is true is computed in
    bfloat16 where that is asked for, or where (``auto``) the hardware has instructions for it; all others in float32.
    ``batch`` is how many slices go through the network at once; it falls where memory is short.
    """

    def __init__(self, method: nn.Module, device: str | torch.device = "cpu", precision: str = "auto") -> None:
        self.device = torch.device(device)
        self.precision = precision
        found = resolve_precision(precision, self.device.type)
        self.half = found == "bf16-mixed" and bool(getattr(method, "half_precision", False))
        folded: Any = fold_weight_standardisation(method).eval().to(self.device)
        self.method = folded.to(memory_format=torch.channels_last) if self.half else folded
        keep_memory()
        # What a processor's cache does not hold is slower.
        self.batch = 64 if self.device.type != "cpu" else 8

    def __call__(self, x: Tensor, box: Box | None = None) -> Tensor:
        """What the method makes of slices (n, c, h, w), computed in the box: (n, c + its further maps, h, w) float32."""
        parts: list[Tensor] = []

        def reconstruct(size: int) -> None:
            parts.clear()
            for start in range(0, len(x), size):
                some = x[start : start + size].to(self.device)
                if self.half:
                    some = some.contiguous(memory_format=torch.channels_last)
                parts.append(self.method.reconstruct(some, box).float().cpu())

        # Not inference mode: a method may follow gradients to its reconstruction.
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            self.batch = smaller_until_it_fits(reconstruct, self.batch)
        return torch.cat(parts).contiguous()
