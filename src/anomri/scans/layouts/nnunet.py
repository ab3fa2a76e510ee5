"""A raw data set of nnU-Net: ``imagesTr/<case>_<number>.nii.gz``, ``labelsTr/<case>.nii.gz``.

``dataset.json`` names the channel of each number, and the label's values: all above zero are
lesion, but for those called ``ignore``. Images in ``imagesTs`` are for testing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.files import read_json
from anomri.scans.case import Case
from anomri.scans.cohort import Cohort
from anomri.scans.names import IMAGES, bare_name, described_channel
from anomri.scans.places import Place

NAME = "nnU-Net raw data set"
EXAMPLE = "dataset.json with imagesTr/<case>_0000.nii.gz"

NO_CHANNEL = ("nonorm", "zscore", "rescaleto01", "rescale01", "rgbto01", "ct", "mri", "mr", "image")
"""Names that say how nnU-Net scales an image, or that it is one, not what it shows."""
LABELS_EXAMPLE = "{'background': 0, 'lesion': 1, 'ignore': 2}"


def matches(place: Place) -> bool:
    """Whether there are ``dataset.json`` and ``imagesTr``."""
    return (place.path / "dataset.json").is_file() and (place.path / "imagesTr").is_dir()


def read(place: Place) -> Cohort:
    """The cases for training and testing; raises `AnomriError` if an image has no known channel."""
    description = place.path / "dataset.json"
    facts = read_json(description)
    channels, ignored = _read_channels(description, facts), _read_ignored(description, facts)
    has_test = (place.path / "imagesTs").is_dir()
    cases = _read_part(place.path, "Tr", "train" if has_test else None, channels, ignored)
    if has_test:
        cases += _read_part(place.path, "Ts", "test", channels, ignored)
    return Cohort(NAME, cases, [])


def _read_channels(path: Path, facts: Mapping[str, Any]) -> dict[str, str]:
    """The channel of each number, as ``{"0000": "flair"}``."""
    named = facts.get("channel_names") or facts.get("modality")
    if not isinstance(named, dict) or not all(str(number).isdigit() for number in named):
        raise AnomriError(
            f"{path}: has no channel_names as {{'0': 'FLAIR', ...}}; name them there."
        )
    channels: dict[str, str] = {}
    for number, name in named.items():
        channel = described_channel(str(name))
        is_known = channel in IMAGES
        if not is_known and (channel in NO_CHANNEL or re.search("t1|t2|flair", channel)):
            raise AnomriError(
                f"{path}: channel {number} is called {name!r}, which is not a channel of MRI that is"
                f" known; call it {', '.join(IMAGES)} or by another name of its own."
            )
        channels[f"{int(number):04d}"] = channel
    return channels


def _read_ignored(path: Path, facts: Mapping[str, Any]) -> tuple[int, ...]:
    """The label values that mean "not assessed".

    ``labels`` are names with their values (or, for regions, lists of values), as version 2 of
    nnU-Net has them, or values with their names, as version 1.
    """
    labels = facts.get("labels", {})
    if not isinstance(labels, dict):
        raise AnomriError(f"{path}: labels are not written as {LABELS_EXAMPLE}; write them so.")
    values: dict[str, list[int]] = {}
    for key, value in labels.items():
        is_version_1 = str(key).lstrip("-").isdigit() and isinstance(value, str)
        name, numbers = (value, key) if is_version_1 else (key, value)
        values[str(name).strip().lower()] = _whole_numbers(path, key, numbers)
    if set(values.get("background", [0])) != {0}:
        raise AnomriError(
            f"{path}: background has the value {values['background']}; anomri reads every value"
            " above 0 as lesion. Write labels in which the background is 0."
        )
    return tuple(values.get("ignore", ()))


def _whole_numbers(path: Path, label: str, values: object) -> list[int]:
    try:
        return [int(str(value)) for value in (values if isinstance(values, list) else [values])]
    except ValueError:
        raise AnomriError(
            f"{path}: label {label!r} has no whole number; write labels as {LABELS_EXAMPLE}."
        ) from None


def _read_part(
    folder: Path,
    part: str,
    split: str | None,
    channels: Mapping[str, str],
    ignored: tuple[int, ...],
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
        Case(
            name,
            images.get(name, {}),
            labels.get(name),
            split=split,
            ignored=ignored if name in labels else (),
        )
        for name in {**images, **labels}
    ]
