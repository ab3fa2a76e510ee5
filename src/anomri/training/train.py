"""Training: the loop on one page (`fit`), and the stages before and after it (`train`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Generator, Tensor

from anomri.errors import AnomriError, Interrupted
from anomri.methods import registry as methods
from anomri.methods.base import Method, Objective
from anomri.methods.networks.unet import compile_networks
from anomri.model.detector import Detector
from anomri.runtime.devices import can_compile, resolve_device
from anomri.runtime.interruption import StopRequest
from anomri.runtime.memory import keep_memory
from anomri.runtime.processes import ProcessGroup, join_processes, make_fabric
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.own_results import drop_own_results
from anomri.scans.splits import assign_splits, read_splits, split_cases, write_splits
from anomri.slices import find_foreground
from anomri.spec import ModelSpec, Score, Thresholds, Training
from anomri.training.batches import Batches
from anomri.training.choose_score import choose_score
from anomri.training.cohort import (
    Packed,
    cases_for_tables,
    cases_with_images,
    collect_notes,
    collect_scan_notes,
    common_box,
    describe_cohort,
    describe_task,
    is_finished,
    pack_splits,
)
from anomri.training.packing import HealthySlices, default_cache
from anomri.training.passes import Passes, affordable_passes
from anomri.training.recipe import Pretrained, plan
from anomri.training.schedule import batch_numbers, learning_rate
from anomri.training.state import Log, Saver, TrainingState
from anomri.training.steps import Step, load_optimizer, make_optimizer
from anomri.training.thresholds import healthy_thresholds, subset_thresholds

VALIDATION_SEED = 2022
SCORE_SHARE = 0.7
"""Of what may be spent after a training, for the choice of a score."""
NO_SUBSETS = (
    "the model has no thresholds for scans that lack a channel: to choose them would take longer "
    "than a tenth of so short a training. Ask for them with --subsets."
)
COMPILED_FROM = 20_000
"""Steps from which compiling the networks for a GPU pays: the published size gains 9 ms a step."""


@dataclass(frozen=True)
class Progress:
    """Where a job is: ``done`` of ``total`` in a stage. Losses are NaN until there is one.

    The stages of a training are ``pack`` (of cases), ``train`` (steps), ``score``, ``thresholds``
    and ``subsets`` (slices that went through the network to choose a score, thresholds, and
    thresholds for subsets of the channels). A demo begins with ``make`` (synthetic scans), and a
    comparison has ``evaluate`` (test scans).
    """

    stage: str
    done: int
    total: int
    loss: float = math.nan
    validation_loss: float = math.nan
    note: str = ""
    """A message for the user."""


Report = Callable[[Progress], None]


def train(
    cohort: str | Path | Sequence[Case],
    model: str | Path,
    *,
    method: str | None = None,
    preset: str | None = None,
    pretrained: str | Path | Sequence[str | Path] | None = None,
    channels: Sequence[str] | None = None,
    settings: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    score: dict[str, Any] | None = None,
    grid: int | None = None,
    splits: str | Path | None = None,
    cache: str | Path | None = None,
    resume: bool = False,
    accumulate: int = 1,
    subsets: bool | None = None,
    device: str = "auto",
    data_licence: str | None = None,
    progress: Report = lambda state: None,
) -> Detector:
    """Train on the healthy slices of a cohort, write a model folder and return the `Detector`.

    Args:
        cohort: What `find_cases` takes, or the cases that it returned. Slices with a labelled
            lesion are left out.
        model: The folder to write.
        method: Name of the method (default: ``dae``).
        preset: ``paper`` (as published), ``small`` (default: the same on a laptop, a quarter of an
            hour), ``quick`` (better, half an hour) or ``accurate`` (best, two hours).
        pretrained: Instead of a preset: the folder of a model to continue from, or ``built-in``.
            The new model has its method and recipe, and those of its channels that most cases
            have. Several folders: the first model, with the mean of all their weights.
        channels: Channels and their order (default: those found).
        settings: Settings of the method that replace single values of the preset.
        training: Fields of `spec.Training`, likewise.
        score: Fields of `spec.Score`, likewise.
        grid: Pixels of a side of the working grid.
        splits: Table of cases and their splits; it replaces the cohort's own ``splits.csv`` for
            the cases that it names. Without either, a tenth of the patients (at least one) is
            drawn for validation. A patient is never in two splits.
        cache: Folder for the packed slices (default: the user's cache folder).
        resume: Continue an interrupted training at the step that it reached.
        accumulate: Take each process's share of a batch in so many parts: less memory, same model.
        subsets: Whether a model that takes scans with some of its channels gets thresholds for
            each subset of them. By default only if all that comes after the training takes no more
            than a tenth of its time.
        device: ``auto``, ``cpu`` or ``cuda``.
        data_licence: Terms of the scans, for ``model.json``.
        progress: Called with a `Progress` after each step of each stage.

    Where torchrun or srun starts several processes, each calls this with the same arguments. They
    share the packing and every batch; the model is the same, up to the order of sums.

    Raises `AnomriError` for what the user can put right, and `errors.Interrupted`, with all saved,
    when Ctrl-C or SIGTERM asks to stop.
    """
    folder, team = Path(model), join_processes(device)
    found = find_cases(cohort) if isinstance(cohort, str | Path) else cohort
    notes: list[str] = []
    for check in (drop_own_results, cases_for_tables, cases_with_images):
        found, found_notes = check(found)
        notes += found_notes
    cases = list(found)
    before = Pretrained.read_all(pretrained) if pretrained else None
    spec = plan(
        cases,
        method=method,
        preset=preset,
        pretrained=before,
        channels=channels,
        settings=settings or {},
        training=training or {},
        score=score or {},
        grid=grid,
        data_licence=data_licence,
        device=device,
    )
    seed = spec.training.seed if spec.training else 0
    if splits:
        cases = assign_splits(cases, read_splits(Path(splits)))
    cases = split_cases(before.split(cases, seed) if before else cases, {}, seed)
    notes += collect_notes(cases)
    known = list(cases)
    if before:
        # The model has seen them too.
        known += before.other_cases(cases)
        notes += before.notes(spec.channels)
    for note in notes:
        progress(Progress("pack", 0, len(cases), note=note))

    with team.sole_use(folder):
        if team.run_on_main(lambda: is_finished(folder, spec, known, resume)):
            return Detector.load(folder, device)
        keep_memory()
        packed = pack_splits(
            cases,
            spec,
            Path(cache) if cache else default_cache(),
            team,
            lambda done, total: progress(Progress("pack", done, total)),
        )
        for note in collect_scan_notes(packed):
            progress(Progress("pack", len(cases), len(cases), note=note))
        spec = replace(spec, cohort=describe_cohort(packed, len(cases)))
        if spec.training and spec.training.crop_to_brain:
            spec = replace(spec, crop=common_box(packed, methods.build(spec), spec))
        state = TrainingState.load(folder, describe_task(spec, packed))
        team.check_same(
            state.step,
            f"{folder}: is not the same folder for all processes; name one that all machines see.",
        )
        if team.is_main:
            write_splits(folder / "splits.csv", known)

        torch.manual_seed(seed)
        network = methods.build(spec)
        if before:
            before.load_into(network)
        if spec.training:
            fabric = make_fabric(device, spec.training.precision)
            best = fit(fabric, network, spec, packed, state, folder, progress, team, accumulate)
            # A new one: the network that was trained may be compiled, for batches of its size.
            network = methods.build(spec)
            network.load_state_dict(best)

        detector = Detector(spec, network, resolve_device(device), cases=known)
        _choose_score_and_thresholds(detector, packed, subsets, team, progress)
        if team.is_main:
            detector.save(folder)
            TrainingState.remove(folder)
    return detector


def _choose_score_and_thresholds(
    detector: Detector, packed: Packed, subsets: bool | None, team: ProcessGroup, progress: Report
) -> None:
    """Add to the detector's specification what held-out healthy slices say of it."""
    held_out, training = packed["val"], packed["train"]
    affordable = affordable_passes(detector.spec)

    def passes(stage: str, most: float) -> Passes:
        return Passes(detector, lambda done, total: progress(Progress(stage, done, total)), most)

    def score_and_thresholds() -> tuple[Score, Thresholds | None, float]:
        """Both in one: they look at the same slices. And what is left to spend."""
        looked = passes("score", SCORE_SHARE * affordable)
        score, evidence = choose_score(looked, held_out, training)
        left = (1 - SCORE_SHARE) * affordable + looked.left
        detector.spec = replace(detector.spec, score=score)
        scored = passes("thresholds", left)
        thresholds = healthy_thresholds(scored, held_out, evidence)
        return score, thresholds, scored.left

    score, thresholds, left = team.run_on_main(score_and_thresholds)
    detector.spec = replace(detector.spec, score=score, thresholds=thresholds)
    if subsets is False:
        return
    found = team.run_on_main(
        lambda: subset_thresholds(passes("subsets", left), held_out, always=bool(subsets))
    )
    if found is None:
        progress(Progress("subsets", 0, 0, note=NO_SUBSETS))
    detector.spec = replace(detector.spec, subset_thresholds=found or {})


def fit(
    fabric: Fabric,
    network: Method,
    spec: ModelSpec,
    packed: Packed,
    state: TrainingState,
    folder: Path,
    progress: Report,
    team: ProcessGroup = ProcessGroup(),
    accumulate: int = 1,
) -> dict[str, Tensor]:
    """The training loop; returns the weights with the lowest validation loss.

    Random numbers follow from the seed and the step alone, so a training that continues from
    ``state`` ends like one that was never stopped.
    """
    training = spec.training
    assert training is not None
    slices, held_out = (HealthySlices(packed[side], fabric.device) for side in ("train", "val"))
    objectives = network.objectives()
    batches = Batches(
        fabric, team, slices, training.batch_size, accumulate, divisible=not objectives[0].name
    )
    model, steps = _set_up(fabric, network, spec, objectives, state, batches)
    log = Log(folder, state.step) if team.is_main else None
    saver = Saver(folder, state.step)
    mean_loss = held_out_loss = math.nan
    # A stop may have cut a validation short: it comes before the next step.
    unvalidated = bool(state.losses) and _validation_is_due(training, state.step)

    with StopRequest.listen() as stop:
        while unvalidated or state.step < training.steps:
            if not unvalidated:
                step, rate = state.step, learning_rate(training, state.step)
                numbers = batch_numbers(len(slices), training, step)
                batch = batches.load(numbers, training.seed * 2**32 + step)
                losses = [
                    take_step(batch, rate)
                    for take_step in steps
                    if take_step.objective.active(step, training.steps)
                ]
                state.add(torch.stack(losses).sum())
                if training.average:
                    state.follow(network, training.average)
            unvalidated = False

            validating = _validation_is_due(training, state.step)
            due = team.is_main and saver.is_due(validating)
            signal, saving = team.all_reduce_max([stop.signal or 0, int(due)], fabric.device)
            if validating or saving or signal:
                state.losses = list(team.all_reduce_mean(torch.stack(state.losses), fabric.device))
                _check_losses(state, saver.step, training, slices)

            if validating and not signal:
                with state.averaged(network):
                    found = validation_loss(fabric, model, spec, held_out, team, stop)
                    state.keep_best(network, found)
                if found is None:
                    (signal,) = team.all_reduce_max([stop.signal or 0], fabric.device)
                else:
                    mean_loss, held_out_loss = float(torch.stack(state.losses).mean()), found
                    state.losses = []
                    if log:
                        rate = learning_rate(training, state.step - 1)
                        log.add(state.step, mean_loss, held_out_loss, rate)

            if saving or signal or state.step == training.steps:
                state.network = network.state_dict()
                state.optimizers = {one.objective.name: one.optimizer.state_dict() for one in steps}
                saver.save(state, write=team.is_main)
            note = batches.take_note()
            progress(Progress("train", state.step, training.steps, mean_loss, held_out_loss, note))
            if signal:
                raise Interrupted(
                    f"stopped at step {state.step} of {training.steps}; continue with --resume.",
                    signal,
                )
    if log:
        log.close()
    if not state.best:
        cases = ", ".join(case.name for case in packed["val"][:5])
        raise AnomriError(
            f"the validation loss was NaN or infinite every time; look at the validation cases "
            f"({cases}), or train anew with a lower --learning-rate or --precision 32-true."
        )
    return state.best


def _set_up(
    fabric: Fabric,
    network: Any,
    spec: ModelSpec,
    objectives: Sequence[Objective],
    state: TrainingState,
    batches: Batches,
) -> tuple[Any, list[Step]]:
    """The model as Fabric calls it and a step for each objective, all as ``state`` left them."""
    training, device = spec.training, fabric.device
    assert training is not None
    if state.step:
        network.load_state_dict(state.network)
    if training.precision == "bf16-mixed" or device.type == "cuda":
        # The layout of convolutions in bfloat16 and on GPUs; any other is turned at every layer.
        network.to(memory_format=torch.channels_last)
    model, *optimizers = fabric.setup(
        network, *(make_optimizer(objective, training, device) for objective in objectives)
    )
    long = training.steps - state.step >= COMPILED_FROM
    if long and device.type == "cuda" and can_compile(device):
        compile_networks(network)
    if state.step:
        for objective, optimizer in zip(objectives, optimizers, strict=True):
            load_optimizer(optimizer, state.optimizers[objective.name])
        state.losses = [loss.to(device) for loss in state.losses]
    steps = [
        Step(
            fabric,
            batches,
            model,
            objective,
            optimizer,
            partial(_loss, model, spec, objective),
            training.gradient_clip,
        )
        for objective, optimizer in zip(objectives, optimizers, strict=True)
    ]
    return model, steps


def _loss(
    model: Any, spec: ModelSpec, objective: Objective, x: Tensor, generator: Generator
) -> Tensor:
    foreground = find_foreground(x, spec.scaling)
    loss: Tensor = model(x, foreground, generator, spec.crop, **objective.arguments)
    return loss


def _validation_is_due(training: Training, step: int) -> bool:
    return step % training.validate_every == 0 or step == training.steps


def validation_loss(
    fabric: Fabric,
    model: Any,
    spec: ModelSpec,
    held_out: HealthySlices,
    team: ProcessGroup = ProcessGroup(),
    stop: StopRequest | None = None,
) -> float | None:
    """Loss on fixed slices with fixed noise: every call sets the same task; ``None`` if stopped."""
    training = spec.training
    assert training is not None
    count = min(len(held_out), training.validation_slices)
    chosen = np.linspace(0, len(held_out) - 1, count).astype(int).tolist()
    starts = range(0, count, training.batch_size)
    total = torch.zeros((), dtype=torch.float64)
    stopped = False
    model.eval()
    # Other sizes and no gradients would be compiled anew, which takes longer than it saves.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        # Every process has as many turns, so that all notice a stop in the same one.
        for turn in range(0, len(starts), team.world_size):
            mine = turn + team.rank
            if mine < len(starts):
                start = starts[mine]
                x = held_out.batch(chosen[start : start + training.batch_size])
                generator = Generator(fabric.device).manual_seed(VALIDATION_SEED + start)
                loss = model(x, find_foreground(x, spec.scaling), generator, spec.crop)
                total += float(loss) * len(x)
            stopped = stop is not None and team.all_reduce_max(
                [stop.signal or 0], fabric.device
            ) != [0]
            if stopped:
                break
    model.train()
    if stopped:
        return None
    return float(team.all_reduce_mean(total, fabric.device)) * team.world_size / count


def _check_losses(
    state: TrainingState, saved: int, training: Training, slices: HealthySlices
) -> None:
    """Raise `AnomriError` for the first step whose loss is not finite, before it is saved."""
    values = torch.stack(state.losses)
    if bool(values.isfinite().all()):
        return
    first = int((~values.isfinite()).nonzero()[0])
    step = state.step - len(values) + first
    cases = ", ".join(slices.names(batch_numbers(len(slices), training, step)))
    raise AnomriError(
        f"the loss of step {step + 1} is {float(values[first])}; its batch has slices of {cases}. "
        f"If they look right, continue from step {saved}, the last one saved, with --resume and a "
        f"lower --learning-rate or --precision 32-true."
    )
