"""A model as an ONNX file, for programs that run networks without torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from anomri.errors import AnomriError
from anomri.files import output_folder, whole_file
from anomri.methods.base import Method
from anomri.model.detector import Detector
from anomri.optional import import_extra

OPSET = 20
"""The version of ONNX's operators."""
INPUT, RECONSTRUCTION, PROBABILITY = "slices", "reconstruction", "anomaly_probability"
"""Names of the input and the outputs; only a model with a segmentation head has the last one."""
METADATA = "anomri"
"""The key under which the metadata of the file hold ``model.json``."""
TOLERANCE = 1e-4
"""How far the outputs of ONNX Runtime and torch may be apart, in scaled intensities."""


def export_onnx(model: str | Path | None, path: Path) -> Detector:
    """Write the network of a model folder, or ``built-in``, as the ONNX file ``path``.

    The file takes ``slices`` (n, c, h, w) float32, scaled as `slices.slice_volume` does, and gives
    the ``reconstruction`` (n, c, h, w) and, with a segmentation head, the ``anomaly_probability``
    (n, h, w). n is free; h and w are multiples of the method's `Method.side_multiple`. Its metadata
    hold ``model.json``. ONNX Runtime computes the file once, on random slices, before it is kept.

    Returns the model, in float32 on the processor. Raises `AnomriError` if the method has no such
    form, a library is missing, ``path`` exists, or the two results differ by more than `TOLERANCE`.
    """
    runtime = import_extra("onnxruntime", "onnx", "anomri export")
    # The exporter of torch needs both.
    import_extra("onnx", "onnx", "anomri export")
    import_extra("onnxscript", "onnx", "anomri export")
    if path.exists():
        raise AnomriError(f"{path}: exists already; remove it, or choose another name with -o.")
    detector = Detector.load(model, "cpu", "32-true")
    method = detector.method
    if not method.exportable:
        raise AnomriError(
            f"the method {detector.spec.method} cannot be exported with these settings: its result "
            "is not one forward pass of a network; use it by `anomri detect`."
        )
    output_folder(path.parent)
    channels = len(detector.channels)
    network = _NamedOutputs(method, channels).eval()
    # Before the export: constants that a method computes at its first call and keeps must not be
    # the exporter's, which have no values.
    with torch.no_grad():
        examples = [(x, network(x)) for x in _random_slices(method, channels)]
    program = _to_onnx(network, examples[0][0])
    program.model.metadata_props[METADATA] = detector.spec.to_json()
    with whole_file(path) as partial:
        program.save(str(partial))
        _check_same(runtime.InferenceSession(str(partial)), examples)
    return detector


class _NamedOutputs(nn.Module):
    """A method's reconstruction, and apart from it the anomaly probability if there is one."""

    def __init__(self, method: Method, channels: int) -> None:
        super().__init__()
        self.method = method
        self.channels = channels

    def forward(self, slices: Tensor) -> tuple[Tensor, ...]:
        """(n, c, h, w) -> the same, and (n, h, w)."""
        output = self.method.reconstruct(slices)
        if self.method.segmentation_head:
            return output[:, : self.channels], output[:, self.channels]
        return (output,)


def _random_slices(method: Method, channels: int) -> list[Tensor]:
    """Slices of two sizes that a method takes, or of its only size."""
    side = method.side_multiple
    # Reflection padding needs two pixels of the coarsest maps.
    few = max(2, 32 // side) * side
    sizes = [(side, side)] if method.fixed_size else [(few, few + side), (few + 2 * side, few)]
    generator = torch.Generator().manual_seed(0)
    return [torch.rand((2, channels, *size), generator=generator) for size in sizes]


def _to_onnx(network: _NamedOutputs, example: Tensor) -> Any:
    method = network.method
    sizes: dict[int, Any] = {0: Dim("n")}
    if not method.fixed_size:
        sizes |= {2: method.side_multiple * Dim("rows"), 3: method.side_multiple * Dim("columns")}
    names = [RECONSTRUCTION, PROBABILITY] if method.segmentation_head else [RECONSTRUCTION]
    # Without gradients a convolution takes an operator of oneDNN, which ONNX does not know.
    with _quiet(), torch.enable_grad():
        return torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=names,
            dynamic_shapes=(sizes,),
        )


def _check_same(session: Any, examples: list[tuple[Tensor, tuple[Tensor, ...]]]) -> None:
    """Raise `AnomriError` unless ONNX Runtime gives what torch gave."""
    for x, expected in examples:
        found = session.run(None, {INPUT: x.numpy()})
        for one, other in zip(found, expected, strict=True):
            difference = float(np.abs(one - other.numpy()).max())
            if not difference <= TOLERANCE:
                raise AnomriError(
                    f"ONNX Runtime gives another result than torch (they differ by "
                    f"{difference:.2g}), so no file was written; please report it with the output "
                    "of `anomri info`."
                )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings from the user: they are about torch's own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
