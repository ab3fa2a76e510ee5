"""Several methods, noise settings and seeds on one cohort by one command: the paper's Table 1 and Figure 4."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anomri.comparison.jobs import Job, evaluate_job, result_of, run_in_process, train_job
from anomri.comparison.report import Row, write_comparison
from anomri.errors import AnomriError
from anomri.evaluation.evaluate import choose_cases
from anomri.files import output_folder, read_json, write_text
from anomri.methods import registry as methods
from anomri.runs.records import files_of
from anomri.runtime.folders import RUN_FACTS, refuse_foreign, refuse_foreign_tables, sole_use
from anomri.runtime.launch import require_single_process
from anomri.scans.case import Case, common_channels
from anomri.scans.find import find_cases
from anomri.scans.splits import read_splits, split_cases
from anomri.spec import ModelSpec
from anomri.training.train import Progress

CURVES = ("noise_resolution", "noise_std")
TABLES = ("table.tsv", "table.md", "cost.tsv", "examples.png", "report.html")
"""What a comparison writes beside ``comparison.json`` and the picture of each curve."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: a row per method, setting and filter, and the jobs that failed, with why."""

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
    """Train and evaluate methods on one cohort and write tables, curves, pictures and ``report.html`` into ``out``.

    ``methods`` are names or ``all``; ``noise_resolution`` and ``noise_std`` vary the denoising autoencoder's noise one at
    a time; each is trained with the seeds 0 to ``seeds`` - 1. Every test scan is reconstructed once a model, and
    scored without and with median filter, without and with component filter. Test cases are those of the split
    ``test``, or of ``split``. What is finished in ``out`` is reused and what was interrupted goes on, so the same
    command, or one with more methods, settings or seeds, may be given again. ``training`` replaces fields of every
    preset's training.

    A job that fails is named in the result, and the others go on. Raises `AnomriError` for what does not fit
    from the start, and `errors.Interrupted` at Ctrl-C or SIGTERM.
    """
    require_single_process("a comparison")
    folder = output_folder(Path(out))
    cases = find_cases(cohort) if isinstance(cohort, str | Path) else list(cohort)
    # Split once, so that the seed changes the training alone.
    cases = split_cases(cases, read_splits(Path(splits)) if splits else {}, seed=0)
    if split is None and not any(case.split == "test" for case in cases):
        raise AnomriError(
            "no case is in the split test; write a splits.csv (case,split) into the cohort, or name one with --splits, so "
            "that methods are compared on cases that none was trained on."
        )
    test_cases, chosen = choose_cases(cases, split or "test")
    first = Job(
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
    jobs = plan(first, methods, noise_resolution, noise_std, seeds)
    with sole_use(folder):
        for left in (folder / "results").glob(".scores-*"):
            shutil.rmtree(left, ignore_errors=True)  # of a run that was killed
        _same_comparison(folder, first)
        protocol = {
            "cases": f"{len(test_cases)} ({chosen})",
            "preset": preset
            + "".join(f", {name} {value}" for name, value in (training or {}).items()),
        }
        failed: dict[str, str] = {}
        report, rows = write_comparison(folder, jobs, protocol, failed)
        for job in jobs:
            try:
                if not _is_done(job):
                    _do(job, partial(progress, job.name))
                    # Written again after every job: what there is can be looked at while the rest runs.
                    report, rows = write_comparison(folder, jobs, protocol, failed)
            except AnomriError as error:
                failed[job.name] = str(error)
                report, rows = write_comparison(folder, jobs, protocol, failed)
        for job in jobs:
            failed |= {
                f"{job.name}, {case}": error
                for case, error in result_of(job).get("failed", {}).items()
            }
        return Comparison(tuple(rows), report, failed)


def plan(
    first: Job,
    names: str | Sequence[str],
    noise_resolution: Sequence[int] = (),
    noise_std: Sequence[float] = (),
    seeds: int = 1,
) -> list[Job]:
    """The jobs of a comparison, seed by seed, so that a whole table is there early; raises `AnomriError`.

    A noise setting that is the preset's own is the method itself, and is trained once.
    """
    if seeds < 1:
        raise AnomriError(f"a comparison needs at least one seed, not {seeds}.")
    known = methods.names()
    chosen = (
        known if names == "all" else names.split(",") if isinstance(names, str) else list(names)
    )
    chosen = list(dict.fromkeys(name.strip() for name in chosen if name.strip()))
    jobs = []
    for method in chosen:
        own = methods.preset(
            method, first.preset
        )  # raises for a method or preset that there is not
        jobs.append(replace(first, variant=method, method=method, trained=own.weights_of or method))
    for setting, values in zip(CURVES, (noise_resolution, noise_std), strict=True):
        jobs += [_noise_job(first, setting, value) for value in values]
    unique = list({job.variant: job for job in jobs}.values())
    for job in unique:
        _built(job)
    if not unique:
        raise AnomriError(f"there is nothing to compare; the methods are {', '.join(known)}.")
    return [
        replace(job, seed=seed)
        for seed in range(seeds)
        for job in unique
        if seed == 0 or methods.preset(job.method, job.preset).training is not None
    ]


def _noise_job(first: Job, setting: str, value: float) -> Job:
    job = replace(first, variant="dae", method="dae", trained="dae")
    if getattr(_built(job), setting) == value:
        return job
    variant = f"dae-{setting}-{value:g}"
    return replace(job, variant=variant, trained=variant, settings={setting: value})


def _built(job: Job) -> Any:
    settings = {**methods.preset(job.method, job.preset).settings, **job.settings}
    return methods.build(ModelSpec(job.channels or ("flair",), job.method, settings))


def _do(job: Job, tell: Callable[[Progress], None]) -> None:
    if not (job.model / "model.json").is_file():
        owner = job
        if job.trained != job.variant:
            owner = replace(job, variant=job.trained, method=job.trained, settings={})
        run_in_process(train_job, owner, tell)
    run_in_process(evaluate_job, job, tell)


def _is_done(job: Job) -> bool:
    """Whether all test cases were evaluated, as their files are now."""
    result = result_of(job)
    return not result.get("failed", True) and result.get("files") == files_of(
        job.test_cases, job.channels or ()
    )


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
        "files": files_of(
            [case for case in first.training_cases if case.split != "test"], first.channels or ()
        ),
        "version of anomri": version("anomri"),
    }
    if path.is_file():
        before = read_json(path)
        changed = [name for name, value in facts.items() if before.get(name, value) != value]
        if changed:
            raise AnomriError(
                f"{path}: was begun with other {', '.join(changed)}; give the same ones, or name another folder with -o."
            )
    write_text(path, json.dumps(facts, indent=2) + "\n")
