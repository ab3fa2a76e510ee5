"""Training: the loop on one page (`fit`), and what leads to it and follows it (`train`)."""

from __future__ import annotations

import math
import time
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
from anomri.methods.base import Objective
from anomri.methods.networks.unet import compile_networks
from anomri.model.detector import Detector
from anomri.runtime.devices import can_compile, resolve_device
from anomri.runtime.interruption import StopRequest
from anomri.runtime.memory import keep_memory
from anomri.runtime.processes import ProcessGroup, join_processes, make_fabric
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.splits import assign_splits, read_splits, split_cases, write_splits
from anomri.slices import foreground_of
from anomri.spec import ModelSpec, Training
from anomri.training.batches import Batches
from anomri.training.choose_score import choose_score
from anomri.training.cohort import (
    Packed,
    common_box,
    describe_cohort,
    finished,
    notes_of,
    pack_splits,
    task_of,
    with_images,
)
from anomri.training.packing import HealthySlices, default_cache
from anomri.training.recipe import Pretrained, planned
from anomri.training.schedule import batch_numbers, learning_rate
from anomri.training.state import Log, TrainingState
from anomri.training.steps import Step, load_optimizer, optimizer_of
from anomri.training.thresholds import healthy_thresholds, subset_thresholds

VALIDATION_SEED = 2022
SAVE_EVERY_S = 300.0
"""The most that a training which is killed loses."""
QUICK_S, SAVING_SHARE = 0.1, 0.05
"""A validation is followed by saving where that takes no longer, or less than this share of the time since the last."""
COMPILED_FROM = 20_000
"""Steps that are worth the time which compiling the networks for a GPU takes: the published size gains 9 ms in each."""


@dataclass(frozen=True)
class Progress:
    """Where a job is: ``stage`` is ``pack``, ``train``, ``score`` or ``evaluate``; losses are NaN until there is one."""

    stage: str
    done: int
    total: int
    loss: float = math.nan
    validation_loss: float = math.nan
    note: str = ""
    """Something to tell the user."""


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
    device: str = "auto",
    data_licence: str | None = None,
    progress: Report = lambda state: None,
) -> Detector:
    """Train on the healthy slices of a cohort, write the folder ``model`` and return the trained `Detector`.

    ``cohort`` is what `find_cases` takes, or what it gave; ``method``, by default, ``dae``. ``preset`` is ``paper`` (as
    published), ``small`` (the default: the same on a laptop in a quarter of an hour), ``accurate`` (more than the paper's
    recipe, in two hours) or ``quick`` (what of that half an hour can hold). Instead, ``pretrained`` is the folder of a
    model (or ``built-in``) to go on from: its weights, method and recipe, and those of its channels that most cases have;
    of several that went on from the same one, it is the first with the mean of their weights.
    ``settings`` (of the method), ``training`` (fields of `spec.Training`), ``score`` (of `spec.Score`) and ``grid`` (pixels
    of a side of the working grid) replace single values of it.
    Slices with a labelled lesion are left out. Patients are split by the cohort's ``splits.csv`` and the file ``splits``,
    which counts for the cases that it names, else at random, a tenth of them (at least one) for validation; no patient is in
    two splits. ``cache`` holds the packed slices (default: the user's cache folder). ``resume`` continues a training that
    was interrupted, at the step it reached. ``device`` is ``auto``, ``cpu`` or ``cuda``.

    Where torchrun or srun started several processes, each calls this with the same arguments, and they share the
    packing and every batch; ``accumulate`` takes each one's share of a batch in so many parts, which need less memory.
    Neither changes the model, up to the order of sums.

    Raises `AnomriError` for what the user can put right, and `errors.Interrupted`, with all saved, when Ctrl-C or
    SIGTERM asks to stop.
    """
    folder, team = Path(model), join_processes(device)
    cases, notes = with_images(find_cases(cohort) if isinstance(cohort, str | Path) else cohort)
    started = Pretrained.read_all(pretrained) if pretrained else None
    spec = planned(
        cases,
        method=method,
        preset=preset,
        pretrained=started,
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
    cases = split_cases(started.divided(cases, seed) if started else cases, {}, seed)
    # Whom the model has seen, in this training and before.
    known = [*cases, *(started.others(cases) if started else ())]
    for note in [*notes, *notes_of(cases), *(started.notes(spec.channels) if started else ())]:
        progress(Progress("pack", 0, len(cases), note=note))
    place = Path(cache) if cache else default_cache()
    with team.sole_use(folder):
        if team.run_on_main(lambda: finished(folder, spec, known, resume)):
            return Detector.load(folder, device)
        return _train(
            cases, known, started, folder, spec, place, accumulate, team, device, progress
        )


def _train(
    cases: Sequence[Case],
    known: Sequence[Case],
    started: Pretrained | None,
    folder: Path,
    spec: ModelSpec,
    cache: Path,
    accumulate: int,
    team: ProcessGroup,
    device: str,
    progress: Report,
) -> Detector:
    schedule = spec.training
    keep_memory()
    packed = pack_splits(
        cases, spec, cache, team, lambda done, total: progress(Progress("pack", done, total))
    )
    spec = replace(
        spec,
        cohort=describe_cohort(packed, len(cases)),
        crop=common_box(packed, methods.build(spec), spec)
        if schedule and schedule.crop_to_brain
        else None,
    )
    state = TrainingState.load(folder, task_of(spec, packed))
    team.check_same(
        state.step,
        f"{folder}: is not the same folder for all processes; name one that all machines see.",
    )
    if team.is_main:
        write_splits(folder / "splits.csv", known)
    torch.manual_seed(schedule.seed if schedule else 0)
    network = methods.build(spec)
    if started:
        started.begin(network)
    if schedule:
        fabric = make_fabric(device, schedule.precision)
        best = fit(fabric, network, spec, packed, state, folder, progress, team, accumulate)
        # Anew: the one that was trained may be compiled, for batches of its size.
        network = methods.build(spec)
        network.load_state_dict(best)
    detector = Detector(spec, network, resolve_device(device), cases=known)

    def scored(done: int, total: int) -> None:
        progress(Progress("score", done, total))

    scored(0, 1)
    spec = replace(
        spec, score=team.run_on_main(lambda: choose_score(detector, packed["val"], packed["train"]))
    )
    detector.spec = spec
    thresholds = team.run_on_main(lambda: healthy_thresholds(detector, packed["val"], scored))
    parts = team.run_on_main(lambda: subset_thresholds(detector, packed["val"], scored))
    detector.spec = replace(spec, thresholds=thresholds, subset_thresholds=parts)
    if team.is_main:
        detector.save(folder)
        (folder / TrainingState.NAME).unlink(missing_ok=True)
    progress(Progress("score", 1, 1))
    return detector


def fit(
    fabric: Fabric,
    network: Any,
    spec: ModelSpec,
    packed: Packed,
    state: TrainingState,
    folder: Path,
    progress: Report,
    team: ProcessGroup = ProcessGroup(),
    accumulate: int = 1,
) -> dict[str, Tensor]:
    """The training loop; returns the weights with the lowest validation loss. What is random follows the step."""
    training = spec.training
    assert training is not None
    slices, held_out = (HealthySlices(packed[side], fabric.device) for side in ("train", "val"))
    if state.step:
        network.load_state_dict(state.network)
    if training.precision == "bf16-mixed" or fabric.device.type == "cuda":
        # What convolutions are computed in, in bfloat16 and on GPUs; any other layout is turned at every layer.
        network.to(memory_format=torch.channels_last)
    objectives = network.objectives()
    batches = Batches(
        fabric, team, slices, training.batch_size, accumulate, divisible=not objectives[0].name
    )
    model, *optimizers = fabric.setup(
        network, *(optimizer_of(objective, training, fabric.device) for objective in objectives)
    )
    if (
        fabric.device.type == "cuda"
        and training.steps - state.step >= COMPILED_FROM
        and can_compile(fabric.device)
    ):
        compile_networks(network)
    if state.step:
        for objective, optimizer in zip(objectives, optimizers, strict=True):
            load_optimizer(optimizer, state.optimizers[objective.name])
        state.losses = [loss.to(fabric.device) for loss in state.losses]
    steps = [
        Step(
            fabric,
            batches,
            model,
            optimizer,
            partial(_loss, model, spec, objective),
            training.gradient_clip,
        )
        for objective, optimizer in zip(objectives, optimizers, strict=True)
    ]
    log = Log(folder, state.step) if team.is_main else None
    start = time.monotonic() - (log.seconds if log else 0.0)
    loss_mean = loss_held_out = math.nan
    saved, saved_at, took = state.step, time.monotonic(), 0.0
    # Losses that are left are those of a step whose validation was cut short.
    unvalidated = bool(state.losses) and _validated(training, state.step)

    with StopRequest.listen() as stop:
        for step in range(state.step - unvalidated, training.steps):
            if step == state.step:
                batch = batches.load(
                    batch_numbers(len(slices), training, step), training.seed * 2**32 + step
                )
                losses = [
                    move(batch, objective.rate * learning_rate(training, step))
                    for objective, move in zip(objectives, steps, strict=True)
                    if objective.active(step, training.steps)
                ]
                state.step, state.losses = step + 1, [*state.losses, torch.stack(losses).sum()]
                if training.average:
                    state.follow(network, training.average)

            due = _validated(training, state.step)
            since = time.monotonic() - saved_at
            late = team.is_main and (
                since > SAVE_EVERY_S or (due and took < QUICK_S + SAVING_SHARE * since)
            )
            stopping, saving = divmod(
                team.all_reduce_max(2 * (stop.signal or 0) + late, fabric.device), 2
            )
            if due or stopping or saving:
                state.losses = list(team.all_reduce_mean(torch.stack(state.losses), fabric.device))
                _check_losses(state, saved, training, slices)
            if due and not stopping:
                with state.averaged(network):
                    loss = validation_loss(fabric, model, spec, held_out, team, stop)
                    if loss is not None and loss < state.best_loss:
                        state.best_loss = loss
                        state.best = {
                            name: value.cpu().clone()
                            for name, value in network.state_dict().items()
                        }
                if loss is None:
                    stopping = team.all_reduce_max(stop.signal or 0, fabric.device)
                else:
                    loss_mean, loss_held_out = float(torch.stack(state.losses).mean()), loss
                    if log:
                        rate, seconds = learning_rate(training, step), time.monotonic() - start
                        log.add(state.step, loss_mean, loss_held_out, rate, seconds)
                    state.losses = []
            if stopping or saving or state.step == training.steps:
                saved, begun = state.step, time.monotonic()
                state.network = network.state_dict()
                state.optimizers = {
                    p.name: o.state_dict() for p, o in zip(objectives, optimizers, strict=True)
                }
                if team.is_main:
                    state.save(folder)
                saved_at, took = time.monotonic(), time.monotonic() - begun
            progress(
                Progress(
                    "train", state.step, training.steps, loss_mean, loss_held_out, batches.told()
                )
            )
            if stopping:
                raise Interrupted(
                    f"stopped at step {state.step} of {training.steps}; continue with --resume.",
                    stopping,
                )
    if log:
        log.close()
    if not state.best:
        cases = ", ".join(case.name for case in packed["val"][:5])
        raise AnomriError(
            f"the validation loss was never a number; look at the validation cases ({cases}), or train anew with a lower "
            f"--learning-rate or --precision 32-true."
        )
    return state.best


def _loss(
    model: Any, spec: ModelSpec, objective: Objective, x: Tensor, generator: Generator
) -> Tensor:
    loss: Tensor = model(
        x, foreground_of(x, spec.scaling), generator, spec.crop, **objective.arguments
    )
    return loss


def _validated(training: Training, step: int) -> bool:
    return step % training.validate_every == 0 or step == training.steps


def validation_loss(
    fabric: Fabric,
    model: Any,
    spec: ModelSpec,
    held_out: HealthySlices,
    team: ProcessGroup = ProcessGroup(),
    stop: StopRequest | None = None,
) -> float | None:
    """Loss on fixed slices with fixed noise, so that every call sets the same task; ``None`` if asked to stop."""
    training = spec.training
    assert training is not None
    count = min(len(held_out), training.validation_slices)
    chosen = np.linspace(0, len(held_out) - 1, count).astype(int)
    batches = range(0, count, training.batch_size)
    total = torch.zeros((), dtype=torch.float64)
    model.eval()
    # Other sizes and no gradients would be compiled anew, for less than that takes.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        # As many rounds for every process, so that all of them hear of a stop in the same one.
        for turn in range(0, len(batches), team.world_size):
            for number in batches[turn + team.rank : turn + team.rank + 1]:
                x = held_out.batch(chosen[number : number + training.batch_size].tolist())
                generator = Generator(fabric.device).manual_seed(VALIDATION_SEED + number)
                total += float(
                    model(x, foreground_of(x, spec.scaling), generator, spec.crop)
                ) * len(x)
            if stop is not None and team.all_reduce_max(stop.signal or 0, fabric.device):
                break
        else:
            model.train()
            return float(team.all_reduce_mean(total, fabric.device)) * team.world_size / count
    model.train()
    return None


def _check_losses(
    state: TrainingState, saved: int, training: Training, slices: HealthySlices
) -> None:
    """Raise `AnomriError` naming the first step whose loss is not finite, before anything of it is saved."""
    values = torch.stack(state.losses)
    if bool(values.isfinite().all()):
        return
    place = int((~values.isfinite()).nonzero()[0])
    step = state.step - len(values) + place
    cases = ", ".join(slices.names(batch_numbers(len(slices), training, step)))
    raise AnomriError(
        f"the loss of step {step + 1} is {float(values[place])}; its batch has slices of {cases}. If they look right, "
        f"continue from step {saved}, the last one saved, with --resume and a lower --learning-rate or --precision 32-true."
    )
