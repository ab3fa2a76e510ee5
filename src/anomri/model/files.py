"""Model folders, read as if a stranger sent them: JSON and tensors, no code, bounded memory."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from anomri.errors import AnomriError
from anomri.files import output_folder, whole_file, write_text
from anomri.methods import registry as methods
from anomri.methods.base import Method
from anomri.scans.case import Case
from anomri.scans.names import channel_name
from anomri.scans.splits import read_split_cases
from anomri.scoring.positions import unpack_maps
from anomri.spec import FORMAT_VERSION, ModelSpec

MAX_DESCRIPTION = 2**20
"""Bytes of a ``model.json``; the usual ones have some thousand."""
MAX_TABLE = 2**26
"""Bytes of a ``splits.csv``."""
MAX_HEADER = 2**20
"""Bytes of a weights file beyond its tensors."""
MAX_NUMBER, MAX_LENGTH, MAX_SIDE = 10**6, 64, 4096
"""Limits for a setting, for the length of a list of them, and for a side of the working grid."""
LOADING_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    UnpicklingError,
)
"""What ``torch.load`` raises for files that are damaged, or not its own."""
BUILDING_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    LookupError,
    AttributeError,
)
"""What building a method raises for a description that does not make sense."""


def read_model(folder: Path) -> tuple[ModelSpec, Method, dict[str, Tensor]]:
    """The specification of a model folder, its method without weights, and the weights.

    Nothing in the folder is executed. The method is measured before it is built: a description
    that asks for more memory than the weights file holds is refused. Raises `AnomriError` naming
    the file that is missing, damaged, a device or a pipe, or does not fit.
    """
    description, weights = folder / "model.json", folder / "weights.safetensors"
    if not description.is_file():
        raise AnomriError(
            f"{folder}: has no model.json; give a folder that `anomri train` or "
            f"`import-checkpoint` wrote."
        )
    check_regular_file(description, MAX_DESCRIPTION)
    spec = _with_known_channel_names(ModelSpec.read(description))
    if spec.format_version > FORMAT_VERSION:
        raise AnomriError(f"{folder}: was written by a newer version of anomri; update anomri.")
    try:
        size = _bytes(_build_without_memory(spec, description))
        content = check_regular_file(weights, size + MAX_HEADER).read_bytes()
        # Buffers that are not saved must be in proportion to the weights.
        if size > 2 * len(content) + MAX_HEADER:
            raise ValueError(
                f"it describes {size:,} bytes of numbers, but the weights have {len(content):,}"
            )
        method = _build(spec, description)
    except BUILDING_ERRORS as error:
        raise AnomriError(f"{description}: does not describe a model ({error}).") from error
    except OSError as error:
        raise AnomriError(f"{weights}: cannot be read ({error.strerror}).") from error
    try:
        tensors = load_tensors(content)
    except SafetensorError as error:
        raise AnomriError(
            f"{weights}: does not contain the weights that model.json describes ({error})."
        ) from error
    for name, value in tensors.items():
        # Infinity is a number: a method may keep one in its state.
        if value.is_floating_point() and value.isnan().any():
            raise AnomriError(f"{weights}: is damaged ({name} contains NaN); copy it again.")
    return spec, method, tensors


def check_readable(spec: ModelSpec) -> None:
    """Raise `AnomriError` if `read_model` would refuse a model like this, before it is trained."""
    try:
        method = _build_without_memory(spec, Path("model.json"))
        size = _bytes(method)
        saved = sum(value.nbytes for value in method.state_dict().values())
        if size > 2 * saved + MAX_HEADER or saved > size + MAX_HEADER:
            raise ValueError(
                f"it has {size:,} bytes of parameters and buffers, and saves {saved:,}"
            )
    except BUILDING_ERRORS as error:
        raise AnomriError(
            f"a model of {spec.method} with these settings could not be read again ({error})."
        ) from error


def _build_without_memory(spec: ModelSpec, description: Path) -> Method:
    """The method on torch's ``meta`` device, to see how large it would be."""
    _check_limits(spec)
    with torch.device("meta"):
        return _build(spec, description)


def _bytes(method: Method) -> int:
    return sum(value.nbytes for value in [*method.parameters(), *method.buffers()])


def _build(spec: ModelSpec, description: Path) -> Method:
    try:
        return methods.build(spec)
    except AnomriError as error:
        raise AnomriError(f"{description}: {error}") from error


def _with_known_channel_names(spec: ModelSpec) -> ModelSpec:
    """The same with the channel names that scans have here (`names.ALIASES`)."""

    def names(channels: Iterable[str]) -> tuple[str, ...]:
        return tuple(map(channel_name, channels))

    if names(spec.channels) == spec.channels:
        return spec
    settings = dict(spec.settings)
    for name in ("alone", "network_channels"):
        if name in settings:
            settings[name] = list(names(settings[name]))
    return replace(
        spec,
        channels=names(spec.channels),
        settings=settings,
        score=replace(spec.score, channels=names(spec.score.channels)),
        subset_thresholds={
            "+".join(names(subset.split("+"))): thresholds
            for subset, thresholds in spec.subset_thresholds.items()
        },
    )


def write_model(folder: Path, spec: ModelSpec, state: dict[str, Tensor]) -> None:
    """Write a model folder; ``model.json`` comes last, so a folder that has one is complete."""
    output_folder(folder)
    with whole_file(folder / "weights.safetensors") as partial:
        partial.write_bytes(
            save_tensors({name: value.contiguous().cpu() for name, value in state.items()})
        )
    write_text(folder / "model.json", spec.to_json())


def read_model_cases(folder: Path) -> list[Case]:
    """The cases that a model was trained on or held out, without files; none if it does not say."""
    splits = folder / "splits.csv"
    return read_split_cases(check_regular_file(splits, MAX_TABLE)) if splits.is_file() else []


def check_regular_file(path: Path, limit: int) -> Path:
    """``path``, if it is a regular file of at most ``limit`` bytes; else raises `AnomriError`.

    The file is not opened.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise AnomriError(f"{path}: cannot be read ({error.strerror}).") from error
    if not stat.S_ISREG(facts.st_mode):
        raise AnomriError(
            f"{path}: is not a regular file but a folder, a pipe or a device, or a link to one; "
            f"it is not read."
        )
    if facts.st_size > limit:
        raise AnomriError(
            f"{path}: has {facts.st_size:,} bytes, more than the {limit:,} that this model can "
            f"need; it is not read."
        )
    return path


def _check_limits(spec: ModelSpec) -> None:
    """Raise ``ValueError`` for sizes that cost time or memory, and tables that do not fit."""
    if not all(1 <= side <= MAX_SIDE for side in spec.grid.size):
        raise ValueError(f"its working grid is {spec.grid.size}")
    for thresholds in filter(None, (spec.thresholds, *spec.subset_thresholds.values())):
        rates, healthy = thresholds.false_positive_rate, thresholds.healthy
        volumes = healthy.false_positive_ml if healthy else ()
        if (
            len(thresholds.value) != len(rates)
            or thresholds.default_rate not in rates
            or thresholds.asked_rate not in (None, *rates)
            or thresholds.asked_ml not in (None, *volumes)
        ):
            raise ValueError("its thresholds do not fit each other")
    if spec.score.healthy_maps:
        unpack_maps(spec.score.healthy_maps, len(spec.channels))
    for name, value in {**spec.settings, **vars(spec.score)}.items():
        _check_setting(name, value)


def _check_setting(name: str, value: object) -> None:
    if isinstance(value, list | tuple | dict):
        if len(value) > MAX_LENGTH:
            raise ValueError(f"its setting {name} has {len(value):,} entries")
        for entry in value.values() if isinstance(value, dict) else value:
            _check_setting(name, entry)
    elif isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise ValueError(f"its setting {name} is {value:.4g}")
