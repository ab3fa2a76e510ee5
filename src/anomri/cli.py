"""The command line: parse, one call, exit code. Torch is imported inside a command only."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from anomri.spec import AnomriError, Interrupted

if TYPE_CHECKING:
    from anomri.pooling import Evaluation

app = typer.Typer(
    help="Find what does not look healthy in a brain MRI, after seeing healthy brains only. Research use; not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)

Cohort = Annotated[
    Path, typer.Option("-i", "--input", metavar="COHORT", help="Folder of scans, or a .tsv that lists them.")
]
Scans = Annotated[Path, typer.Option("-i", "--input", metavar="SCAN|FOLDER|TSV", help="One scan, a folder, or a .tsv.")]
NewModel = Annotated[Path, typer.Option("-o", "--output", metavar="MODEL", help="Folder to write the model to.")]
Model = Annotated[Path, typer.Option("-m", "--model", metavar="MODEL", help="Folder of a trained model.")]
OutFolder = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write to.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Channels = Annotated[
    Optional[str], typer.Option(help="Channels and their order, as flair,t1,t1ce,t2 (default: those found).")
]


@app.command()
def train(
    input: Cohort,
    output: NewModel,
    preset: Annotated[str, typer.Option(help="paper: as published; small: ten minutes on two cores.")] = "small",
    method: Annotated[str, typer.Option(help="dae or thresholding.")] = "dae",
    channels: Channels = None,
    splits: Annotated[Optional[Path], typer.Option(help="Table with columns case, split (train, val, test).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted training.")] = False,
    steps: Annotated[Optional[int], typer.Option(min=1, help="Training steps instead of the preset's.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="Slices a step.")] = None,
    learning_rate: Annotated[Optional[float], typer.Option(min=0.0)] = None,
    precision: Annotated[Optional[str], typer.Option(help="auto, 32-true or bf16-mixed.")] = None,
    seed: Annotated[
        Optional[int], typer.Option(min=0, max=2**31 - 1, help="Of weights, order, noise and random split.")
    ] = None,
    noise_resolution: Annotated[Optional[int], typer.Option(min=1, help="Of the coarse noise, in pixels.")] = None,
    noise_std: Annotated[Optional[float], typer.Option(min=0.0, help="Of the coarse noise.")] = None,
    gain_jitter: Annotated[
        Optional[float],
        typer.Option(min=0.0, max=0.9, help="Multiply channels of training slices by 1 +- this; 0: not."),
    ] = None,
    flip: Annotated[Optional[bool], typer.Option(help="Mirror half of the training slices left to right.")] = None,
    cache: Annotated[Optional[Path], typer.Option(help="Folder for packed slices (default: the user's cache).")] = None,
    data_licence: Annotated[Optional[str], typer.Option(help="Terms of the scans, to stand in model.json.")] = None,
    device: Device = "auto",
) -> None:
    """Train on the healthy slices of a cohort; slices with a labelled lesion are left out."""
    from anomri.progress import training_progress
    from anomri.training import train as run

    changed = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "precision": precision,
        "seed": seed,
    }
    settings = {
        "noise_resolution": noise_resolution,
        "noise_std": noise_std,
        "gain_jitter": gain_jitter,
        "flip": flip,
    }
    with training_progress(err) as progress:
        detector = run(
            input,
            output,
            method=method,
            preset=preset,
            channels=_names(channels),
            settings={name: value for name, value in settings.items() if value is not None},
            training={name: value for name, value in changed.items() if value is not None},
            splits=splits,
            cache=cache,
            resume=resume,
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
            + (f", {cohort.unused_cases} unused (test, or in no split)" if cohort.unused_cases else "")
            + f". Model: {output}",
            highlight=False,
        )


@app.command()
def detect(
    input: Scans,
    output: OutFolder,
    model: Model,
    reconstruction: Annotated[bool, typer.Option("--reconstruction", help="Also write the reconstruction.")] = False,
    device: Device = "auto",
) -> None:
    """Write an anomaly map, a mask and a lesion table for every scan, on its own grid; and a report."""
    from anomri.detection import CaseResult, detect_cohort
    from anomri.detector import Detector
    from anomri.progress import case_progress

    with case_progress(err) as advance:

        def told(result: CaseResult, total: int) -> None:
            advance(result.case, total)
            if result.error:
                err.print(f"failed: {result.error}", style="red", highlight=False, soft_wrap=True, markup=False)

        results = detect_cohort(
            input, output, Detector.load(model, device), reconstruction=reconstruction, progress=told
        )
    failed = sum(result.error is not None for result in results)
    out.print(f"{len(results) - failed} scans done, {failed} failed. Look at {output / 'report.html'}", highlight=False)
    raise typer.Exit(1 if failed else 0)


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
            progress=lambda case, done, total: advance(case, total),
        )
    _print_evaluation(evaluation)
    out.print(f"Look at {output / 'report.html'}", highlight=False)
    raise typer.Exit(1 if evaluation.failed else 0)


@app.command()
def view(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `anomri detect` wrote.")],
    scans: Annotated[
        Optional[Path], typer.Option(metavar="COHORT", help="The scans the maps were made from, to show behind them.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1 (0: a free one).")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Show maps, masks and scans in a page on this machine, to scroll through; Ctrl-C ends it."""
    from anomri.viewer import view as run

    run(
        folder,
        port=port,
        scans=scans,
        open_browser=browser,
        announce=lambda url: out.print(f"{url} (Ctrl-C to stop)", highlight=False, soft_wrap=True, markup=False),
    )


@app.command()
def demo(
    output: OutFolder = Path("anomri-demo"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the synthetic cohort, to try the other commands on.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a synthetic cohort, train on its healthy brains, detect, compare with thresholding, write a report."""
    from anomri.demo import run_demo
    from anomri.progress import training_progress

    with training_progress(err) as progress:
        result = run_demo(output, keep=keep, seed=seed, progress=progress)
    out.print(result.table(), highlight=False)
    out.print(f"Look at {result.report}", highlight=False)
    if keep:
        out.print(
            f"The cohort is in {result.cohort}; try: anomri detect -i {result.cohort} -o out -m {result.model}",
            highlight=False,
        )


@app.command("import-checkpoint")
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="Checkpoint of the program released with the paper.")],
    output: NewModel,
    channels: Channels = None,
) -> None:
    """Turn a checkpoint of the released program into a model folder; no code in it is run."""
    from anomri.checkpoint import RELEASED_CHANNELS
    from anomri.checkpoint import import_checkpoint as run

    detector = run(file, output, _names(channels) or RELEASED_CHANNELS)
    out.print(f"Model: {output} (channels {', '.join(detector.spec.channels)})", highlight=False)


def main(args: list[str] | None = None) -> int:
    """Run the command line with ``args`` (default: the process's); returns the exit code.

    0: all done. 1: some case failed, the others are written. 2: the input or the command does not fit.
    """
    try:
        return int(app(args=args, standalone_mode=False) or 0)
    except AnomriError as error:
        err.print(f"error: {error}", style="red", highlight=False, soft_wrap=True, markup=False)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        err.print(f"error: {where}{error.strerror or error}", style="red", highlight=False, markup=False)
        return 2
    except Interrupted as stopped:
        err.print(str(stopped), highlight=False)
        # A scheduler that ends a job with SIGTERM takes 0 for a clean stop.
        return 0 if stopped.signal == signal.SIGTERM else 130
    except typer.Exit as leaving:
        return int(leaving.exit_code)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own: a wrong option
            err.print(f"error: {error.format_message()}", style="red", highlight=False, markup=False)
            return 2
        raise


def _names(channels: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip().lower() for name in channels.split(",") if name.strip()) if channels else None


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


if __name__ == "__main__":
    sys.exit(main())
