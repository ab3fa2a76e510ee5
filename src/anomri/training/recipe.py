"""What a training is to make, and what it begins with: by a preset, or by a model that was trained before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from anomri.errors import AnomriError, first_line
from anomri.methods import registry as methods
from anomri.methods.base import Preset
from anomri.model.detector import model_folder
from anomri.model.files import cases_of_model, check_readable, read_model
from anomri.runtime.devices import resolve_device, resolve_precision
from anomri.scans.case import Case, check_unique, common_channels
from anomri.scans.names import channel_name
from anomri.scans.splits import SPLITS, draw_patients, splits_by_name
from anomri.scoring.scores import check_score
from anomri.spec import ModelSpec, Scaling, Score, Training
from anomri.training.cohort import CHOSEN, FOUND, check_grid

DEFAULT_PRESET = "small"


@dataclass(frozen=True)
class Pretrained:
    """A trained model that a training begins with, or several: a description, weights, and the cases that they know."""

    folder: str
    spec: ModelSpec
    weights: dict[str, Tensor]
    cases: list[Case]
    """Those it was trained and validated on, without files; none where its folder does not say."""
    takes_subsets: bool
    """Whether a scan may lack some of its channels."""

    @classmethod
    def read(cls, model: str | Path) -> Pretrained:
        """Read a model folder, or ``built-in``; raises `AnomriError` if there is none, or nothing in it was trained."""
        folder = model_folder(model)
        spec, method, weights = read_model(folder)
        if not weights:
            raise AnomriError(
                f"{folder}: {spec.method} has no weights to begin with; leave out --pretrained."
            )
        return cls(
            str(folder),
            spec,
            weights,
            cases_of_model(folder),
            method.takes_subsets,
        )

    @classmethod
    def read_all(cls, models: str | Path | Sequence[str | Path]) -> Pretrained:
        """`read` a model or, of several, the first with the mean of their weights (Wortsman et al., ICML 2022).

        It knows the cases of all. Raises `AnomriError` if their networks or scalings are not alike; whether they went on from
        the same model, without which a mean is worth nothing, is not known.
        """
        one, *others = map(cls.read, [models] if isinstance(models, str | Path) else models)
        if not others:
            return one
        for other in others:
            if one.network != other.network:
                raise AnomriError(
                    f"{other.folder}: its network is not that of {one.folder}; a mean is of models that went on from the same one."
                )
        every = [one, *others]
        weights = {
            name: torch.stack([each.weights[name].double() for each in every])
            .mean(0)
            .to(value.dtype)
            for name, value in one.weights.items()
        }
        # Whom one of them was trained on counts as trained on.
        known = sorted(
            (case for each in every for case in each.cases),
            key=lambda case: SPLITS.index(case.split or "test"),
        )
        licences = {each.spec.data_licence: None for each in every}
        return replace(
            one,
            folder=" and ".join(each.folder for each in every),
            spec=replace(one.spec, data_licence="; ".join(licences)),
            weights=weights,
            cases=list({case.name: case for case in reversed(known)}.values()),
        )

    @property
    def network(self) -> tuple[str, list[str], Scaling, dict[str, torch.Size]]:
        """What is alike in networks that may be averaged: method, channels, scaling, and the shapes of their weights."""
        channels = self.spec.settings.get("network_channels") or self.spec.channels
        return (
            self.spec.method,
            list(channels),
            self.spec.scaling,
            {name: value.shape for name, value in self.weights.items()},
        )

    def preset(self, channels: Sequence[str] = ()) -> Preset:
        """How it was trained (an imported checkpoint: as published), for all or these of its ``channels``.

        A score that was chosen is chosen anew; what one that was given looks at and is gone, it looks at no more.
        """
        spec, names = self.spec, tuple(channels) or self.spec.channels
        training = spec.training or methods.preset(spec.method, "paper").training
        if training and training.precision == "bf16-mixed":
            training = replace(training, precision="auto")
        if training:
            training = replace(
                training, pretrained=hashlib.sha256(save_tensors(self.weights)).hexdigest()
            )
        again = FOUND | CHOSEN if spec.score.chosen_by else FOUND
        score = replace(spec.score, **{name: getattr(Score(), name) for name in again})
        if spec.score.chosen_by:
            score = replace(score, kind="auto")
        score = replace(score, channels=tuple(name for name in score.channels if name in names))
        settings = spec.settings
        if names != spec.channels:
            settings = {"network_channels": list(spec.channels), **settings}
        return Preset(settings, training, spec.scaling, score, spec.grid)

    def channels_for(self, cases: Sequence[Case], wanted: Sequence[str]) -> tuple[str, ...]:
        """Those of its channels that are ``wanted``, or else that most cases have; all of them if it takes no subsets.

        Cases for testing do not count. Raises `AnomriError` for channels that it does not have.
        """
        own, asked = self.spec.channels, wanted
        if not wanted:
            used = [case for case in cases if case.split != "test"] or cases
            known = [
                replace(case, channels={k: v for k, v in case.channels.items() if k in own})
                for case in used
            ]
            asked = common_channels(known if any(case.channels for case in known) else used)
        names = tuple(name for name in own if name in asked)
        if not names or {*asked} != {*names}:
            raise AnomriError(
                f"{self.folder}: has the channels {', '.join(own)}, not {', '.join(asked)}."
            )
        if names != own and not self.takes_subsets:
            if not wanted:
                return own
            raise AnomriError(
                f"{self.folder}: takes no part of its channels, {', '.join(own)}; leave out --channels."
            )
        return names

    def notes(self, channels: Sequence[str]) -> list[str]:
        """What the owner of a cohort should know of a training with these of its channels."""
        absent = [name for name in self.spec.channels if name not in channels]
        return (
            [f"goes on without {', '.join(absent)}: the new model has {', '.join(channels)}."]
            if absent
            else []
        )

    def begin(self, network: nn.Module) -> None:
        """Give a network the weights; raises `AnomriError` if it is not of their shape."""
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            raise AnomriError(
                f"{self.folder}: its weights do not fit what is to be trained; leave out settings that change the network "
                f"({first_line(error)})."
            ) from error

    def divided(self, cases: Sequence[Case], seed: int) -> list[Case]:
        """``cases`` with the sides that their patients had, if none has one of its own.

        Where then none is for validation, those that the model was validated on are, also if they are to be trained on; else a
        tenth, at least one, of the patients that it was not trained on. Raises `AnomriError` if it was trained on them all.
        """
        sides, given = splits_by_name(self.cases), any(case.split for case in cases)
        before = {case.name: sides.get(case.name) or sides.get(case.patient) for case in cases}
        if any(case.split == "val" for case in cases) or not any(before.values()):
            return list(cases)

        def side(case: Case) -> str | None:
            if given:
                return "val" if case.split == "train" and before[case.name] == "val" else case.split
            return before[case.name] or "train"

        divided = [replace(case, split=side(case)) for case in cases]
        if any(case.split == "val" for case in divided):
            return divided
        trained = [case for case in divided if case.split == "train"]
        new = {case.patient for case in trained if before[case.name] != "train"}
        if trained and not new:
            raise AnomriError(
                f"{self.folder} was trained on all of these patients; add one that it does not know, to validate on."
            )
        held_out = draw_patients(new, seed)
        return [
            replace(case, split="val") if case.patient in held_out else case for case in divided
        ]

    def others(self, cases: Sequence[Case]) -> list[Case]:
        """The cases it knows that have no side among ``cases``.

        Raises `AnomriError` if a patient that it was trained on is held out among these, or one that it was validated on
        is for testing.
        """
        sides = splits_by_name(self.cases)
        for case in cases:
            known = {sides.get(case.name), sides.get(case.patient)}
            for side, verb in (("train", "trained"), ("val", "validated")):
                if case.split and side in known and SPLITS.index(case.split) > SPLITS.index(side):
                    raise AnomriError(
                        f"{case.name} is in the split {case.split}, but {self.folder} was {verb} on that patient; give it the "
                        f"split {side}, in a splits.csv or by --splits."
                    )
        names = {case.name for case in cases if case.split}
        return [case for case in self.cases if case.name not in names]

    def licence(self, given: str | None) -> str:
        """The terms of a model that begins with it and goes on with scans under those ``given``."""
        terms = given or "unknown for the scans that it went on with"
        return (
            terms
            if terms == self.spec.data_licence
            else f"{terms}; began with weights of: {self.spec.data_licence}"
        )


def planned(
    cases: Sequence[Case],
    *,
    method: str | None,
    preset: str | None,
    pretrained: Pretrained | None,
    channels: Sequence[str] | None,
    settings: dict[str, Any],
    training: dict[str, Any],
    score: dict[str, Any],
    grid: int | None,
    data_licence: str | None,
    device: str,
) -> ModelSpec:
    """The specification of the model that a training on ``cases`` makes; raises `AnomriError` for what does not fit.

    What is asked for replaces single values of the preset, or of the recipe of the model that it begins with.
    """
    if pretrained and (preset or method not in (None, pretrained.spec.method)):
        raise AnomriError(
            f"a training that begins with {pretrained.folder} has its method and its recipe; leave out --method and --preset."
        )
    names = tuple(map(channel_name, channels or ()))
    check_unique(names)
    if pretrained:
        if "network_channels" in settings:
            raise AnomriError(
                "network_channels are those of the model that a training begins with; leave them out."
            )
        names = pretrained.channels_for(cases, names)
    names = names or common_channels(cases)
    method = pretrained.spec.method if pretrained else method or "dae"
    chosen = (
        pretrained.preset(names) if pretrained else methods.preset(method, preset or DEFAULT_PRESET)
    )
    spec = ModelSpec(
        channels=names,
        method=method,
        settings={**chosen.settings, **settings},
        grid=replace(chosen.grid, size=(grid, grid)) if grid else chosen.grid,
        scaling=chosen.scaling,
        score=replace(chosen.score, **score),
        training=_changed(chosen.training, training),
        versions={name: version(name) for name in ("anomri", "torch", "numpy", "nibabel")},
    )
    # What does not fit is told before a cohort is packed.
    spec = spec.checked()
    network = methods.build(spec)
    check_score(spec.score, spec.channels, network.segmentation_head)
    check_grid(network, spec.grid)
    check_readable(spec)
    if pretrained:
        pretrained.begin(network)
        spec = replace(spec, data_licence=pretrained.licence(data_licence))
    elif data_licence:
        spec = replace(spec, data_licence=data_licence)
    if spec.training:
        precision = resolve_precision(spec.training.precision, resolve_device(device).type)
        spec = replace(spec, training=replace(spec.training, precision=precision))
    return spec


def _changed(schedule: Training | None, changes: dict[str, Any]) -> Training | None:
    if schedule is None:
        if changes:
            raise AnomriError(
                f"this method is not trained; {', '.join(changes)} would change nothing."
            )
        return None
    try:
        return replace(schedule, **changes)
    except TypeError as error:
        raise AnomriError(f"the training settings {changes} do not fit: {error}") from error
