"""Import of models that the program released with the paper trained."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from anomri.errors import AnomriError, first_line
from anomri.methods import registry as methods
from anomri.methods.networks.unet import rename_released_parameters
from anomri.model.detector import Detector
from anomri.model.files import LOADING_ERRORS
from anomri.scans.case import check_unique
from anomri.spec import ModelSpec

RELEASED_CHANNELS = ("flair", "t1", "t1ce", "t2")
"""Channels of the released program, in its order."""


def import_checkpoint(
    file: str | Path, model: str | Path, channels: Sequence[str] = RELEASED_CHANNELS
) -> Detector:
    """Turn a checkpoint ``{"model_state_dict": ...}`` of the released program into a model folder.

    The file is read with ``weights_only=True``: tensors, and no code. The model has no thresholds,
    since these need healthy scans. Raises `AnomriError` naming what does not fit.
    """
    file, folder = Path(file), Path(model)
    if (folder / "model.json").exists():
        raise AnomriError(f"{folder}: already holds a model; choose another folder with -o.")
    weights, widths, count = _released_network(file)
    check_unique(channels)
    if count != len(channels):
        raise AnomriError(
            f"{file}: has {count} channels, but {len(channels)} are given ({', '.join(channels)}); "
            f"use --channels."
        )
    spec = ModelSpec(
        tuple(channels), "dae", {"widths": widths}, versions={"anomri": version("anomri")}
    )
    network = methods.build(spec)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise AnomriError(
            f"{file}: its parameters do not form the released U-Net ({error})."
        ) from error
    detector = Detector(spec, network)
    detector.save(folder)
    return detector


def _released_network(file: Path) -> tuple[dict[str, Tensor], list[int], int]:
    """The weights by their names here, the U-Net's widths, and its number of channels."""
    state = _read_parameters(file)
    try:
        renamed = rename_released_parameters(state)
        levels = {name.split(".")[1] for name in renamed if name.startswith("encoder.")}
        widths = [
            int(renamed[f"encoder.{level}.conv2.weight"].shape[0]) for level in range(len(levels))
        ]
        count = int(renamed["head.weight"].shape[0])
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise AnomriError(
            f"{file}: is not of the released U-Net: {error.args[0] if error.args else error}."
        ) from error
    return {f"network.{name}": value.float() for name, value in renamed.items()}, widths, count


def _read_parameters(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except LOADING_ERRORS as error:
        raise AnomriError(
            f"{file}: cannot be read as a checkpoint of tensors only ({first_line(error)})."
        ) from error
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(one, Tensor) for one in state.values()):
        raise AnomriError(
            f'{file}: has no {{"model_state_dict": ...}} with the parameters of a network.'
        )
    return state
