"""Model folders as a stranger may hand them over: tensors and JSON, and never more memory than their files are large."""

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
from anomri.scoring.positions import unpacked_maps
from anomri.spec import FORMAT_VERSION, ModelSpec

MAX_DESCRIPTION = 2**20
"""Bytes of a ``model.json``; those written here have some thousand."""
MAX_TABLE = 2**26
MAX_HEADER = 2**20
"""Bytes of a weights file beyond its tensors."""
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
"""What ``torch.load`` makes of bytes that are none of its own, or damaged."""
MAX_NUMBER, MAX_LENGTH, MAX_SIDE = 10**6, 64, 4096
"""How large a setting, how long a list of them, and how wide a working grid may be."""


def read_model(folder: Path) -> tuple[ModelSpec, Method, dict[str, Tensor]]:
    """The specification of a model folder, its method without weights, and the weights; nothing in it is executed.

    Before anything is built it is seen, without memory, how large it would be: a description that asks for more than
    the weights file holds is refused. Raises `AnomriError` naming the file that is missing, damaged, a device or a
    pipe, or does not fit.
    """
    description, weights = folder / "model.json", folder / "weights.safetensors"
    if not description.is_file():
        raise AnomriError(
            f"{folder}: holds no model.json; name a folder that `anomri train` or `import-checkpoint` wrote."
        )
    plain_file(description, MAX_DESCRIPTION)
    spec = _as_named_here(ModelSpec.read(description))
    if spec.format_version > FORMAT_VERSION:
        raise AnomriError(
            f"{folder}: was written by a newer anomri; update with pip install --upgrade anomri."
        )
    try:
        size = _bytes(_outline(spec, description))
        content = plain_file(weights, size + MAX_HEADER).read_bytes()
        # What the method keeps beside its weights is made anew, and has to be in proportion.
        if size > 2 * len(content) + MAX_HEADER:
            raise ValueError(
                f"it describes {size:,} bytes of numbers, but the weights have {len(content):,}"
            )
        method = _built(spec, description)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        ArithmeticError,
        MemoryError,
        LookupError,
        AttributeError,
    ) as error:
        raise AnomriError(f"{description}: does not describe a model ({error}).") from error
    except OSError as error:
        raise AnomriError(f"{weights}: cannot be read ({error.strerror}).") from error
    try:
        tensors = load_tensors(content)
    except SafetensorError as error:
        raise AnomriError(
            f"{weights}: does not hold the weights that model.json describes ({error})."
        ) from error
    broken = [
        name for name, value in tensors.items() if value.is_floating_point() and value.isnan().any()
    ]
    if broken:
        raise AnomriError(
            f"{weights}: is damaged ({broken[0]} holds what is no number); copy it again."
        )
    return spec, method, tensors


def check_readable(spec: ModelSpec) -> None:
    """Raise `AnomriError` if `read_model` would refuse a model of this specification: before it is trained, not after."""
    try:
        outline = _outline(spec, Path("model.json"))
        size, kept = _bytes(outline), sum(value.nbytes for value in outline.state_dict().values())
        if size > 2 * kept + MAX_HEADER or kept > size + MAX_HEADER:
            raise ValueError(f"it has {size:,} bytes of parameters and buffers, and saves {kept:,}")
    except (
        TypeError,
        ValueError,
        RuntimeError,
        ArithmeticError,
        LookupError,
        AttributeError,
    ) as error:
        raise AnomriError(
            f"a model of {spec.method} like this could not be read again ({error})."
        ) from error


def _outline(spec: ModelSpec, description: Path) -> Method:
    """The method without memory for its values, to see how large it would be."""
    _modest(spec)
    with torch.device("meta"):
        return _built(spec, description)


def _bytes(method: Method) -> int:
    return sum(value.nbytes for value in [*method.parameters(), *method.buffers()])


def _built(spec: ModelSpec, description: Path) -> Method:
    try:
        return methods.build(spec)
    except AnomriError as error:
        raise AnomriError(f"{description}: {error}") from error


def _as_named_here(spec: ModelSpec) -> ModelSpec:
    """The same with its channels by the names that scans' are given (`names.ALIASES`)."""

    def names(channels: Iterable[str]) -> tuple[str, ...]:
        return tuple(map(channel_name, channels))

    if names(spec.channels) == spec.channels:
        return spec
    named = ("alone", "network_channels")
    settings = {
        k: list(names(value)) if k in named else value for k, value in spec.settings.items()
    }
    thresholds = {
        "+".join(names(part.split("+"))): one for part, one in spec.subset_thresholds.items()
    }
    score = replace(spec.score, channels=names(spec.score.channels))
    return replace(
        spec,
        channels=names(spec.channels),
        settings=settings,
        subset_thresholds=thresholds,
        score=score,
    )


def write_model(folder: Path, spec: ModelSpec, state: dict[str, Tensor]) -> None:
    """Write a model folder; ``model.json`` comes last, so that a folder that has one is complete."""
    output_folder(folder)
    with whole_file(folder / "weights.safetensors") as partial:
        partial.write_bytes(
            save_tensors({name: value.contiguous().cpu() for name, value in state.items()})
        )
    write_text(folder / "model.json", spec.to_json())


def cases_of_model(folder: Path) -> list[Case]:
    """The cases that a model was trained on and held out, without their files; none where its folder does not say."""
    splits = folder / "splits.csv"
    return read_split_cases(plain_file(splits, MAX_TABLE)) if splits.is_file() else []


def plain_file(path: Path, limit: int) -> Path:
    """``path``, if it is a file of at most ``limit`` bytes; raises `AnomriError` otherwise, before it is opened."""
    try:
        facts = path.stat()
    except OSError as error:
        raise AnomriError(f"{path}: cannot be read ({error.strerror}).") from error
    if not stat.S_ISREG(facts.st_mode):
        raise AnomriError(
            f"{path}: is no plain file but a folder, a pipe or a device, or a link to one; refused."
        )
    if facts.st_size > limit:
        raise AnomriError(
            f"{path}: has {facts.st_size:,} bytes, more than the {limit:,} that make sense; refused."
        )
    return path


def _modest(spec: ModelSpec) -> None:
    """Raise ``ValueError`` for what no model has: sizes that cost time or memory wherever they are used, broken maps."""
    for side in spec.grid.size:
        if not 1 <= side <= MAX_SIDE:
            raise ValueError(f"its working grid is {spec.grid.size}")
    for one in filter(None, (spec.thresholds, *spec.subset_thresholds.values())):
        if (
            len(one.value) != len(one.false_positive_rate)
            or one.chosen not in one.false_positive_rate
        ):
            raise ValueError("its thresholds do not belong together")
    if spec.score.healthy_maps:
        unpacked_maps(spec.score.healthy_maps, len(spec.channels))
    for name, value in {**spec.settings, **vars(spec.score)}.items():
        _modest_value(name, value)


def _modest_value(name: str, value: object) -> None:
    if isinstance(value, list | tuple | dict):
        if len(value) > MAX_LENGTH:
            raise ValueError(f"its setting {name} has {len(value):,} entries")
        for one in value.values() if isinstance(value, dict) else value:
            _modest_value(name, one)
    elif isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise ValueError(f"its setting {name} is {value:.4g}")
