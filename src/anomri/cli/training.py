"""Commands that make a model: `train`, `import-checkpoint`, `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from anomri.cli.options import (
    Channels,
    Cohort,
    Device,
    NewModel,
    OutFolder,
    app,
    err,
    names_of,
    out,
    settings_of,
)
from anomri.methods import registry as methods
from anomri.scoring import registry as scores


@app.command()
def train(
    input: Cohort,
    output: NewModel,
    preset: Annotated[
        Optional[str],
        typer.Option(
            help="paper: as published; small (default): the same in a quarter of an hour on two cores; quick: better, half "
            "an hour; accurate: best, two hours."
        ),
    ] = None,
    method: Annotated[
        Optional[str],
        typer.Option(help=f"One of {', '.join(methods.names())} (default: dae)."),
    ] = None,
    pretrained: Annotated[
        Optional[list[Path]],
        typer.Option(
            metavar="MODEL",
            help="Go on from a trained model, by its own recipe; built-in: the one in the package. Given again: from the "
            "mean of their weights.",
        ),
    ] = None,
    channels: Channels = None,
    splits: Annotated[
        Optional[Path], typer.Option(help="Table with columns case, split (train, val, test).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted training.")
    ] = False,
    steps: Annotated[
        Optional[int], typer.Option(min=1, help="Training steps instead of the preset's.")
    ] = None,
    accumulate: Annotated[
        int,
        typer.Option(
            min=1,
            help="Take each process's share of a batch in so many parts: less memory, same model.",
        ),
    ] = 1,
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="Slices a step.")] = None,
    learning_rate: Annotated[Optional[float], typer.Option(min=0.0)] = None,
    validate_every: Annotated[
        Optional[int],
        typer.Option(min=1, help="Steps between validations; the weights of the best are kept."),
    ] = None,
    precision: Annotated[Optional[str], typer.Option(help="auto, 32-true or bf16-mixed.")] = None,
    seed: Annotated[
        Optional[int],
        typer.Option(min=0, max=2**31 - 1, help="Of weights, order, noise and random split."),
    ] = None,
    noise_resolution: Annotated[
        Optional[int], typer.Option(min=1, help="Of the coarse noise, in pixels.")
    ] = None,
    noise_std: Annotated[
        Optional[float], typer.Option(min=0.0, help="Of the coarse noise.")
    ] = None,
    grid: Annotated[
        Optional[int], typer.Option(min=16, help="Pixels of a side of the working grid, as 192.")
    ] = None,
    score: Annotated[
        Optional[str],
        typer.Option(
            help=f"How residuals become a map: {', '.join(scores.names())} (default: the preset's)."
        ),
    ] = None,
    passes: Annotated[
        Optional[int],
        typer.Option(min=0, help="Average so many reconstructions of the noised scan."),
    ] = None,
    set_: Annotated[
        Optional[list[str]],
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the method, as noise_std=0.25; may be given again.",
        ),
    ] = None,
    cache: Annotated[
        Optional[Path], typer.Option(help="Folder for packed slices (default: the user's cache).")
    ] = None,
    data_licence: Annotated[
        Optional[str], typer.Option(help="Terms of the scans, to stand in model.json.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train on the healthy slices of a cohort; slices with a labelled lesion are left out.

    On several GPUs or machines: torchrun --nproc-per-node N -m anomri train ..., or srun anomri train ...
    """
    from anomri.cli.progress import training_progress
    from anomri.training.train import train as run

    changed = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "validate_every": validate_every,
        "precision": precision,
        "seed": seed,
    }
    settings = {
        "noise_resolution": noise_resolution,
        "noise_std": noise_std,
    }
    with training_progress(err) as progress:
        detector = run(
            input,
            output,
            method=method,
            preset=preset,
            pretrained=pretrained,
            channels=names_of(channels),
            settings={name: value for name, value in settings.items() if value is not None}
            | settings_of(set_),
            training={name: value for name, value in changed.items() if value is not None},
            score={
                name: value
                for name, value in {"kind": score, "passes": passes}.items()
                if value is not None
            },
            grid=grid,
            splits=splits,
            cache=cache,
            resume=resume,
            accumulate=accumulate,
            device=device,
            data_licence=data_licence,
            progress=progress,
        )
    cohort = detector.spec.cohort
    if cohort:
        out.print(
            f"Trained on {cohort.training_slices:,} healthy slices of {cohort.training_cases} cases "
            f"({cohort.left_out_slices:,} slices with a labelled lesion were left out), "
            f"{cohort.validation_cases} cases held out"
            + (
                f", {cohort.unused_cases} unused (test, or in no split)"
                if cohort.unused_cases
                else ""
            )
            + f". Model: {output}",
            soft_wrap=True,
        )


@app.command()
def demo(
    output: OutFolder = Path("anomri-demo"),
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Keep the synthetic cohort, to try the other commands on."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a synthetic cohort, train on its healthy brains, detect, compare with thresholding, write a report."""
    from anomri.cli.progress import training_progress
    from anomri.demo.run import run_demo

    with training_progress(err) as progress:
        result = run_demo(output, keep=keep, seed=seed, progress=progress)
    out.print(result.table())
    out.print(f"Look at {result.report}", soft_wrap=True)
    if keep:
        out.print(
            f"The cohort is in {result.cohort}; try: anomri detect -i {result.cohort} -o out -m {result.model}",
            soft_wrap=True,
        )


@app.command("import-checkpoint")
def import_checkpoint(
    file: Annotated[
        Path, typer.Argument(help="Checkpoint of the program released with the paper.")
    ],
    output: NewModel,
    channels: Channels = None,
) -> None:
    """Turn a checkpoint of the released program into a model folder; no code in it is run."""
    from anomri.model.released import RELEASED_CHANNELS
    from anomri.model.released import import_checkpoint as run

    detector = run(file, output, names_of(channels) or RELEASED_CHANNELS)
    out.print(f"Model: {output} (channels {', '.join(detector.spec.channels)})", soft_wrap=True)
