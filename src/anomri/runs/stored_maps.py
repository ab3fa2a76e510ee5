"""Maps that an earlier run left: another threshold makes masks of them, without the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.runs.identity import hash_file
from anomri.runs.ledger import DAMAGED, Ledger
from anomri.scans.nifti import read_image, read_values
from anomri.scans.volume import Volume

OF_THRESHOLD = ("sensitivity", "false_positive_ml", "min_volume")
"""Settings of a run that change what is made of a map, but not the map."""


def map_facts(map_file: Path, folder: Path) -> dict[str, str]:
    """What an entry of the ledger notes of a map that was written: its place and its content."""
    return {"file": map_file.relative_to(folder).as_posix(), "content": hash_file(map_file)}


def map_serves(ledger: Ledger, case: str) -> bool:
    """Whether an earlier run left the map of this scan, and only its threshold was another.

    The content of the map is not looked at.
    """
    entry = ledger.same_scan(case)
    if entry is None or entry.get("error") or not isinstance(entry.get("map"), dict):
        return False
    if ledger.task.is_served_by(entry["task"]):
        return False  # its files were lost: that has another cause than a threshold
    return ledger.task.is_served_by(_with_settings(entry["task"], ledger.task.to_json()))


def stored_map(ledger: Ledger, case: str, volume: Volume) -> NDArray[np.float32] | None:
    """The map (x, y, z) of a case in the working orientation, if it `map_serves` and is unchanged.

    A map of a scan that was registered lies on another grid than the one it was made on, and does
    not serve.
    """
    if not map_serves(ledger, case) or volume.geometry.working is not None:
        return None
    entry = ledger.stored(case)
    assert entry is not None
    path = ledger.root / entry["map"]["file"]
    try:
        if hash_file(path) != entry["map"]["content"]:
            return None
        values = read_values(read_image(path))
    except (OSError, AnomriError):
        return None
    if values.shape != volume.geometry.shape:
        return None
    return np.ascontiguousarray(volume.geometry.canonical(values.astype(np.float32, copy=False)))


def _with_settings(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The ``stored`` task as it would be with the threshold of the task of ``now``."""
    try:
        chosen = {name: now["settings"][name] for name in OF_THRESHOLD if name in now["settings"]}
        return {**stored, "settings": {**stored["settings"], **chosen}}
    except DAMAGED:
        return {}
