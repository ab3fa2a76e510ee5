"""Commands that compare maps with labels: `evaluate`, `compare`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from anomri.cli.options import (
    Channels,
    Cohort,
    Device,
    FalsePositiveMl,
    MinVolume,
    Model,
    OutFolder,
    Precision,
    Sensitivity,
    Shard,
    SomeChannels,
    app,
    err,
    names_of,
    numbers_of,
    out,
)
from anomri.scoring import registry as scores

if TYPE_CHECKING:
    from anomri.evaluation.pooling import Evaluation

SCORES = [name for name in scores.names() if name != "auto"]


@app.command()
def evaluate(
    input: Cohort,
    output: OutFolder,
    model: Model = None,
    maps: Annotated[
        Optional[Path],
        typer.Option(help="Folder of maps <case>_anomaly.nii.gz, whoever made them."),
    ] = None,
    grid: Annotated[
        str, typer.Option(help="model: the working grid, as in the paper; input: the scan's own.")
    ] = "model",
    split: Annotated[
        Optional[str], typer.Option(help="Which cases (default: test, where there are splits).")
    ] = None,
    threshold: Annotated[
        Optional[float], typer.Option(help="Instead of the model's label-free one.")
    ] = None,
    sensitivity: Sensitivity = None,
    false_positive_ml: FalsePositiveMl = None,
    min_volume: MinVolume = None,
    channels: SomeChannels = None,
    score: Annotated[
        Optional[str],
        typer.Option(help=f"Instead of the model's: paper, {', '.join(SCORES)}."),
    ] = None,
    shard: Shard = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Compare the maps of a model, or anyone's, with lesion labels: the paper's table, and more.

    Stop it when you like: the same command goes on. On several GPUs or machines: torchrun or srun before it.
    """
    from anomri.cli.progress import case_progress
    from anomri.errors import AnomriError
    from anomri.evaluation.evaluate import evaluate as run
    from anomri.evaluation.evaluate import evaluate_shard, make_plan
    from anomri.model.detector import Detector
    from anomri.runtime.processes import join_processes
    from anomri.spec import Score

    join_processes(device)
    if maps is not None and not model and (channels or score or min_volume is not None):
        raise AnomriError(
            "--channels, --score and --min-volume are a model's; maps are measured as they are."
        )
    detector = Detector.load(model, device, precision) if maps is None or model else None
    if detector and score:
        paper = asdict(Score("absolute")) if score == "paper" else {"kind": score}
        detector = detector.with_score(**paper)
    if detector:
        detector = detector.with_min_volume(min_volume)
    if detector and channels:
        detector = detector.with_channels(names_of(channels) or ())
    arguments = {
        "model": detector,
        "maps": maps,
        "grid": grid,
        "split": split,
        "threshold": threshold,
        "sensitivity": sensitivity,
        "false_positive_ml": false_positive_ml,
    }
    with case_progress(err) as advance:

        def told(case: str, done: int, total: int) -> None:
            advance(case, total)

        if shard:
            failed = evaluate_shard(make_plan(input, output, **arguments), output, shard, told)  # type: ignore[arg-type]
        else:
            evaluation = run(input, output, **arguments, progress=told)  # type: ignore[arg-type]
    if shard:
        out.print(
            f"{failed} cases failed. After the last shard: anomri merge {output}", soft_wrap=True
        )
        raise typer.Exit(1 if failed else 0)
    _print_evaluation(evaluation)
    out.print(f"Look at {output / 'report.html'}", soft_wrap=True)
    raise typer.Exit(1 if evaluation.failed else 0)


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that all shards wrote to.")],
) -> None:
    """Join what `detect --shard` or `evaluate --shard` left in a folder: one set of tables, figures, one report."""
    from anomri.evaluation.merge import merge as run

    failed = run(folder)
    out.print(
        f"All shards are merged, {failed} cases failed. Look at {folder / 'report.html'}",
        soft_wrap=True,
    )
    raise typer.Exit(1 if failed else 0)


@app.command()
def compare(
    input: Cohort,
    output: OutFolder,
    methods: Annotated[
        str, typer.Option(metavar="all|LIST", help="Methods, as dae,vae,thresholding.")
    ] = "all",
    noise_resolution: Annotated[
        Optional[list[str]],
        typer.Option(metavar="LIST", help="Also the dae with these, as 1,2,4; may be given again."),
    ] = None,
    noise_std: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="LIST", help="Also the dae with these, as .05,.1; may be given again."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each (the paper: 3).")] = 1,
    preset: Annotated[str, typer.Option(help="Of every method: paper, small or demo.")] = "small",
    channels: Channels = None,
    steps: Annotated[
        Optional[int], typer.Option(min=1, help="Training steps instead of the presets'.")
    ] = None,
    splits: Annotated[
        Optional[Path], typer.Option(help="Table with columns case, split (train, val, test).")
    ] = None,
    split: Annotated[Optional[str], typer.Option(help="Which cases (default: test).")] = None,
    cache: Annotated[
        Optional[Path], typer.Option(help="Folder for packed slices (default: the user's cache).")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train and evaluate several methods, noise settings and seeds: one table, curves, pictures.

    Stop it when you like: the same command continues, and reuses what is finished.
    """
    from anomri.cli.progress import comparison_progress
    from anomri.comparison.compare import compare as run

    with comparison_progress(err) as progress:
        comparison = run(
            input,
            output,
            methods=methods,
            noise_resolution=numbers_of(noise_resolution, int),
            noise_std=numbers_of(noise_std, float),
            seeds=seeds,
            preset=preset,
            channels=names_of(channels),
            training={"steps": steps} if steps else None,
            splits=splits,
            split=split,
            cache=cache,
            device=device,
            progress=progress,
        )
    out.print((output / "table.md").read_text(encoding="utf-8"), soft_wrap=True)
    out.print(f"Look at {comparison.report}", soft_wrap=True)
    for job, error in comparison.failed.items():
        err.print(f"failed: {job}: {error}", style="red", soft_wrap=True)
    raise typer.Exit(1 if comparison.failed else 0)


def _print_evaluation(evaluation: Evaluation) -> None:
    from rich.table import Table

    table = Table("figure", "value", "95 % interval", title=evaluation.protocol["scored"])
    for figure in evaluation.figures:
        table.add_row(figure.name, f"{figure.value:.3f}", figure.interval)
    out.print(table)
    for what, how in evaluation.protocol.items():
        out.print(f"{what}: {how}", soft_wrap=True)
    for case, error in evaluation.failed.items():
        err.print(f"failed: {case}: {error}", style="red", soft_wrap=True)
