"""A method at work on slices: on which device, in which arithmetic, how many at once."""

from __future__ import annotations

import math
from threading import Lock

import torch
from torch import Tensor

from anomri.methods.base import Method
from anomri.methods.networks.unet import fold_weight_standardisation
from anomri.runtime.devices import resolve_precision
from anomri.runtime.memory import keep_memory, smaller_until_it_fits
from anomri.runtime.threads import worker_threads
from anomri.slices import Box, cut_box

CACHED = 2**21
"""Values of the finest maps that a processor has at once: four times as many take it a sixth longer
(docs/performance.md)."""
MOST_WORKERS = 4
"""How many batches go through the network side by side, on a processor of so many cores or more:
each takes memory."""


class Inference:
    """Calls ``method.reconstruct`` on any number of slices.

    Weight standardisation is folded into the filters, in place. ``precision`` is ``auto``,
    ``32-true`` or ``bf16-mixed``. A method whose ``half_precision`` is true is computed in bfloat16
    where that is asked for, or where (``auto``) the hardware has instructions for it; all others in
    float32. ``batch`` is how many slices go through the network at once, at most; it falls where
    memory is short.
    """

    def __init__(
        self, method: Method, device: str | torch.device = "cpu", precision: str = "auto"
    ) -> None:
        self.device = torch.device(device)
        self.precision = precision
        found = resolve_precision(precision, self.device.type)
        self.half = found == "bf16-mixed" and method.half_precision
        dtype = torch.bfloat16 if self.half else torch.float32
        self.method = fold_weight_standardisation(method, dtype).eval().to(self.device)
        if self.half:
            self.method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        keep_memory()
        self.batch = 64 if self.device.type != "cpu" else 8

    def __call__(self, x: Tensor, box: Box | None = None, mirrored: bool = False) -> Tensor:
        """The method's reconstruction of slices (n, c, h, w), float32; zero outside the box.

        With a segmentation head one more map follows. If it is to see them ``mirrored``, its output
        is turned back.
        """
        output: Tensor | None = None
        guard = Lock()

        def fill(some: slice) -> None:
            nonlocal output
            part = self._reconstruct(x[some], box, mirrored)
            with guard:
                if output is None:
                    output = part.new_empty((len(x), *part.shape[1:]))
            output[some] = part

        def fill_all(batch: int) -> None:
            batches = [slice(first, first + batch) for first in range(0, len(x), batch)]
            workers = self._workers(len(batches))
            if workers == 1:
                list(map(fill, batches))
                return
            with worker_threads(workers) as pool:
                list(pool.map(fill, batches))

        batch = min(self.batch, self._fastest_batch(x, box))
        fitting = smaller_until_it_fits(fill_all, batch)
        if fitting < batch:
            # Several scans may be under way: what was too much for one stays so.
            self.batch = min(fitting, self.batch)
        assert output is not None
        return output

    def _workers(self, batches: int) -> int:
        if self.device.type != "cpu":
            return 1
        return min(batches, MOST_WORKERS, torch.get_num_threads())

    def _fastest_batch(self, x: Tensor, box: Box | None) -> int:
        """How many slices keep the finest maps of a network near a processor's cache."""
        width = self.method.finest_width
        if self.device.type != "cpu" or width is None:
            return self.batch
        slices = CACHED / (width * cut_box(x, box)[0, 0].numel())
        return 2 ** max(math.ceil(math.log2(slices)), 0)

    def _reconstruct(self, x: Tensor, box: Box | None, mirrored: bool) -> Tensor:
        x = x.to(self.device)
        if mirrored:
            x, box = _mirror(x, box)
        if self.half:
            x = x.contiguous(memory_format=torch.channels_last)
        # Not inference mode: a method may follow gradients to its reconstruction. Both hold for one
        # thread alone.
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            output: Tensor = self.method.reconstruct(x, box)
        return (output.flip(2) if mirrored else output).float().cpu().contiguous()


def _mirror(x: Tensor, box: Box | None) -> tuple[Tensor, Box | None]:
    """Slices with left and right, their rows, exchanged; and the box, which holds the same
    pixels."""
    if box is None:
        return x.flip(2), None
    top, bottom, left, right = box
    h = x.shape[2]
    return x.flip(2), (h - bottom, h - top, left, right)
