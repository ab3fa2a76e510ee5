"""The command `demo`: anomri at work without any data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anomri.cli.options import MORE, OutFolder, Threads, command, err, flag, out, within


@command(MORE, "anomri demo", "anomri demo -o demo --keep")
def demo(
    output: OutFolder = Path("anomri-demo"),
    keep: Annotated[
        bool, flag("--keep", "Keep the synthetic scans, to try the other commands on them.")
    ] = False,
    seed: Annotated[
        int, typer.Option(metavar="N", callback=within(0), help="Seed of the synthetic scans.")
    ] = 0,
    threads: Threads = None,
) -> None:
    """Try anomri without data: find lesions in a synthetic scan, then train a small model.

    First, within seconds, the model in the package looks at one synthetic
    scan. Then a model is trained on 12 healthy synthetic brains, and compared
    with thresholding on 6 brains with lesions.
    """
    from anomri.cli.progress import training_progress
    from anomri.demo.run import run_demo

    with training_progress(err) as progress:
        result = run_demo(
            output,
            keep=keep,
            seed=seed,
            progress=progress,
            announce=lambda text: out.print(text, soft_wrap=True),
        )
    out.print(result.table())
    out.print(f"Look at {result.report}", soft_wrap=True)
    if keep:
        out.print(
            f"The synthetic scans are in {result.cohort}; try: "
            f"anomri detect -i {result.cohort} -o out -m {result.model}",
            soft_wrap=True,
        )
