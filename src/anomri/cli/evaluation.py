"""Commands that compare maps with lesion labels: `evaluate`, `merge`, `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from anomri.cli.options import (
    FIND,
    INPUT,
    MEASURE,
    THRESHOLD,
    TRAINING,
    Cache,
    Channels,
    Cohort,
    Device,
    FalsePositiveMl,
    MinVolume,
    Model,
    OutFolder,
    Overwrite,
    Precision,
    Sensitivity,
    Shard,
    SomeChannels,
    Splits,
    Threads,
    command,
    err,
    out,
    parse_channels,
    parse_numbers,
    within,
)
from anomri.scoring import registry as scores

if TYPE_CHECKING:
    from anomri.evaluation.result import Evaluation

Split = Annotated[
    Optional[str],
    typer.Option(
        metavar="NAME",
        help="Which cases: train, val or test (default: test, where there are splits).",
        rich_help_panel=INPUT,
    ),
]
SCORES = ("paper", *(name for name in scores.names() if name != "auto"))


@command(
    MEASURE,
    "anomri evaluate -i labelled -o result -m model",
    "anomri evaluate -i labelled -o result --maps maps_of_another_method",
)
def evaluate(
    input: Cohort,
    output: OutFolder,
    model: Model = None,
    maps: Annotated[
        Optional[Path],
        typer.Option(
            metavar="FOLDER",
            help="Evaluate these maps (<case>_anomaly.nii.gz), by whatever method, instead of a "
            "model's.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    split: Split = None,
    channels: SomeChannels = None,
    grid: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="model: compare on the working grid, as in the paper. input: on the scan's own.",
            rich_help_panel=INPUT,
        ),
    ] = "model",
    threshold: Annotated[
        Optional[float],
        typer.Option(
            metavar="SCORE",
            help="Make masks at this score instead of the model's threshold.",
            rich_help_panel=THRESHOLD,
        ),
    ] = None,
    sensitivity: Sensitivity = None,
    false_positive_ml: FalsePositiveMl = None,
    min_volume: MinVolume = None,
    score: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help=f"Compute maps by this score instead of the model's: {', '.join(SCORES)}.",
            rich_help_panel=THRESHOLD,
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    shard: Shard = None,
) -> None:
    """Compare anomaly maps with lesion labels: AUPRC, Dice and lesion counts, with intervals.

    The maps are a model's, or those of any method. Rerun the same command
    to resume. On several GPUs or machines, start it with torchrun or srun.
    """
    from anomri.cli.progress import case_progress
    from anomri.evaluation.evaluate import evaluate as run
    from anomri.evaluation.evaluate import evaluate_shard
    from anomri.model.detector import Detector
    from anomri.runtime.processes import join_processes

    join_processes(device)
    arguments: dict[str, Any] = {
        "model": Detector.load(model, device, precision) if maps is None or model else None,
        "maps": maps,
        "grid": grid,
        "split": split,
        "threshold": threshold,
        "sensitivity": sensitivity,
        "false_positive_ml": false_positive_ml,
        "min_volume": min_volume,
        "channels": parse_channels(channels),
        "score": score,
        "overwrite": overwrite,
    }
    with case_progress(err, "evaluating") as advance:

        def on_progress(case: str, done: int, total: int) -> None:
            advance(case, total)

        if shard:
            failed = evaluate_shard(input, output, shard, on_progress, **arguments)
        else:
            evaluation = run(input, output, progress=on_progress, **arguments)
    if shard:
        out.print(
            f"{failed} cases failed. After the last shard: anomri merge {output}", soft_wrap=True
        )
        raise typer.Exit(1 if failed else 0)
    _print_evaluation(evaluation)
    out.print(f"Look at {output / 'report.html'}", soft_wrap=True)
    raise typer.Exit(1 if evaluation.failed else 0)


@command(FIND, "anomri merge out", "anomri merge result")
def merge(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder that all parts wrote to.")
    ],
) -> None:
    """Join the parts that `detect --shard` or `evaluate --shard` wrote: tables and a report."""
    from anomri.evaluation.merge import merge as run

    failed = run(folder)
    out.print(
        f"All shards are merged, {failed} cases failed. Look at {folder / 'report.html'}",
        soft_wrap=True,
    )
    raise typer.Exit(1 if failed else 0)


@command(
    MEASURE,
    "anomri compare -i labelled -o result --methods dae,vae,thresholding --seeds 3",
    "anomri compare -i labelled -o result --methods dae --noise-std 0.1,0.2,0.4",
)
def compare(
    input: Cohort,
    output: OutFolder,
    channels: Channels = None,
    splits: Splits = None,
    split: Split = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Methods to compare, as dae,vae,thresholding, or all.",
            rich_help_panel=TRAINING,
        ),
    ] = "all",
    noise_resolution: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="LIST",
            help="Train the dae with these noise resolutions too, in pixels: 1,2,4.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    noise_std: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="LIST",
            help="Train the dae with these noise standard deviations too: 0.1,0.2.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            metavar="N",
            callback=within(1),
            help="Train each method so many times, from different seeds (the paper: 3).",
            rich_help_panel=TRAINING,
        ),
    ] = 1,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Recipe of every method: paper, small or demo; dae also has quick and accurate.",
            rich_help_panel=TRAINING,
        ),
    ] = "small",
    steps: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            callback=within(1),
            help="Training steps (default: the preset's).",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    cache: Cache = None,
) -> None:
    """Train and evaluate several methods on one cohort: one table, curves and pictures.

    Rerun the same command to resume; what is finished is reused.
    """
    from anomri.cli.progress import comparison_progress
    from anomri.comparison.compare import compare as run

    with comparison_progress(err) as progress:
        comparison = run(
            input,
            output,
            methods=methods,
            noise_resolution=parse_numbers(noise_resolution, int),
            noise_std=parse_numbers(noise_std, float),
            seeds=seeds,
            preset=preset,
            channels=parse_channels(channels),
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
