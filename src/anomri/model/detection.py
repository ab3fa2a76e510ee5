"""What was found in one scan, and its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from anomri.errors import AnomriError
from anomri.files import has_key, output_folder, write_text
from anomri.model.lesions import Lesion, lesion_labels
from anomri.runtime.folders import refuse_foreign
from anomri.scans.case import Case
from anomri.scans.names import OUTPUTS, SUMMARY_KEY
from anomri.scans.nifti import read_image, read_values, write_image
from anomri.scans.volume import Volume
from anomri.slices import SliceStack, from_slices
from anomri.spec import ModelSpec

BRIGHTEST_RATE = 0.0005
"""Colours end at twice the score that so many healthy voxels exceed, or as few as the model
stores."""

Kind = Literal["anomaly", "mask", "lesions", "reconstruction"]


def refuse_foreign_results(folder: Path, cases: Sequence[Case]) -> None:
    """Raise `AnomriError` if a result of one of the ``cases`` would overwrite a file that anomri
    did not write.

    A ``_mask.nii.gz`` may be a brain mask, and a ``.json`` a converter's. Images count as anomri's
    where the case's summary or anomaly map lies beside them, a summary by its content.
    """
    for case in cases:
        *images, summary = _result_files(folder, case.name)
        has_summary = has_key(summary, SUMMARY_KEY)
        if has_summary:
            continue
        foreign = [summary] if images[-1].exists() else [summary, *images]
        # A run that was killed has written no summary; a label has another content than its mask.
        lesions, mask = (folder / f"{case.name}_{kind}.nii.gz" for kind in ("lesions", "mask"))
        if lesions.exists() and not _numbers_components(lesions, mask):
            foreign.append(lesions)
        refuse_foreign(foreign, is_own=lambda path: False)


def _numbers_components(lesions: Path, mask: Path) -> bool:
    """Whether an image is above zero exactly where ``mask`` is, as the lesions of a run are."""
    try:
        numbered, marked = (read_values(read_image(path)) > 0 for path in (lesions, mask))
    except AnomriError:
        return False
    return bool(np.array_equal(numbered, marked))


def remove_results(folder: Path, case: str, kept: Sequence[Path] = ()) -> None:
    """Remove the results of an earlier run of a case, but those ``kept``: all that stay are of one
    model."""
    for path in _result_files(folder, case):
        if path not in kept:
            path.unlink(missing_ok=True)


def _result_files(folder: Path, case: str) -> list[Path]:
    """All files that may hold results of a case; the anomaly map and the summary come last."""
    endings = ("_mask.dcm", *(f"_{kind}.nii.gz" for kind in reversed(OUTPUTS)), ".json")
    return [folder / f"{case}{ending}" for ending in endings]


@dataclass(frozen=True)
class Detection:
    """What was found in one scan; arrays lie in the working orientation, LPS, and `image` and
    `save` on the input's grid.

    ``anomaly_map`` (x, y, z) float32, the same scale in every scan of a model; ``mask`` (x, y, z)
    bool, or ``None`` if the model has no threshold; ``reconstruction`` (channels, x, y, z) float32
    in the input's intensities; ``lesions`` of the mask, largest first. ``stack`` and ``scores`` (n,
    h, w) are what the method saw and gave on the working grid. ``spec`` is the model's, its
    thresholds those for the channels that the scan has, and ``threshold`` the score that made the
    mask. ``reconstructed`` is ``None`` if the map was a stored one; ``scores`` are then the map,
    brought back to the working grid.
    """

    name: str
    spec: ModelSpec
    volume: Volume
    stack: SliceStack
    scores: NDArray[np.float32]
    reconstructed: Tensor | None
    anomaly_map: NDArray[np.float32]
    threshold: float | None
    mask: NDArray[np.bool_] | None
    lesions: tuple[Lesion, ...]

    @property
    def channels(self) -> tuple[str, ...]:
        """Those of the model's channels that the scan has, and that were looked at."""
        return self.volume.present

    @property
    def reconstruction(self) -> NDArray[np.float32]:
        """The reconstruction of the scan's ``channels``, (channels, x, y, z) in the input's
        intensities.

        Raises `AnomriError` if the map was a stored one: only the network can make it.
        """
        if self.reconstructed is None:
            raise AnomriError(
                f"{self.name}: was made from a stored map, which holds no reconstruction; detect in "
                f"the scan again."
            )
        shape, stack = self.volume.geometry.canonical_shape, self.stack
        found = []
        for name in self.channels:
            number = self.volume.channels.index(name)
            slices = stack.scale[number].inverse(self.reconstructed[:, number], stack.foreground)
            found.append(from_slices(slices, shape, stack.window, stack.index))
        return np.stack(found)

    @property
    def display_range(self) -> tuple[float, float]:
        """Scores between which a viewer shows colour: the same for all scans of a model."""
        thresholds = self.spec.thresholds
        if thresholds is None:
            return (0.0, 0.5)
        rates = zip(thresholds.false_positive_rate, thresholds.value, strict=True)
        return thresholds.value[0], 2 * max(
            value for rate, value in rates if rate >= BRIGHTEST_RATE
        )

    def image(self, kind: Kind = "anomaly") -> nib.Nifti1Image:
        """The image that `save` writes of that kind, on the input's own grid.

        Raises `AnomriError` if there is no such kind, or no mask because the model has no
        threshold.
        """
        image = self._image(kind)
        # Read back: then its affine is what its header, whose forms and codes are the input's,
        # says.
        return type(image).from_bytes(image.to_bytes())

    def _image(self, kind: Kind) -> nib.Nifti1Image:
        geometry = self.volume.geometry
        if kind not in OUTPUTS:
            raise AnomriError(
                f"{self.name}: there is no image {kind!r}; the images are {', '.join(OUTPUTS)}."
            )
        if kind == "anomaly":
            return geometry.to_image(self.anomaly_map, self.display_range)
        if kind == "reconstruction":
            return geometry.to_image(self.reconstruction)
        if self.mask is None:
            raise AnomriError(f"{self.name}: the model has no threshold, so there is no mask.")
        if kind == "mask":
            return geometry.to_image(self.mask.astype(np.uint8), (0, 1))
        return geometry.to_image(lesion_labels(self.mask), (0, max(1, len(self.lesions))))

    def save(self, folder: str | Path, *, reconstruction: bool = False) -> list[Path]:
        """Write ``<name>_anomaly.nii.gz``, ``_mask``, ``_lesions`` and ``<name>.json``; returns
        their paths.

        Images lie on the input's own grid, with both forms and the codes of its header. In
        ``_lesions`` each lesion has its number as value. With ``reconstruction``, that is written
        too. Files are written atomically. Raises `AnomriError` naming the file that cannot be
        written.
        """
        folder = output_folder(Path(folder))
        kinds: list[Kind] = ["anomaly"]
        if self.mask is not None:
            kinds += ["mask", "lesions"]
        if reconstruction:
            kinds.append("reconstruction")
        written = [folder / f"{self.name}_{kind}.nii.gz" for kind in kinds]
        for kind, path in zip(kinds, written, strict=True):
            write_image(path, self._image(kind))
        summary = folder / f"{self.name}.json"
        write_text(summary, json.dumps(self.summary(), indent=2) + "\n")
        return [*written, summary]

    def summary(self) -> dict[str, Any]:
        """What ``<name>.json`` says: channels, threshold, lesions; plain numbers and strings."""
        stored = self.spec.thresholds
        chosen = stored if stored and self.threshold == stored.threshold else None
        return {
            "case": self.name,
            "channels": list(self.channels),
            "method": self.spec.method,
            "threshold": self.threshold,
            "voxel_false_positive_rate": chosen.voxel_rate if chosen else None,
            "false_positive_ml": chosen.asked_ml if chosen else None,
            "peak": float(self.anomaly_map.max()),
            "lesion_volume_mm3": sum(lesion.volume_mm3 for lesion in self.lesions),
            "lesions": [asdict(lesion) for lesion in self.lesions],
            "notes": list(self.volume.notes),
            "anomri": version("anomri"),
        }
