"""Commands that make a model: `train`, `import-checkpoint`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from anomri.cli.options import (
    MACHINE,
    OUTPUT,
    TRAIN,
    TRAINING,
    Cache,
    Channels,
    Cohort,
    Device,
    NewModel,
    Splits,
    Threads,
    command,
    err,
    flag,
    out,
    parse_channels,
    parse_settings,
    within,
)
from anomri.methods.registry import PLACES
from anomri.scoring import registry as scores

METHOD = "Method"
"""Panel of the options that change the method and its score."""


@command(
    TRAIN,
    "anomri train -i cohort -o model --preset quick",
    "anomri train -i cohort -o model --pretrained built-in --steps 2000",
)
def train(
    input: Cohort,
    output: NewModel,
    channels: Channels = None,
    splits: Splits = None,
    preset: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help="Recipe. small (default): the paper's method, 15 minutes on two cores. quick: "
            "better, 30 minutes. accurate: best, 2 hours. paper: as published, needs a GPU.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    pretrained: Annotated[
        Optional[list[Path]],
        typer.Option(
            metavar="MODEL",
            help="Start from this trained model, with its recipe; built-in: the model in the "
            "package. Repeat it to start from the mean of several models' weights.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    resume: Annotated[
        bool, flag("--resume", "Continue an interrupted training.", TRAINING)
    ] = False,
    steps: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            callback=within(1),
            help="Training steps (default: the preset's).",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            callback=within(1),
            help="Slices per step (default: the preset's).",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    accumulate: Annotated[
        int,
        typer.Option(
            metavar="N",
            callback=within(1),
            help="Gradient accumulation: process each batch in N parts. Needs less memory and "
            "gives the same model.",
            rich_help_panel=TRAINING,
        ),
    ] = 1,
    learning_rate: Annotated[
        Optional[float],
        typer.Option(
            metavar="RATE",
            callback=within(0),
            help="Learning rate at its highest (default: the preset's).",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    validate_every: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            callback=within(1),
            help="Steps between validations; the weights with the lowest validation loss are kept.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Annotated[
        Optional[int],
        typer.Option(
            metavar="N",
            callback=within(0, 2**31 - 1),
            help="Seed of all that is random: weights, order, noise and the split.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    method: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help=f"One of {', '.join(sorted(PLACES))} (default: dae).",
            rich_help_panel=METHOD,
        ),
    ] = None,
    noise_resolution: Annotated[
        Optional[int],
        typer.Option(
            metavar="PIXELS",
            callback=within(1),
            help="Resolution of the coarse noise that the dae learns to remove.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    noise_std: Annotated[
        Optional[float],
        typer.Option(
            metavar="STD",
            callback=within(0),
            help="Standard deviation of that noise.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    grid: Annotated[
        Optional[int],
        typer.Option(
            metavar="PIXELS",
            callback=within(16),
            help="Width and height of the slices that the network sees, as 192.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    score: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help=f"How residuals become an anomaly map: {', '.join(scores.names())} (default: the "
            "preset's).",
            rich_help_panel=METHOD,
        ),
    ] = None,
    set_: Annotated[
        Optional[list[str]],
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Another setting of the method, as noise_std=0.25; repeat it for more.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    data_licence: Annotated[
        Optional[str],
        typer.Option(
            metavar="TEXT",
            help="Terms of use of the scans, to store in model.json.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME",
            help="auto (bfloat16 where the hardware has it), 32-true or bf16-mixed (default: the "
            "preset's).",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    threads: Threads = None,
    cache: Cache = None,
    subsets: Annotated[
        Optional[bool],
        flag(
            "--subsets/--no-subsets",
            "Choose thresholds for scans that lack some of the channels (default: if that takes no "
            "longer than a tenth of the training).",
            TRAINING,
        ),
    ] = None,
) -> None:
    """Train a model on a cohort of healthy scans, or of scans with lesion labels.

    Slices with a labelled lesion are left out. A scan without a label counts
    as healthy. Continue an interrupted training with --resume.

    On several GPUs or machines: torchrun --nproc-per-node N -m anomri train
    ..., or srun anomri train ...
    """
    from anomri.cli.progress import training_progress
    from anomri.training.train import train as run

    with training_progress(err) as progress:
        detector = run(
            input,
            output,
            method=method,
            preset=preset,
            pretrained=pretrained,
            channels=parse_channels(channels),
            settings=_given(noise_resolution=noise_resolution, noise_std=noise_std)
            | parse_settings(set_),
            training=_given(
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                validate_every=validate_every,
                precision=precision,
                seed=seed,
            ),
            score=_given(kind=score),
            grid=grid,
            splits=splits,
            cache=cache,
            resume=resume,
            accumulate=accumulate,
            subsets=subsets,
            device=device,
            data_licence=data_licence,
            progress=progress,
        )
    cohort = detector.spec.cohort
    if cohort is None:
        return
    unused = f", {cohort.unused_cases} unused (test, or in no split)" if cohort.unused_cases else ""
    out.print(
        f"Trained on {cohort.training_slices:,} healthy slices of {cohort.training_cases} cases "
        f"({cohort.left_out_slices:,} slices with a labelled lesion were left out), "
        f"{cohort.validation_cases} cases held out{unused}. Model: {output}",
        soft_wrap=True,
    )


def _given(**options: Any) -> dict[str, Any]:
    """The options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


@command(
    TRAIN,
    "anomri import-checkpoint checkpoint.pt -o model",
    "anomri import-checkpoint checkpoint.pt -o model --channels flair,t1,t2",
    name="import-checkpoint",
)
def import_checkpoint(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Checkpoint of the program released with the paper."),
    ],
    output: NewModel,
    channels: Annotated[
        Optional[str],
        typer.Option(metavar="LIST", help="Its channels in order (default: flair,t1,t1ce,t2)."),
    ] = None,
) -> None:
    """Turn a checkpoint of the paper's program into a model folder; no code in it is run.

    Such a model has no threshold: it writes maps, but no masks.
    """
    from anomri.model.released import RELEASED_CHANNELS
    from anomri.model.released import import_checkpoint as run

    detector = run(file, output, parse_channels(channels) or RELEASED_CHANNELS)
    out.print(f"Model: {output} (channels {', '.join(detector.spec.channels)})", soft_wrap=True)
