"""A raw data set of nnU-Net: ``imagesTr/<case>_<number>.nii.gz``, ``labelsTr/<case>.nii.gz``.

``dataset.json`` names the channel of each number. Images in ``imagesTs`` are for testing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from anomri.errors import AnomriError
from anomri.files import read_json
from anomri.scans.case import Case
from anomri.scans.cohort import Cohort
from anomri.scans.names import bare_name, channel_name
from anomri.scans.places import Place

NAME = "nnU-Net raw data set"
EXAMPLE = "dataset.json with imagesTr/<case>_0000.nii.gz"


def matches(place: Place) -> bool:
    """Whether there are ``dataset.json`` and ``imagesTr``."""
    return (place.path / "dataset.json").is_file() and (place.path / "imagesTr").is_dir()


def read(place: Place) -> Cohort:
    """The cases for training and testing; raises `AnomriError` if an image has no known channel."""
    channels = _read_channels(place.path / "dataset.json")
    if not (place.path / "imagesTs").is_dir():
        return Cohort(NAME, _read_part(place.path, "Tr", None, channels), [])
    train = _read_part(place.path, "Tr", "train", channels)
    return Cohort(NAME, train + _read_part(place.path, "Ts", "test", channels), [])


def _read_channels(path: Path) -> dict[str, str]:
    """The channel of each number, as ``{"0000": "flair"}``."""
    facts = read_json(path)
    named = facts.get("channel_names") or facts.get("modality")
    if not isinstance(named, dict) or not all(str(number).isdigit() for number in named):
        raise AnomriError(
            f"{path}: has no channel_names as {{'0': 'FLAIR', ...}}; name them there."
        )
    return {
        f"{int(number):04d}": channel_name(re.sub("[^a-z0-9]", "", str(name).lower()))
        for number, name in named.items()
    }


def _read_part(
    folder: Path, part: str, split: str | None, channels: Mapping[str, str]
) -> list[Case]:
    images: dict[str, dict[str, Path]] = {}
    for path in Place(folder / f"images{part}").images:
        name, _, number = bare_name(path).rpartition("_")
        if number not in channels:
            raise AnomriError(
                f"{path}: does not end in one of {', '.join(channels)}, as dataset.json has them;"
                " write one 3D file for each."
            )
        other = images.setdefault(name, {}).setdefault(channels[number], path)
        if other is not path:
            raise AnomriError(
                f"{other} and {path} are both {channels[number]} of {name}; name each channel once."
            )
    labels = {bare_name(path): path for path in Place(folder / f"labels{part}").images}
    return [
        Case(name, images.get(name, {}), labels.get(name), split=split)
        for name in {**images, **labels}
    ]
