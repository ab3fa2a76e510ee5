"""What the commands share: the application, its two consoles, and options of several commands."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from anomri.errors import AnomriError
from anomri.runtime.launch import THREADS
from anomri.scans.names import channel_name

if TYPE_CHECKING:
    from anomri.model.detector import Detector

FIND, TRAIN, MEASURE, MORE = "Find lesions", "Train a model", "Measure", "Look around"
"""Panels of the commands, in `anomri --help`."""
INPUT, DICOM, PREPARATION, THRESHOLD = "Input", "DICOM", "Preparation", "Model and threshold"
TRAINING, OUTPUT, MACHINE = "Training", "Output", "Machine"
"""Panels of a command's options, in its `--help`."""
CALM_THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
"""What OpenBLAS and OpenMP read when they are loaded: by default their threads wait busily, and take
a processor from those that work."""


class Command(TyperCommand):
    """A command whose ``--help`` line does not show the type of that option."""

    def get_help_option(self, ctx: Any) -> Any:
        """``--help`` itself."""
        return _without_type(super().get_help_option(ctx))


class Group(TyperGroup):
    """All commands together; see `Command`."""

    def get_help_option(self, ctx: Any) -> Any:
        """``--help`` itself."""
        return _without_type(super().get_help_option(ctx))


def _without_type(option: Any) -> Any:
    if option is not None:
        option.metavar = ""
    return option


out, err = (Console(stderr=stderr, markup=False, highlight=False) for stderr in (False, True))


def flag(name: str, help: str, panel: str | None = None) -> Any:
    """A switch, shown in ``--help`` without a type."""
    return typer.Option(name, help=help, metavar="", rich_help_panel=panel)


app = typer.Typer(
    cls=Group,
    help="Find lesions in brain MRI without lesion labels: anomri learns from healthy brains and "
    "shows what it cannot explain. For research; not a medical device.",
    epilog="Start with: anomri demo (no data needed), or anomri detect -i SCANS -o OUT.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _bare(
    context: typer.Context,
    version: Annotated[bool, flag("--version", "Print the version and exit.")] = False,
) -> None:
    if version:
        from anomri import __version__

        typer.echo(f"anomri {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def command(
    panel: str, *shown: str, name: str | None = None, cls: type[Command] = Command
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command, with examples of it below its ``--help``."""
    return app.command(name, cls=cls, rich_help_panel=panel, epilog=examples(*shown))


def examples(*commands: str) -> str:
    """Commands to show below ``--help``, each on a line of its own.

    >>> examples("anomri demo", "anomri demo --keep").splitlines()
    ['Examples:', '', 'anomri demo', '', 'anomri demo --keep']
    """
    return "\n\n".join(("Examples:", *commands))


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import NumPy, torch and what builds on them in three quarters of the time.

    Nothing that modules make while they are imported is garbage, so Python does not look for it.
    Threads of these libraries then wait without taking a processor (`CALM_THREADS`), unless the
    user has chosen otherwise. Programs that this one starts later decide for themselves.
    """
    added = [name for name in CALM_THREADS if name not in os.environ]
    os.environ.update({name: CALM_THREADS[name] for name in added})
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        for name in added:
            del os.environ[name]


def within(low: float, high: float = math.inf) -> Callable[[Any], Any]:
    """Check that a number is not outside its range; typer's own check clutters ``--help``."""

    def check(value: Any) -> Any:
        if value is not None and not low <= value <= high:
            limit = f"at least {low:g}" if value < low else f"at most {high:.0f}"
            raise typer.BadParameter(f"{value} is not {limit}.")
        return value

    return check


def _set_threads(count: int | None) -> int | None:
    within(1)(count)
    if count is not None:
        # Read by torch when it is imported, and by processes that this one starts.
        os.environ["OMP_NUM_THREADS"] = os.environ[THREADS] = str(count)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(count)
    return count


Cohort = Annotated[
    Path,
    typer.Option(
        "-i",
        "--input",
        metavar="COHORT",
        help="Folder of scans, BIDS dataset, or a .tsv that lists the scans.",
    ),
]
NewModel = Annotated[
    Path, typer.Option("-o", "--output", metavar="MODEL", help="Folder to write the model to.")
]
Model = Annotated[
    Optional[Path],
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="Folder of a trained model, or built-in: the model in the package.",
    ),
]
OutFolder = Annotated[
    Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write to.")
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto (a GPU if there is one), cpu, cuda, cuda:1 (the second GPU) or mps (Apple).",
        rich_help_panel=MACHINE,
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto (bfloat16 where the hardware has it), 32-true or bf16-mixed. The choice changes "
        "maps slightly.",
        rich_help_panel=MACHINE,
    ),
]
Threads = Annotated[
    Optional[int],
    typer.Option(
        metavar="N",
        callback=_set_threads,
        help="Use at most N processor threads (default: all that this process may use).",
        rich_help_panel=MACHINE,
    ),
]
Cache = Annotated[
    Optional[Path],
    typer.Option(
        metavar="FOLDER",
        help="Folder for the prepared slices (default: the user's cache folder).",
        rich_help_panel=MACHINE,
    ),
]
Shard = Annotated[
    Optional[str],
    typer.Option(
        metavar="K/N",
        help="Process only part K of N of the cases, as 3/40 in a job array. After the last part, "
        "`anomri merge` joins the results.",
        rich_help_panel=MACHINE,
    ),
]
Channels = Annotated[
    Optional[str],
    typer.Option(
        metavar="LIST",
        help="Train on these channels, in this order: flair,t1,t1ce,t2 (default: those found).",
        rich_help_panel=INPUT,
    ),
]
SomeChannels = Annotated[
    Optional[str],
    typer.Option(
        "--channels",
        metavar="LIST",
        help="Use only these of the model's channels: flair,t2 (default: all that a scan has).",
        rich_help_panel=INPUT,
    ),
]
Splits = Annotated[
    Optional[Path],
    typer.Option(
        metavar="FILE",
        help="Table with the columns case and split (train, val or test).",
        rich_help_panel=INPUT,
    ),
]
Overwrite = Annotated[
    bool,
    flag("--overwrite", "Replace results that were made with other settings.", OUTPUT),
]
Sensitivity = Annotated[
    Optional[str],
    typer.Option(
        metavar="RATE",
        help="Choose another threshold: the share of healthy voxels above it (0.005 or 0.5%), or "
        "highest, high, default, low, lowest. `anomri info` lists the rates of a model.",
        rich_help_panel=THRESHOLD,
    ),
]
FalsePositiveMl = Annotated[
    Optional[float],
    typer.Option(
        "--false-positive-ml",
        metavar="ML",
        callback=within(0),
        help="Choose the threshold by volume instead: at most this many ml above it in a healthy "
        "scan, on average.",
        rich_help_panel=THRESHOLD,
    ),
]
MinVolume = Annotated[
    Optional[float],
    typer.Option(
        metavar="MM3",
        callback=within(0),
        help="Drop findings below this volume, in mm3 (default: about 70).",
        rich_help_panel=THRESHOLD,
    ),
]


def load_detector(
    model: Path | None,
    device: str,
    precision: str,
    sensitivity: str | None,
    false_positive_ml: float | None,
    min_volume: float | None,
    channels: str | None,
) -> Detector:
    """The model that a command's options ask for; raises `AnomriError`."""
    from anomri.model.detector import Detector

    detector = Detector.load(model, device, precision)
    if channels:
        detector = detector.with_channels(parse_channels(channels) or ())
    return detector.with_threshold(sensitivity, false_positive_ml).with_min_volume(min_volume)


def parse_channels(text: str | None) -> tuple[str, ...] | None:
    """The channels in a comma-separated list, by their canonical names; ``None`` without a list.

    >>> parse_channels("T1w,flair")
    ('t1', 'flair')
    """
    if not text:
        return None
    return tuple(channel_name(name) for name in text.split(",") if name.strip())


Number = TypeVar("Number", int, float)


def parse_numbers(texts: Sequence[str] | None, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers in comma-separated lists; raises `AnomriError` naming what is not a number.

    >>> parse_numbers(["1,2", "4"], int)
    [1, 2, 4]
    """
    parts = [part.strip() for text in texts or () for part in text.split(",") if part.strip()]
    try:
        return [kind(part) for part in parts]
    except ValueError as error:
        raise AnomriError(
            f"{', '.join(parts)}: not a list of numbers ({error}); write it as 1,2,4."
        ) from error


def parse_settings(texts: Sequence[str] | None) -> dict[str, Any]:
    """Settings given as NAME=VALUE; raises `AnomriError` without a ``=``.

    A value is read as JSON, or as True or False, and else as text.

    >>> parse_settings(["noise_std=0.25", "noise=coarse"])
    {'noise_std': 0.25, 'noise': 'coarse'}
    """
    settings: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise AnomriError(f"{text}: not a setting; write it as NAME=VALUE.")
        try:
            settings[name.strip()] = json.loads(value)
        except ValueError:
            settings[name.strip()] = {"True": True, "False": False}.get(value, value)
    return settings
