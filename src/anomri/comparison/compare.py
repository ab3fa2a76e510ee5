"""Compare methods, noise settings and seeds on one cohort: the paper's Table 1 and Figure 4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anomri.comparison.jobs import (
    Job,
    OnProgress,
    evaluate_job,
    read_result,
    run_in_process,
    train_job,
)
from anomri.comparison.report import write_comparison
from anomri.comparison.tables import Row
from anomri.errors import AnomriError
from anomri.evaluation.cases import choose_cases
from anomri.files import output_folder, read_json, write_text
from anomri.methods import registry
from anomri.methods.base import Method
from anomri.runs.identity import are_same, identify, store_scans
from anomri.runtime.folders import RUN_FACTS, refuse_foreign, refuse_foreign_tables, sole_use
from anomri.runtime.launch import require_single_process
from anomri.scans.case import Case, common_channels
from anomri.scans.find import find_cases
from anomri.scans.splits import read_splits, split_cases
from anomri.spec import ModelSpec
from anomri.training.train import Progress

CURVES = ("noise_resolution", "noise_std")
"""Settings of the denoising autoencoder that a comparison varies, one at a time."""
TABLES = ("table.tsv", "table.md", "cost.tsv", "examples.png", "report.html")
"""What a comparison writes beside ``comparison.json`` and the picture of each curve."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: a row per method, setting and filter, and why jobs failed."""

    rows: tuple[Row, ...]
    report: Path
    failed: dict[str, str] = field(default_factory=dict)


def compare(
    cohort: str | Path | Sequence[Case],
    out: str | Path,
    *,
    methods: str | Sequence[str] = "all",
    noise_resolution: Sequence[int] = (),
    noise_std: Sequence[float] = (),
    seeds: int = 1,
    preset: str = "small",
    channels: Sequence[str] | None = None,
    training: dict[str, Any] | None = None,
    splits: str | Path | None = None,
    split: str | None = None,
    cache: str | Path | None = None,
    device: str = "auto",
    progress: Callable[[str, Progress], None] = lambda job, state: None,
) -> Comparison:
    """Train and evaluate methods on one cohort and write tables, curves, pictures and a report.

    ``methods`` are names or ``all``. ``noise_resolution`` and ``noise_std`` vary the noise of the
    denoising autoencoder, one at a time. Each is trained with the seeds 0 to ``seeds`` - 1. Each
    model reconstructs a test scan once; its map is scored without and with the median filter, and
    its mask without and with the component filter. Test cases are those of ``split``, by default
    ``test``. ``training`` replaces fields of every preset's training.

    The same command resumes an interrupted comparison and reuses what is finished in ``out``; more
    methods, settings or seeds may be added. A job that fails is named in the result, and the
    others go on.

    Raises `AnomriError` if the arguments do not fit, and `errors.Interrupted` at Ctrl-C or
    SIGTERM.
    """
    require_single_process("a comparison")
    folder = output_folder(Path(out))
    cases = find_cases(cohort) if isinstance(cohort, str | Path) else list(cohort)
    # Split once, so that the seed changes the training alone.
    cases = split_cases(cases, read_splits(Path(splits)) if splits else {}, seed=0)
    if split is None and not any(case.split == "test" for case in cases):
        raise AnomriError(
            "no case is in the split test, so there is none that no method was trained on; write "
            "a splits.csv (case,split) into the cohort, or name one with --splits."
        )
    test_cases, chosen = choose_cases(cases, split or "test")
    template = Job(
        variant="",
        method="",
        seed=0,
        out=folder,
        trained="",
        training_cases=cases,
        test_cases=test_cases,
        preset=preset,
        training=training or {},
        channels=tuple(channels or common_channels(cases)),
        cache=None if cache is None else Path(cache),
        device=device,
    )
    jobs = plan(template, methods, noise_resolution, noise_std, seeds)
    changed = [f"{name} {value}" for name, value in (training or {}).items()]
    protocol = {
        "cases": f"{len(test_cases)} ({chosen})",
        "preset": ", ".join([preset, *changed]),
    }
    with sole_use(folder):
        _remove_abandoned_scores(folder)
        _same_comparison(folder, template)
        return _run_all(jobs, folder, protocol, progress)


def _run_all(
    jobs: Sequence[Job],
    folder: Path,
    protocol: Mapping[str, str],
    progress: Callable[[str, Progress], None],
) -> Comparison:
    failed: dict[str, str] = {}
    report, rows = write_comparison(folder, jobs, protocol, failed)
    for job in jobs:
        try:
            if _is_done(job):
                continue
            _run(job, partial(progress, job.name))
        except AnomriError as error:
            failed[job.name] = str(error)
        # After every job, so that one can look at the first results while the rest runs.
        report, rows = write_comparison(folder, jobs, protocol, failed)
    for job in jobs:
        for case, why in read_result(job).get("failed", {}).items():
            failed[f"{job.name}, {case}"] = why
    return Comparison(tuple(rows), report, failed)


def _run(job: Job, on_progress: OnProgress) -> None:
    """Train the job's model, unless it is trained, and evaluate it."""
    if not (job.model / "model.json").is_file():
        owner = job
        if job.trained != job.variant:
            owner = replace(job, variant=job.trained, method=job.trained, settings={})
        run_in_process(train_job, owner, on_progress)
    run_in_process(evaluate_job, job, on_progress)


def plan(
    template: Job,
    methods: str | Sequence[str],
    noise_resolution: Sequence[int] = (),
    noise_std: Sequence[float] = (),
    seeds: int = 1,
) -> list[Job]:
    """The jobs of a comparison, made from a ``template`` that says what they share.

    They are in the order of seeds, so that a whole table is there early. A noise setting that is
    the preset's own is the method itself, and is trained once. Raises `AnomriError` for unknown
    methods, presets and settings.
    """
    if seeds < 1:
        raise AnomriError(f"a comparison needs at least one seed, not {seeds}.")
    jobs = []
    for method in _parse_methods(methods):
        shared = registry.preset(method, template.preset).weights_of
        jobs.append(replace(template, variant=method, method=method, trained=shared or method))
    jobs += [_noise_job(template, CURVES[0], value) for value in noise_resolution]
    jobs += [_noise_job(template, CURVES[1], value) for value in noise_std]
    if not jobs:
        raise AnomriError(
            f"there is nothing to compare; the methods are {', '.join(registry.names())}."
        )
    variants = list({job.variant: job for job in jobs}.values())
    for job in variants:
        _build(job)  # raises if a setting is wrong
    return [
        replace(job, seed=seed)
        for seed in range(seeds)
        for job in variants
        # What is not trained is the same for every seed.
        if seed == 0 or registry.preset(job.method, job.preset).training is not None
    ]


def _parse_methods(methods: str | Sequence[str]) -> list[str]:
    if methods == "all":
        return registry.names()
    if isinstance(methods, str):
        methods = methods.split(",")
    return list(dict.fromkeys(name.strip() for name in methods if name.strip()))


def _noise_job(template: Job, setting: str, value: float) -> Job:
    """The denoising autoencoder with another noise, or as it is where the noise is its own."""
    job = replace(template, variant="dae", method="dae", trained="dae")
    if getattr(_build(job), setting) == value:
        return job
    variant = f"dae-{setting}-{value:g}"
    return replace(job, variant=variant, trained=variant, settings={setting: value})


def _build(job: Job) -> Method:
    settings = {**registry.preset(job.method, job.preset).settings, **job.settings}
    return registry.build(ModelSpec(job.channels or ("flair",), job.method, settings))


def _remove_abandoned_scores(folder: Path) -> None:
    """Remove the scores that a killed evaluation left."""
    for left in (folder / "results").glob(".scores-*"):
        shutil.rmtree(left, ignore_errors=True)


def _is_done(job: Job) -> bool:
    """Whether all test cases were evaluated, as their files are now."""
    result = read_result(job)
    scans = identify(job.test_cases, job.channels or ())
    return not result.get("failed", True) and are_same(result.get("scans"), scans)


def _same_comparison(folder: Path, first: Job) -> None:
    """Refuse to mix the models of two comparisons in one folder."""
    path = folder / "comparison.json"
    refuse_foreign([path], lambda path: RUN_FACTS[path.name] in read_json(path))
    refuse_foreign_tables(folder, TABLES)
    facts = {
        "preset": first.preset,
        "training": first.training,
        "channels": list(first.channels or ()),
        "cases": {case.name: case.split for case in first.training_cases},
        "test cases": [case.name for case in first.test_cases],
        "version of anomri": version("anomri"),
    }
    used = [case for case in first.training_cases if case.split != "test"]
    scans = identify(used, first.channels or ())
    if path.is_file():
        before = read_json(path)
        changed = [name for name, value in facts.items() if before.get(name, value) != value]
        if not are_same(before.get("files"), scans):
            changed.append("files")
        if changed:
            raise AnomriError(
                f"{path}: was begun with other {', '.join(changed)}; give the same ones, or choose "
                f"another folder with -o."
            )
    write_text(path, json.dumps({**facts, "files": store_scans(scans)}, indent=2) + "\n")
