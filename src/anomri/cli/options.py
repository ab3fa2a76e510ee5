"""What the commands share: their application, the two consoles, and options that several of them have."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

import typer
from rich.console import Console

from anomri.errors import AnomriError
from anomri.scans.names import channel_name

if TYPE_CHECKING:
    from anomri.model.detector import Detector

app = typer.Typer(
    help="Find what does not look healthy in a brain MRI, after seeing healthy brains only. Research use; not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = (Console(stderr=stderr, markup=False, highlight=False) for stderr in (False, True))

Cohort = Annotated[
    Path,
    typer.Option(
        "-i",
        "--input",
        metavar="COHORT",
        help="Folder of scans, BIDS data set, or .tsv that lists them.",
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
        help="Folder of a trained model (default: the one in the package).",
    ),
]
OutFolder = Annotated[
    Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write to.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Precision = Annotated[
    str,
    typer.Option(
        help="auto (bfloat16 where the hardware has it), 32-true or bf16-mixed; maps differ slightly."
    ),
]
Channels = Annotated[
    Optional[str],
    typer.Option(help="Channels and their order, as flair,t1,t1ce,t2 (default: those found)."),
]
SomeChannels = Annotated[
    Optional[str],
    typer.Option("--channels", help="Look at these of the model's channels only, as flair,t2."),
]
Sensitivity = Annotated[
    Optional[str],
    typer.Option(
        metavar="RATE|NAME",
        help="Voxel false positive rate of the mask in healthy tissue, one that the model stores (as 0.005 or 0.5%), "
        "or highest, high, default, low, lowest.",
    ),
]
Shard = Annotated[
    Optional[str],
    typer.Option(
        metavar="K/N", help="Do only the K-th of N shares of the cases; `anomri merge` joins them."
    ),
]
FalsePositiveMl = Annotated[
    Optional[float],
    typer.Option(
        "--false-positive-ml",
        min=0.0,
        help="Instead: the volume above the threshold in a mean healthy scan.",
    ),
]
MinVolume = Annotated[
    Optional[float],
    typer.Option(
        metavar="MM3",
        min=0.0,
        help="Keep components of at least this volume (default: some 70, as --false-positive-ml reckons).",
    ),
]


def detector_of(
    model: Path | None,
    device: str,
    precision: str,
    sensitivity: str | None,
    false_positive_ml: float | None,
    min_volume: float | None,
    channels: str | None,
) -> Detector:
    """The model of a command, as the options of these names ask for it; raises `AnomriError`."""
    from anomri.model.detector import Detector

    detector = Detector.load(model, device, precision)
    if channels:
        detector = detector.with_channels(names_of(channels) or ())
    return detector.with_threshold(sensitivity, false_positive_ml).with_min_volume(min_volume)


def names_of(channels: str | None) -> tuple[str, ...] | None:
    """The channels in a list with commas, by their names here; ``None`` if nothing is given."""
    return (
        tuple(channel_name(name) for name in channels.split(",") if name.strip())
        if channels
        else None
    )


Number = TypeVar("Number", int, float)


def numbers_of(texts: Sequence[str] | None, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers in lists with commas; raises `AnomriError` naming what is none."""
    parts = [part.strip() for text in texts or () for part in text.split(",") if part.strip()]
    try:
        return [kind(part) for part in parts]
    except ValueError as error:
        raise AnomriError(
            f"{', '.join(parts)}: not a list of numbers as 1,2,4 ({error})."
        ) from error


def settings_of(texts: Sequence[str] | None) -> dict[str, Any]:
    """Settings from NAME=VALUE, the value as JSON (or True, False) if it is that, else as text; `AnomriError` without a ``=``."""
    settings: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise AnomriError(f"{text}: not a setting as NAME=VALUE.")
        try:
            settings[name.strip()] = json.loads(value)
        except ValueError:
            settings[name.strip()] = {"True": True, "False": False}.get(value, value)
    return settings
