"""The command `export`: a model for programs that have no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anomri.cli.options import MORE, command, out


@command(MORE, "anomri export built-in -o model.onnx", "anomri export my_model -o my_model.onnx")
def export(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Folder of a trained model, or built-in."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="ONNX file to write.")
    ],
) -> None:
    """Write the network of a model as an ONNX file, for other programs.

    Its input is scaled slices, its outputs are the reconstruction and, if the
    model has a segmentation head, the anomaly probability. ONNX Runtime
    checks the file against torch. Needs the extra onnx.
    """
    from anomri.model.export import export_onnx

    detector = export_onnx(model, output)
    head = ", anomaly_probability" if detector.method.segmentation_head else ""
    out.print(
        f"{output}: slices (channels {', '.join(detector.channels)}) -> reconstruction{head}",
        soft_wrap=True,
    )
