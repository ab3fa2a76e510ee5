"""The command `info`: what this installation and this machine offer, and what a model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anomri.cli.options import MORE, Device, Threads, command, out, quick_imports


@command(MORE, "anomri info", "anomri info my_model")
def info(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Folder of a trained model, or built-in."),
    ] = Path("built-in"),
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Show versions, the device and precision in use, extras, and what a model is.

    Paste this into a bug report: it names nobody, and no folder but the
    model's.
    """
    with quick_imports():
        from anomri.cli import facts
        from anomri.model.detector import Detector
        from anomri.scoring.registry import SCORES

    shown = {
        "Installation": facts.installation(),
        "Machine": facts.machine(device),
        "Extras": facts.extras(),
        f"Model {model}": facts.describe_model(Detector.load(model, device)),
        "Scores (--score)": [(name, kind.help) for name, kind in SCORES.items()],
    }
    for title, lines in shown.items():
        out.print(facts.as_text(title, lines), soft_wrap=True)
