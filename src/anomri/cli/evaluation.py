"""Commands that compare maps with labels: `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from anomri.cli.options import Cohort, Device, FalsePositiveMl, OutFolder, Sensitivity, app, err, out

if TYPE_CHECKING:
    from anomri.pooling import Evaluation


@app.command()
def evaluate(
    input: Cohort,
    output: OutFolder,
    model: Annotated[
        Optional[Path], typer.Option("-m", "--model", metavar="MODEL", help="Folder of a trained model.")
    ] = None,
    maps: Annotated[
        Optional[Path], typer.Option(help="Folder of maps <case>_anomaly.nii.gz, whoever made them.")
    ] = None,
    grid: Annotated[
        str, typer.Option(help="model: the working grid, as in the paper; input: the scan's own.")
    ] = "model",
    split: Annotated[Optional[str], typer.Option(help="Which cases (default: test, where there are splits).")] = None,
    threshold: Annotated[Optional[float], typer.Option(help="Instead of the model's label-free one.")] = None,
    sensitivity: Sensitivity = None,
    false_positive_ml: FalsePositiveMl = None,
    device: Device = "auto",
) -> None:
    """Compare the maps of a model, or anyone's, with lesion labels: the paper's table, and more."""
    from anomri.detector import Detector
    from anomri.evaluation import evaluate as run
    from anomri.progress import case_progress

    with case_progress(err) as advance:
        evaluation = run(
            input,
            output,
            model=None if model is None else Detector.load(model, device),
            maps=maps,
            grid=grid,
            split=split,
            threshold=threshold,
            sensitivity=sensitivity,
            false_positive_ml=false_positive_ml,
            progress=lambda case, done, total: advance(case, total),
        )
    _print_evaluation(evaluation)
    out.print(f"Look at {output / 'report.html'}", highlight=False)
    raise typer.Exit(1 if evaluation.failed else 0)


def _print_evaluation(evaluation: Evaluation) -> None:
    from rich.table import Table

    table = Table("figure", "value", "95 % interval", title=evaluation.protocol["scored"])
    for figure in evaluation.figures:
        table.add_row(figure.name, f"{figure.value:.3f}", figure.interval)
    out.print(table)
    for what, how in evaluation.protocol.items():
        out.print(f"{what}: {how}", highlight=False, markup=False)
    for case, error in evaluation.failed.items():
        err.print(f"failed: {case}: {error}", style="red", highlight=False, markup=False)
