"""What a training starts from: a preset, or a model that was trained before."""

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
from anomri.model.files import check_readable, read_model, read_model_cases
from anomri.runtime.devices import resolve_device, resolve_precision
from anomri.scans.case import Case, check_unique, common_channels
from anomri.scans.names import channel_name
from anomri.scans.splits import SPLITS, draw_patients, splits_by_name
from anomri.scoring.scores import check_score
from anomri.spec import ModelSpec, Scaling, Score, Training
from anomri.training.cohort import CHOSEN, FILLED_IN, check_grid

DEFAULT_METHOD, DEFAULT_PRESET = "dae", "small"


def plan(
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
    """The specification of the model that a training on ``cases`` makes.

    ``settings``, ``training``, ``score`` and ``grid`` replace single values of the preset, or of
    the recipe of the ``pretrained`` model. Raises `AnomriError` for what does not fit, before the
    cohort is packed.
    """
    names = tuple(map(channel_name, channels or ()))
    check_unique(names)
    if pretrained:
        _check_no_recipe_beside(pretrained, method, preset, settings)
        names = pretrained.channels_for(cases, names)
        method, start = pretrained.spec.method, pretrained.preset(names)
    else:
        names = names or common_channels(cases)
        method = method or DEFAULT_METHOD
        start = methods.preset(method, preset or DEFAULT_PRESET)
    spec = ModelSpec(
        channels=names,
        method=method,
        settings={**start.settings, **settings},
        grid=replace(start.grid, size=(grid, grid)) if grid else start.grid,
        scaling=start.scaling,
        score=replace(start.score, **score),
        training=_with_changes(start.training, training),
        versions={name: version(name) for name in ("anomri", "torch", "numpy", "nibabel")},
    ).checked()
    network = methods.build(spec)
    check_score(spec.score, spec.channels, network.segmentation_head)
    check_grid(network, spec.grid)
    check_readable(spec)
    if pretrained:
        pretrained.load_into(network)
        spec = replace(spec, data_licence=pretrained.licence(data_licence))
    elif data_licence:
        spec = replace(spec, data_licence=data_licence)
    if spec.training:
        precision = resolve_precision(spec.training.precision, resolve_device(device).type)
        spec = replace(spec, training=replace(spec.training, precision=precision))
    return spec


def _check_no_recipe_beside(
    pretrained: Pretrained, method: str | None, preset: str | None, settings: dict[str, Any]
) -> None:
    if preset or method not in (None, pretrained.spec.method):
        raise AnomriError(
            f"a training that starts from {pretrained.folder} uses its method and recipe; leave "
            f"out --method and --preset."
        )
    if "network_channels" in settings:
        raise AnomriError(
            "network_channels are set by the model that a training starts from; leave them out."
        )


def _with_changes(training: Training | None, changes: dict[str, Any]) -> Training | None:
    if training is None:
        if changes:
            raise AnomriError(
                f"this method is not trained; {', '.join(changes)} would change nothing."
            )
        return None
    try:
        return replace(training, **changes)
    except TypeError as error:
        raise AnomriError(f"the training settings {changes} do not fit: {error}") from error


@dataclass(frozen=True)
class Pretrained:
    """A trained model that a training starts from, and the cases that it knows."""

    folder: str
    """Where it lies, for messages; several folders if it is the mean of several models."""
    spec: ModelSpec
    weights: dict[str, Tensor]
    cases: list[Case]
    """The cases it was trained and validated on, without files; none if its folder does not say."""
    takes_subsets: bool
    """Whether a scan may lack some of its channels."""

    @classmethod
    def read(cls, model: str | Path) -> Pretrained:
        """Read a model folder, or ``built-in``.

        Raises `AnomriError` if there is no model, or its method has no weights.
        """
        folder = model_folder(model)
        spec, method, weights = read_model(folder)
        if not weights:
            raise AnomriError(
                f"{folder}: {spec.method} has no weights to start from; leave out --pretrained."
            )
        return cls(str(folder), spec, weights, read_model_cases(folder), method.takes_subsets)

    @classmethod
    def read_all(cls, models: str | Path | Sequence[str | Path]) -> Pretrained:
        """`read` one model; of several, the first with the mean of their weights.

        The mean (Wortsman et al., ICML 2022) makes sense for models that continued from the same
        one, which is not checked. It knows the cases of all. Raises `AnomriError` if the networks
        or scalings differ.
        """
        first, *others = map(cls.read, [models] if isinstance(models, str | Path) else models)
        for other in others:
            if other.network != first.network:
                raise AnomriError(
                    f"{other.folder}: its network is not that of {first.folder}; only models that "
                    f"continued from the same one can be averaged."
                )
        return first.mean_with(others) if others else first

    def mean_with(self, others: Sequence[Pretrained]) -> Pretrained:
        """This model with the mean of the weights, and the cases and licences of all."""
        models = [self, *others]
        weights = {
            name: torch.stack([model.weights[name].double() for model in models])
            .mean(0)
            .to(value.dtype)
            for name, value in self.weights.items()
        }
        # A case that any of them was trained on counts as trained on.
        known = [case for model in models for case in model.cases]
        known.sort(key=lambda case: SPLITS.index(case.split or "test"))
        licences = dict.fromkeys(model.spec.data_licence for model in models)
        return replace(
            self,
            folder=" and ".join(model.folder for model in models),
            spec=replace(self.spec, data_licence="; ".join(licences)),
            weights=weights,
            cases=list({case.name: case for case in reversed(known)}.values()),
        )

    @property
    def network(self) -> tuple[str, list[str], Scaling, dict[str, torch.Size]]:
        """What must be equal in models that are averaged."""
        channels = self.spec.settings.get("network_channels") or self.spec.channels
        shapes = {name: value.shape for name, value in self.weights.items()}
        return self.spec.method, list(channels), self.spec.scaling, shapes

    def preset(self, channels: Sequence[str] = ()) -> Preset:
        """Its recipe for all or some of its ``channels``; for an imported model, the paper's."""
        names = tuple(channels) or self.spec.channels
        settings = self.spec.settings
        if names != self.spec.channels:
            settings = {"network_channels": list(self.spec.channels), **settings}
        training = self.spec.training or methods.preset(self.spec.method, "paper").training
        if training:
            digest = hashlib.sha256(save_tensors(self.weights)).hexdigest()
            precision = training.precision
            training = replace(
                training,
                pretrained=digest,
                precision="auto" if precision == "bf16-mixed" else precision,
            )
        return Preset(settings, training, self.spec.scaling, self._score(names), self.spec.grid)

    def _score(self, names: Sequence[str]) -> Score:
        """Its score for these channels; ``auto``, if it was chosen."""
        score, fresh = self.spec.score, Score()
        chosen = bool(score.chosen_by)
        reset = FILLED_IN | CHOSEN if chosen else FILLED_IN
        score = replace(score, **{name: getattr(fresh, name) for name in reset})
        if chosen:
            score = replace(score, kind="auto")
        return replace(score, channels=tuple(name for name in score.channels if name in names))

    def channels_for(self, cases: Sequence[Case], wanted: Sequence[str]) -> tuple[str, ...]:
        """Those of its channels that are ``wanted``, or else that most cases have, in its order.

        A model that takes no subsets keeps all of its channels. Cases for testing do not count.
        Raises `AnomriError` for channels that it does not have.
        """
        own = self.spec.channels
        asked = wanted or self._usual_channels(cases)
        names = tuple(name for name in own if name in asked)
        if not names or {*asked} != {*names}:
            raise AnomriError(
                f"{self.folder}: has the channels {', '.join(own)}, not {', '.join(asked)}."
            )
        if names == own or self.takes_subsets:
            return names
        if wanted:
            raise AnomriError(
                f"{self.folder}: needs all of its channels, {', '.join(own)}; leave out --channels."
            )
        return own

    def _usual_channels(self, cases: Sequence[Case]) -> tuple[str, ...]:
        """The channels that most cases have, counting only its own if any case has one."""
        used = [case for case in cases if case.split != "test"] or list(cases)
        known = [
            replace(
                case, channels={k: v for k, v in case.channels.items() if k in self.spec.channels}
            )
            for case in used
        ]
        return common_channels(known if any(case.channels for case in known) else used)

    def notes(self, channels: Sequence[str]) -> list[str]:
        """What the user should know about a training with these of its channels."""
        absent = [name for name in self.spec.channels if name not in channels]
        if not absent:
            return []
        return [f"continues without {', '.join(absent)}: the new model has {', '.join(channels)}."]

    def load_into(self, network: nn.Module) -> None:
        """Give a network the weights; raises `AnomriError` if they do not fit."""
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            raise AnomriError(
                f"{self.folder}: its weights do not fit the new network; leave out settings that "
                f"change the network ({first_line(error)})."
            ) from error

    def split(self, cases: Sequence[Case], seed: int) -> list[Case]:
        """The cases with the splits that their patients have in the model, and some to validate on.

        If the cohort has cases for validation, or the model knows none of its patients, nothing
        changes. Splits that the cohort itself gives are kept, except that patients the model was
        validated on stay in validation. If there are none, a tenth of the patients that it was not
        trained on (at least one) is drawn. Raises `AnomriError` if it was trained on all of them.
        """
        splits = splits_by_name(self.cases)
        before = {case.name: splits.get(case.name) or splits.get(case.patient) for case in cases}
        if any(case.split == "val" for case in cases) or not any(before.values()):
            return list(cases)
        given = any(case.split for case in cases)

        def choose(case: Case) -> str | None:
            known = before[case.name]
            if not given:
                return known or "train"
            return "val" if case.split == "train" and known == "val" else case.split

        divided = [replace(case, split=choose(case)) for case in cases]
        if any(case.split == "val" for case in divided):
            return divided
        training = [case for case in divided if case.split == "train"]
        new = {case.patient for case in training if before[case.name] != "train"}
        if training and not new:
            raise AnomriError(
                f"{self.folder} was trained on all of these patients; add one that it does not "
                f"know, to validate on."
            )
        held_out = draw_patients(new, seed)
        return [
            replace(case, split="val") if case.patient in held_out else case for case in divided
        ]

    def other_cases(self, cases: Sequence[Case]) -> list[Case]:
        """The cases it knows that have no split among ``cases``.

        Raises `AnomriError` if a patient that it was trained on is now held out, or one that it
        was validated on is now for testing.
        """
        splits = splits_by_name(self.cases)
        for case in cases:
            known = {splits.get(case.name), splits.get(case.patient)}
            for split, verb in (("train", "trained"), ("val", "validated")):
                later = case.split and SPLITS.index(case.split) > SPLITS.index(split)
                if later and split in known:
                    raise AnomriError(
                        f"{case.name} is in the split {case.split}, but {self.folder} was {verb} "
                        f"on that patient; give it the split {split}, in a splits.csv or by "
                        f"--splits."
                    )
        names = {case.name for case in cases if case.split}
        return [case for case in self.cases if case.name not in names]

    def licence(self, given: str | None) -> str:
        """The terms of a model that continues from it with scans under the terms ``given``."""
        terms = given or "unknown for the scans that it continued with"
        if terms == self.spec.data_licence:
            return terms
        return f"{terms}; started from weights of: {self.spec.data_licence}"
