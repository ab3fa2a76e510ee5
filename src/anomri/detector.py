"""A trained model at work: load, save, and find what does not look healthy in a scan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cc3d
import edt
import numpy as np
import torch
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from anomri import methods
from anomri.cases import Case, case_of_files, find_cases, read_splits
from anomri.files import output_folder, whole_file, write_text
from anomri.memory import smaller_until_it_fits
from anomri.metrics import box_around, drop_small_components
from anomri.model_files import MAX_TABLE, plain_file, read_model
from anomri.networks import fold_weight_standardisation
from anomri.preparation import Preparation, prepare
from anomri.residual import anomaly_score
from anomri.sensitivity import choose_threshold, confidence
from anomri.slices import SliceStack, brain_box, from_slices, join_boxes, pixels_per_voxel, slice_volume
from anomri.spec import AnomriError, HealthyScores, ModelSpec
from anomri.volume import Geometry, Volume, write_image

INFERENCE_BATCH = 8
"""Slices a forward pass: larger batches leave the processor's cache and are slower."""


@dataclass(frozen=True)
class Lesion:
    """One 26-connected component of a mask; the centroid is in scanner mm (RAS+), the scores are the map's."""

    lesion: int
    volume_mm3: float
    centroid_mm: tuple[float, float, float]
    peak: float
    mean: float
    confidence: float | None = None
    """Share of healthy held-out scans whose peak lies below this one; see `sensitivity.confidence`."""
    edge_distance_mm: float | None = None
    """The smallest distance of a voxel of the lesion from a voxel outside the brain, between their centres."""


@dataclass(frozen=True)
class Detection:
    """What was found in one scan; arrays lie in the working orientation, `save` brings them to the input's grid.

    ``anomaly_map`` (x, y, z) float32, the same scale in every scan of a model; ``mask`` (x, y, z) bool, or
    ``None`` if the model has no threshold; ``reconstruction`` (channels, x, y, z) float32 in the input's
    intensities; ``lesions`` of the mask, largest first. ``stack`` and ``scores`` (n, h, w) are what the method
    saw and gave on the working grid.
    """

    name: str
    spec: ModelSpec
    volume: Volume
    stack: SliceStack
    scores: NDArray[np.float32]
    reconstructed: Tensor
    anomaly_map: NDArray[np.float32]
    mask: NDArray[np.bool_] | None
    lesions: tuple[Lesion, ...]

    @property
    def reconstruction(self) -> NDArray[np.float32]:
        """The reconstruction (channels, x, y, z) in the input's intensities."""
        shape, window = self.volume.geometry.canonical_shape, self.stack.window
        channels = [
            from_slices(self.reconstructed[:, number], shape, window, self.stack.index) * scale
            for number, scale in enumerate(self.stack.scale)
        ]
        return np.stack(channels)

    @property
    def display_range(self) -> tuple[float, float]:
        """Scores between which a viewer shows colour: the same for all scans of a model."""
        thresholds = self.spec.thresholds
        return (thresholds.value[0], 2 * thresholds.value[-1]) if thresholds else (0.0, 0.5)

    def save(self, folder: str | Path, *, reconstruction: bool = False) -> list[Path]:
        """Write ``<name>_anomaly.nii.gz``, ``_mask.nii.gz``, ``.json`` and what is asked for; returns their paths.

        Images lie on the input's own grid with its header's both forms and codes. Every file is whole or not
        there. Raises `AnomriError` naming the file that cannot be written.
        """
        folder, geometry = output_folder(Path(folder)), self.volume.geometry
        written = [folder / f"{self.name}_anomaly.nii.gz"]
        write_image(written[0], self.anomaly_map, geometry, self.display_range)
        if self.mask is not None:
            written.append(folder / f"{self.name}_mask.nii.gz")
            write_image(written[-1], self.mask.astype(np.uint8), geometry, (0, 1))
        if reconstruction:
            written.append(folder / f"{self.name}_reconstruction.nii.gz")
            write_image(written[-1], self.reconstruction, geometry)
        written.append(folder / f"{self.name}.json")
        write_text(written[-1], json.dumps(self.summary(), indent=2) + "\n")
        return written

    def summary(self) -> dict[str, Any]:
        """What ``<name>.json`` says: channels, threshold, lesions; plain numbers and strings."""
        return {
            "case": self.name,
            "channels": list(self.volume.channels),
            "method": self.spec.method,
            "threshold": self.spec.thresholds.threshold if self.spec.thresholds else None,
            "voxel_false_positive_rate": self.spec.thresholds.voxel_rate if self.spec.thresholds else None,
            "false_positive_ml": self.spec.thresholds.chosen_ml if self.spec.thresholds else None,
            "peak": float(self.anomaly_map.max()),
            "lesion_volume_mm3": sum(lesion.volume_mm3 for lesion in self.lesions),
            "lesions": [asdict(lesion) for lesion in self.lesions],
            "notes": list(self.volume.notes),
            "anomri": version("anomri"),
        }


class Detector:
    """A model ready to find anomalies: its specification and its method with weights.

    ``Detector.load(folder)`` reads a model folder; `detect` takes one scan. Use `anomri.load` for short.
    """

    def __init__(self, spec: ModelSpec, method: nn.Module, device: str | torch.device = "cpu") -> None:
        self.spec = spec
        self.device = torch.device(device)
        self._batch = INFERENCE_BATCH
        self.splits: dict[str, str] = {}
        """Which cases the model was trained on and held out, if its folder says so."""
        # Kept for `save`: folding changes the filters in place.
        self._state = {name: value.detach().cpu().clone() for name, value in method.state_dict().items()}
        self.method: Any = fold_weight_standardisation(method).eval().to(self.device)

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of all that decides what is found in a scan: specification and weights."""
        return hashlib.sha256(self.spec.to_json().encode() + save_tensors(self._state)).hexdigest()

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> Detector:
        """Read ``model.json`` and ``weights.safetensors``; nothing in a model folder is executed.

        ``device`` is ``cpu``, ``cuda``, ``mps`` or ``auto``, which takes a GPU where there is one.

        Raises `AnomriError` naming the file that is missing, damaged or does not fit.
        """
        folder = Path(folder)
        spec, method, state = read_model(folder)
        try:
            method.load_state_dict(state)
        except RuntimeError as error:
            raise AnomriError(
                f"{folder / 'weights.safetensors'}: does not hold the weights that model.json describes ({error})."
            ) from error
        detector = cls(spec, method, resolve_device(device))
        if (folder / "splits.csv").is_file():
            detector.splits = read_splits(plain_file(folder / "splits.csv", MAX_TABLE))
        return detector

    def detect(
        self, scan: Case | Volume | Mapping[str, str | Path] | str | Path, preparation: Preparation = Preparation()
    ) -> Detection:
        """Find anomalies in one scan: a `Case`, a `Volume`, a file per channel, or a path that is one case.

        ``preparation`` says what is done to files before (a `Volume` is taken as it is). Raises `AnomriError` if
        the scan lacks a channel of the model or cannot be read.
        """
        volume = scan if isinstance(scan, Volume) else self.read(scan, preparation)
        stack = slice_volume(volume, self.spec.grid, self.spec.scaling)
        before = self._batch
        scores, reconstructed = self.score(stack)
        if self._batch < before:
            note = f"memory was short: the network takes {self._batch} slices at once from here on, not {before}."
            volume = replace(volume, notes=(*volume.notes, note))
        shape = volume.geometry.canonical_shape
        anomaly_map = from_slices(torch.from_numpy(scores), shape, stack.window, stack.index)
        mask: NDArray[np.bool_] | None = None
        lesions: tuple[Lesion, ...] = ()
        if self.spec.thresholds is not None:
            mask = anomaly_map > self.spec.thresholds.threshold
            per_voxel = pixels_per_voxel(volume.geometry, self.spec.grid)
            mask = drop_small_components(mask, self.spec.score.max_dropped_voxels * per_voxel)
            lesions = find_lesions(mask, anomaly_map, volume.geometry, volume.data, self.spec.thresholds.healthy)
        return Detection(volume.name, self.spec, volume, stack, scores, reconstructed, anomaly_map, mask, lesions)

    def with_threshold(
        self, sensitivity: str | float | None = None, false_positive_ml: float | None = None
    ) -> Detector:
        """The same model with another of its label-free thresholds; see `sensitivity.choose_threshold`."""
        detector = copy(self)
        thresholds = choose_threshold(self.spec.thresholds, sensitivity, false_positive_ml)
        detector.spec = replace(self.spec, thresholds=thresholds)
        return detector

    def find_cases(self, cohort: str | Path) -> list[Case]:
        """`cases.find_cases`, but one file for a model of one channel is that channel, whatever its name."""
        cases = find_cases(cohort)
        if Path(cohort).is_file() and len(self.spec.channels) == len(cases) == len(cases[0].channels) == 1:
            (path,) = cases[0].channels.values()
            return [Case(cases[0].name, {self.spec.channels[0]: path})]
        return cases

    def read(
        self, scan: Case | Mapping[str, str | Path] | str | Path, preparation: Preparation = Preparation()
    ) -> Volume:
        """Read the model's channels of one scan, prepared."""
        if isinstance(scan, Mapping):
            scan = case_of_files(scan)
        if not isinstance(scan, Case):
            cases = self.find_cases(scan)
            if len(cases) > 1:
                raise AnomriError(f"{scan}: holds {len(cases)} cases; name one, or loop over find_cases.")
            scan = cases[0]
        channels = self.spec.channels
        missing = [channel for channel in channels if channel not in scan.channels]
        if missing:
            raise AnomriError(
                f"{scan.name}: this model was trained on {', '.join(channels)}, but the scan has "
                f"{', '.join(scan.channels) or 'no channel'}; {', '.join(missing)} is missing. Name the files "
                f"<case>_<channel>.nii.gz, or train a model with --channels {','.join(scan.channels)}."
            )
        return prepare(scan, channels, self.spec.grid, preparation)

    def score(self, stack: SliceStack) -> tuple[NDArray[np.float32], Tensor]:
        """Anomaly scores (n, h, w) and reconstruction (n, c, h, w) of a scan's slices, on the working grid."""
        raw, reconstructed = self.raw_score(stack)
        return anomaly_score(raw, stack.foreground, self.spec.score), reconstructed

    def raw_score(self, stack: SliceStack) -> tuple[Tensor, Tensor]:
        """Scores before erosion and median (n, h, w), and reconstruction (n, c, h, w), of a scan's slices."""
        box = self._box(stack)
        reconstructed = torch.empty_like(stack.x)

        def reconstruct(size: int) -> None:
            for start in range(0, len(stack.x), size):
                part = slice(start, start + size)
                reconstructed[part] = self.method.reconstruct(stack.x[part].to(self.device), box).cpu()

        # Not inference mode: a method may follow gradients to its reconstruction.
        with torch.no_grad():
            self._batch = smaller_until_it_fits(reconstruct, self._batch)
            raw = self.method.raw_score(stack.x, reconstructed, stack.foreground)
        # Outside the brain a method is free to make up anything; nobody should see it.
        reconstructed *= stack.foreground[:, None]
        return raw, reconstructed

    def save(self, folder: str | Path) -> None:
        """Write the model folder that `load` reads."""
        write_model(Path(folder), self.spec, self._state)

    def with_spec(self, spec: ModelSpec) -> Detector:
        """The same weights with another specification, say another score; raises `AnomriError` if they do not fit."""
        method = methods.build(spec)
        try:
            method.load_state_dict(self._state)
        except RuntimeError as error:
            raise AnomriError(f"the weights of {self.spec.method} do not fit {spec.method} ({error}).") from error
        return Detector(spec, method, self.device)

    def _box(self, stack: SliceStack) -> tuple[int, int, int, int] | None:
        if self.spec.crop is None:
            return None
        return join_boxes(self.spec.crop, brain_box(stack.foreground, 1), self.method.box_multiple, self.spec.grid.size)


def resolve_device(device: str) -> torch.device:
    """The device of that name, ``auto`` being the fastest one here; raises `AnomriError` if it is not here."""
    if device == "auto":
        return torch.device(
            torch.accelerator.current_accelerator() or "cpu" if torch.accelerator.is_available() else "cpu"
        )
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise AnomriError(f"the device {device!r} cannot be used ({reason}); try --device cpu.") from error


def load(folder: str | Path, device: str = "auto") -> Detector:
    """Read a model folder that `anomri.train` or ``anomri import-checkpoint`` wrote; see `Detector.load`."""
    return Detector.load(folder, device)


def write_model(folder: Path, spec: ModelSpec, state: dict[str, Tensor]) -> None:
    """Write a model folder; ``model.json`` comes last, so that a folder that has one is complete."""
    output_folder(folder)
    with whole_file(folder / "weights.safetensors") as partial:
        partial.write_bytes(save_tensors({name: value.contiguous().cpu() for name, value in state.items()}))
    write_text(folder / "model.json", spec.to_json())


def find_lesions(
    mask: NDArray[np.bool_],
    anomaly_map: NDArray[np.float32],
    geometry: Geometry,
    data: NDArray[np.float32] | None = None,
    healthy: HealthyScores | None = None,
) -> tuple[Lesion, ...]:
    """The 26-connected components of a mask (x, y, z) in the working orientation, largest first.

    The scan's ``data`` (channels, x, y, z), zero outside the brain, gives their distance from its edge, and what the
    model knows of ``healthy`` scans their confidence; without, these are ``None``.
    """
    components = cc3d.connected_components(mask.astype(np.uint8), connectivity=26)
    inside = components[mask].astype(np.int64)
    if not inside.size:
        return ()
    scores = anomaly_map[mask]
    counts = np.bincount(inside)[1:]
    means = np.bincount(inside, weights=scores)[1:] / counts
    peaks = np.zeros(len(counts) + 1)
    np.maximum.at(peaks, inside, scores)
    distances = None if data is None else smallest_edge_distances(components, data, geometry.spacing_mm)
    centroids = cc3d.statistics(components)["centroids"][1:]
    centroids_mm = apply_affine(geometry.canonical_affine, centroids).round(2)
    largest_first = np.argsort(-counts, kind="stable")
    return tuple(
        Lesion(
            number,
            round(float(counts[k] * geometry.voxel_mm3), 3),
            tuple(centroids_mm[k].tolist()),
            float(peaks[k + 1]),
            float(means[k]),
            confidence(float(peaks[k + 1]), healthy),
            None if distances is None else round(float(distances[k]), 2),
        )
        for number, k in enumerate(largest_first, start=1)
    )


def smallest_edge_distances(
    components: NDArray[np.integer[Any]], data: NDArray[np.float32], spacing_mm: tuple[float, float, float]
) -> NDArray[np.float64]:
    """For every component 1, 2, ... of (x, y, z), its smallest distance in mm from a voxel outside the brain.

    Distances are those between centres of voxels. The brain is where any channel of ``data`` is above zero, with its
    holes; what lies beyond the image is outside.
    """
    brain = np.zeros(np.add(data.shape[1:], 2), dtype=bool)
    brain[1:-1, 1:-1, 1:-1] = (data > 0).any(axis=0) | (components > 0)
    box = tuple(slice(side.start - 1, side.stop + 1) for side in box_around(brain))
    air = cc3d.connected_components((~brain[box]).astype(np.uint8), connectivity=6)
    distance = edt.edt(np.ascontiguousarray(air != air[0, 0, 0]), anisotropy=spacing_mm, parallel=1)
    inner = components[tuple(slice(side.start, side.stop - 2) for side in box)]
    smallest = np.full(int(components.max()) + 1, np.inf)
    np.minimum.at(smallest, inner[inner > 0], distance[1:-1, 1:-1, 1:-1][inner > 0])
    return smallest[1:]
