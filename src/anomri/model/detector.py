"""A trained model at work: load, save, and find what does not look healthy in a scan."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nibabel.spatialimages import SpatialImage
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors
from torch import Tensor

from anomri.errors import AnomriError
from anomri.files import output_folder
from anomri.methods import registry as methods
from anomri.methods.base import Method
from anomri.model.detection import Detection
from anomri.model.files import read_model, read_model_cases, write_model
from anomri.model.inference import Inference
from anomri.model.lesions import Lesion, find_lesions
from anomri.model.reading import find_cases_for, read_case
from anomri.model.sensitivity import choose_nearest_threshold, choose_threshold
from anomri.runtime.devices import resolve_device
from anomri.scans.case import Case, case_from_files
from anomri.scans.names import channel_name
from anomri.scans.nifti import as_files
from anomri.scans.prepare import Preparation
from anomri.scans.splits import splits_by_name, write_splits
from anomri.scans.volume import Volume
from anomri.scoring.filters import anomaly_score
from anomri.scoring.metrics import drop_small_components
from anomri.scoring.scores import check_score, check_values, raw_score
from anomri.slices import (
    SliceStack,
    brain_box,
    from_slices,
    join_boxes,
    present_channels,
    slice_volume,
    to_slices,
)
from anomri.spec import ModelSpec, Thresholds

BUILT_IN = Path(__file__).parents[1] / "pretrained" / "brats18"
"""The model that comes with the package; ``MODEL_CARD.md`` beside it says what it is for and where
it fails."""
BUILT_IN_NAME = "built-in"
"""What `BUILT_IN` may be called in place of its folder."""
Source = str | Path | SpatialImage


def model_folder(model: str | Path | None) -> Path:
    """The folder of a model: `BUILT_IN` for ``None`` and ``built-in``."""
    return BUILT_IN if model is None or str(model) == BUILT_IN_NAME else Path(model)


class Detector:
    """A model ready to find anomalies: its specification and its method with weights.

    ``Detector.load(folder)`` reads a model folder; `detect` takes one scan. Use `anomri.load` for
    short.
    """

    def __init__(
        self,
        spec: ModelSpec,
        method: Method,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        cases: Sequence[Case] = (),
    ) -> None:
        self.spec = spec
        self.channels = spec.channels
        """The channels of the model that are looked at; see `with_channels`."""
        self.cases = cases
        """The cases that the model was trained on and that were held out, if its folder names them;
        maybe without files."""
        # For `save`: folding changes the filters in place.
        self._state = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in method.state_dict().items()
        }
        self.inference = Inference(method, device, precision)

    @property
    def device(self) -> torch.device:
        """The device it computes on."""
        return self.inference.device

    @property
    def method(self) -> Method:
        """The method with its weights, `unet.fold_weight_standardisation` done."""
        return self.inference.method

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of all that decides what is found in a scan: specification and weights."""
        seen = self.spec.to_json() + "+".join(self.channels)
        if self.inference.precision != "auto":
            seen += self.inference.precision
        return hashlib.sha256(seen.encode() + save_tensors(self._state)).hexdigest()

    @property
    def splits(self) -> dict[str, str]:
        """Which cases and patients the model was trained on and held out
        (`splits.splits_by_name`)."""
        return splits_by_name(self.cases)

    @property
    def thresholds(self) -> Thresholds | None:
        """The model's thresholds for scans that have all the channels that are looked at."""
        return self.spec.thresholds_for(self.channels)

    @property
    def takes_subsets(self) -> bool:
        """Whether a scan may lack some of the channels."""
        return self.method.takes_subsets

    @classmethod
    def load(
        cls, folder: str | Path | None = None, device: str = "auto", precision: str = "auto"
    ) -> Detector:
        """Read ``model.json`` and ``weights.safetensors``; nothing in a model folder is executed.

        ``folder`` is by default, or as ``built-in``, the model that comes with the package
        (`BUILT_IN`, research use). ``device`` is ``cpu``, ``cuda``, ``cuda:1``, ``mps`` or
        ``auto``, which takes a GPU where there is one. ``precision`` is ``auto``, which computes in
        bfloat16 where the hardware has it, ``32-true`` or ``bf16-mixed``.

        Raises `AnomriError` naming the file that is missing, damaged or does not fit.
        """
        folder = model_folder(folder)
        spec, method, state = read_model(folder)
        try:
            method.load_state_dict(state)
        except RuntimeError as error:
            raise AnomriError(
                f"{folder / 'weights.safetensors'}: does not contain the weights that model.json describes "
                f"({error})."
            ) from error
        return cls(spec, method, resolve_device(device), precision, read_model_cases(folder))

    def detect(
        self,
        scan: Case | Volume | Mapping[str, Source] | Source,
        preparation: Preparation = Preparation(),
        *,
        threshold: float | None = None,
        name: str | None = None,
    ) -> Detection:
        """Find anomalies in one scan: a `Case`, a `Volume`, a file per channel, or a path that is
        one case.

        A file may also be an image of nibabel; a single one is the model's only channel, or FLAIR.
        ``name`` names such scans and their results. ``preparation`` is done to files first (a
        `Volume` is used as it is). ``threshold`` makes the mask instead of the model's own
        threshold. Raises `AnomriError` if the scan lacks a channel of the model or cannot be read.
        """
        volume = scan if isinstance(scan, Volume) else self.read(scan, preparation, name)
        volume, stack = self._slices(volume)
        batch = self.inference.batch
        scores, reconstructed = self.score(stack)
        if self.inference.batch < batch:
            note = (
                f"memory was short: the network takes {self.inference.batch} slices at once from here "
                f"on, not {batch}."
            )
            volume = replace(volume, notes=(*volume.notes, note))
        shape = volume.geometry.canonical_shape
        anomaly_map = from_slices(torch.from_numpy(scores), shape, stack.window, stack.index)
        return self._find(volume, stack, anomaly_map, threshold, scores, reconstructed)

    def detect_in_map(self, volume: Volume, anomaly_map: NDArray[np.float32]) -> Detection:
        """What `detect` finds in a scan whose ``anomaly_map`` this model made before.

        No network is needed: mask and lesions are those of the model's threshold, to the byte. The
        map is (x, y, z) in the working orientation. The result has no reconstruction.
        """
        volume, stack = self._slices(volume)
        scores = to_slices(anomaly_map[None], stack.window, self.spec.grid, stack.index)[:, 0]
        return self._find(volume, stack, anomaly_map, None, scores.numpy(), None)

    def _slices(self, volume: Volume) -> tuple[Volume, SliceStack]:
        """The volume without channels that are not looked at, and its slices."""
        if volume.channels != self.spec.channels:
            raise AnomriError(
                f"{volume.name}: the volume's channels are {', '.join(volume.channels)}, the model's "
                f"{', '.join(self.spec.channels)}; read it with the model's `read`, or add the missing "
                f"ones with `Volume.completed`."
            )
        volume = volume.without([name for name in volume.present if name not in self.channels])
        return volume, slice_volume(volume, self.spec.grid, self.spec.scaling)

    def _find(
        self,
        volume: Volume,
        stack: SliceStack,
        anomaly_map: NDArray[np.float32],
        threshold: float | None,
        scores: NDArray[np.float32],
        reconstructed: Tensor | None,
    ) -> Detection:
        """Mask and lesions of a map, by the model's threshold unless another is given."""
        spec = replace(self.spec, thresholds=self.spec.thresholds_for(volume.present))
        if threshold is None and spec.thresholds is not None:
            threshold = spec.thresholds.threshold
        mask: NDArray[np.bool_] | None = None
        lesions: tuple[Lesion, ...] = ()
        if threshold is not None:
            threshold = float(threshold)
            dropped = spec.score.max_dropped(stack.spacing_mm, volume.geometry.voxel_mm3)
            mask = drop_small_components(anomaly_map > threshold, dropped)
            healthy = spec.thresholds.healthy if spec.thresholds else None
            lesions = find_lesions(mask, anomaly_map, volume.geometry, volume.foreground, healthy)
        return Detection(
            name=volume.name,
            spec=spec,
            volume=volume,
            stack=stack,
            scores=scores,
            reconstructed=reconstructed,
            anomaly_map=anomaly_map,
            threshold=threshold,
            mask=mask,
            lesions=lesions,
        )

    def with_threshold(
        self, sensitivity: str | float | None = None, false_positive_ml: float | None = None
    ) -> Detector:
        """The same model with another of its label-free thresholds, for all subsets of its
        channels.

        See `sensitivity.choose_threshold`. There is to choose from what the model stores for the
        channels that are looked at; a subset that does not store it has its own default.
        """
        choose_threshold(self.thresholds, sensitivity, false_positive_ml)
        chosen = {
            names: choose_nearest_threshold(stored, sensitivity, false_positive_ml)
            for names, stored in self.spec.subset_thresholds.items()
        }
        detector = copy(self)
        detector.spec = replace(
            self.spec,
            thresholds=self.spec.thresholds
            and choose_nearest_threshold(self.spec.thresholds, sensitivity, false_positive_ml),
            subset_thresholds={names: one for names, one in chosen.items() if one},
        )
        return detector

    def with_min_volume(self, mm3: float | None) -> Detector:
        """The same model, whose masks keep components of at least this volume; ``None``: as it was
        trained."""
        detector = copy(self)
        if mm3 is not None:
            detector.spec = replace(self.spec, score=replace(self.spec.score, min_volume_mm3=mm3))
        return detector

    def with_channels(self, names: Sequence[str]) -> Detector:
        """The same model, looking only at these of its channels, with the `thresholds` for them.

        Raises `AnomriError` if the model has no such channel, or was not trained to do without the
        others.
        """
        names = [channel_name(name) for name in names]
        chosen = tuple(name for name in self.spec.channels if name in names)
        if not chosen or len(chosen) < len(set(names)):
            raise AnomriError(
                f"the model's channels are {', '.join(self.spec.channels)}; {', '.join(names)} is not a subset of "
                f"these."
            )
        if chosen != self.spec.channels and not self.takes_subsets:
            raise AnomriError(
                f"this model needs all of {', '.join(self.spec.channels)}; one trained with channel_dropout (preset "
                f"quick or accurate) takes a subset of them."
            )
        detector = copy(self)
        detector.channels = chosen
        return detector

    def with_score(self, **score: Any) -> Detector:
        """The same model with other settings of its `spec.Score`, and without thresholds, which
        were for the old ones.

        Raises `AnomriError` if there is no such score, or the model does not make what it needs.
        """
        if score.get("kind") == "auto":
            raise AnomriError(
                "the score auto is chosen when a model is trained; name one, such as absolute."
            )
        detector = copy(self)
        detector.spec = replace(
            self.spec,
            score=replace(self.spec.score, **score),
            thresholds=None,
            subset_thresholds={},
        )
        check_score(detector.spec.score, self.spec.channels, self.method.segmentation_head)
        return detector

    def find_cases(self, cohort: str | Path) -> list[Case]:
        """`find.find_cases`, but one file whose name says no channel is the model's only one, or
        FLAIR."""
        return find_cases_for(cohort, self.channels, self.takes_subsets)

    def read(
        self,
        scan: Case | Mapping[str, Source] | Source,
        preparation: Preparation = Preparation(),
        name: str | None = None,
    ) -> Volume:
        """Read the model's channels of one scan, prepared; ``scan`` and ``name`` as in `detect`."""
        if isinstance(scan, SpatialImage):
            scan = {self.channels[0] if len(self.channels) == 1 else "flair": scan}
        if isinstance(scan, Mapping):
            with as_files(scan) as files:
                return self.read(case_from_files(files, name), preparation)
        if not isinstance(scan, Case):
            cases = self.find_cases(scan)
            if len(cases) > 1:
                raise AnomriError(
                    f"{scan}: holds {len(cases)} cases; name one, or loop over find_cases."
                )
            scan = cases[0]
        return read_case(scan, self.spec, self.channels, self.takes_subsets, preparation)

    def score(self, stack: SliceStack) -> tuple[NDArray[np.float32], Tensor]:
        """Anomaly scores (n, h, w) and reconstruction (n, c, h, w) of a scan's slices, on the
        working grid."""
        raw, reconstructed = self.raw_score(stack)
        return anomaly_score(
            raw, stack.foreground, self.spec.score, stack.spacing_mm
        ), reconstructed

    def raw_score(self, stack: SliceStack) -> tuple[Tensor, Tensor]:
        """Scores before erosion and median (n, h, w), and reconstruction (n, c, h, w), of a scan's
        slices."""
        output = self.output(stack)
        c = stack.x.shape[1]
        if self.spec.score.kind in ("own", "auto"):
            with torch.no_grad():
                raw = self.method.residual(stack.x, output[:, :c], stack.foreground)
            check_values(raw, stack.foreground, self.spec.method)
        else:
            raw = raw_score(stack.x, output, self.spec.channels, self.spec.score, stack.position)
        # Outside the brain a method is free to make up anything; nobody should see it.
        return raw, output[:, :c] * stack.foreground[:, None]

    def output(self, stack: SliceStack) -> Tensor:
        """The method's reconstruction of a scan's slices, (n, c, h, w); with a segmentation head,
        one map more.

        It is the mean over the scan and its mirror image, if the score says so. Channels that the
        scan does not have are zero. Raises `AnomriError` if the score needs what the method does
        not make.
        """
        check_score(self.spec.score, self.spec.channels, self.method.segmentation_head)
        box = self._box(stack)
        output = self.inference(stack.x, box)
        if self.spec.score.flips:
            # In place: an output is as large as the scan.
            output.add_(self.inference(stack.x, box, mirrored=True)).div_(2)
        for channel, present in enumerate(present_channels(stack.x)):
            if not present:
                output[:, channel] = 0
        return output

    def save(self, folder: str | Path) -> None:
        """Write the model folder that `load` reads: the model with all of its channels, and the
        cases it has seen."""
        if self.cases:
            write_splits(output_folder(Path(folder)) / "splits.csv", self.cases)
        write_model(Path(folder), self.spec, self._state)

    def with_spec(self, spec: ModelSpec) -> Detector:
        """The same weights with another specification, say another score; raises `AnomriError` if
        they do not fit."""
        method = methods.build(spec)
        try:
            method.load_state_dict(self._state)
        except RuntimeError as error:
            raise AnomriError(
                f"the weights of {self.spec.method} do not fit {spec.method} ({error})."
            ) from error
        return Detector(spec, method, self.device, self.inference.precision, self.cases)

    def _box(self, stack: SliceStack) -> tuple[int, int, int, int] | None:
        if self.spec.crop is None:
            return None
        return join_boxes(
            self.spec.crop,
            brain_box(stack.foreground, 1),
            self.method.side_multiple,
            self.spec.grid.size,
        )


load = Detector.load
