"""Models of the program released with the paper, as model folders of this package."""

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


def import_checkpoint(
    file: str | Path, model: str | Path, channels: Sequence[str] = RELEASED_CHANNELS
) -> Detector:
    """Turn a checkpoint ``{"model_state_dict": ...}`` of the released program into the model folder ``model``.

    The file is read with ``weights_only=True``: tensors, and no code. The model has no label-free thresholds,
    since those need healthy scans. Raises `AnomriError` naming what does not fit.
    """
    file, folder = Path(file), Path(model)
    if (folder / "model.json").exists():
        raise AnomriError(f"{folder}: already holds a model; name another folder with -o.")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except LOADING_ERRORS as error:
        raise AnomriError(
            f"{file}: cannot be read as a checkpoint of tensors alone ({first_line(error)})."
        ) from error
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise AnomriError(
            f'{file}: holds no {{"model_state_dict": ...}} with the parameters of a network.'
        )
    try:
        renamed = rename_released_parameters(state)
        widths = [
            int(renamed[f"encoder.{k}.conv2.weight"].shape[0]) for k in range(_levels(renamed))
        ]
        count = int(renamed["head.weight"].shape[0])
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise AnomriError(
            f"{file}: is not of the released U-Net: {error.args[0] if error.args else error}."
        ) from error
    check_unique(channels)
    if count != len(channels):
        raise AnomriError(
            f"{file}: has {count} channels, but {len(channels)} are named ({', '.join(channels)}); use --channels."
        )
    spec = ModelSpec(
        tuple(channels), "dae", {"widths": widths}, versions={"anomri": version("anomri")}
    )
    network = methods.build(spec)
    try:
        network.load_state_dict(
            {f"network.{name}": value.float() for name, value in renamed.items()}
        )
    except RuntimeError as error:
        raise AnomriError(
            f"{file}: its parameters do not form the released U-Net ({error})."
        ) from error
    detector = Detector(spec, network)
    detector.save(folder)
    return detector


def _levels(state: dict[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("encoder.")})
