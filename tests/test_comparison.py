"""Several methods compared by one command: what is trained, reused, resumed and written."""

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import anomri
from anomri.cli import main
from anomri.cli.options import parse_numbers, parse_settings
from anomri.comparison import jobs as comparison_jobs
from anomri.comparison.compare import compare, plan
from anomri.comparison.jobs import Job, evaluate_job, run_in_process, train_job
from anomri.comparison.pictures import noise_curve
from anomri.comparison.tables import Row
from anomri.errors import AnomriError, Interrupted
from anomri.methods import registry as methods
from anomri.methods.base import Preset
from anomri.methods.vae import VAE, VAERestoration
from anomri.scans.find import find_cases
from anomri.training.state import TrainingState
from anomri.training.train import Progress

WIDTHS = [2, 4, 8, 16]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Run jobs in this process, which knows the tiny preset; gives a list of those that ran."""
    ran = []

    def run(work, job, on_progress):  # type: ignore[no-untyped-def]
        ran.append((work.__name__, job.name))
        work(job, on_progress)

    monkeypatch.setattr("anomri.comparison.compare.run_in_process", run)
    return ran


@pytest.fixture
def tiny_vae(tiny_preset: None, monkeypatch: pytest.MonkeyPatch) -> None:
    training = replace(
        methods.preset("dae", "tiny").training, steps=4, validate_every=2, crop_to_brain=False
    )  # type: ignore[type-var]
    settings = {"widths": WIDTHS, "latent": 4}
    monkeypatch.setitem(VAE.PRESETS, "tiny", Preset(settings, training))
    restoring = Preset({**settings, "restoration_steps": 2}, training, weights_of="vae")
    monkeypatch.setitem(VAERestoration.PRESETS, "tiny", restoring)


def first(out: Path, preset: str = "tiny") -> Job:
    return Job("", "", 0, out, "", [], [], preset, channels=("flair", "t1"))


@pytest.mark.slow
def test_a_comparison_writes_a_table_curves_and_pictures_and_reuses_finished_jobs(
    cohort: Path, cache: Path, tiny_vae: None, here: list[tuple[str, str]], tmp_path: Path
) -> None:
    # Some of its files change below, and other tests read the shared one at the same time.
    shutil.copytree(cohort, tmp_path / "cohort")
    cohort, out = tmp_path / "cohort", tmp_path / "out"
    given = {
        "preset": "tiny",
        "cache": cache,
        "device": "cpu",
        "training": {"steps": 4, "validate_every": 2},
    }
    # Thresholding has no preset "tiny": what is given must fit before anything is trained.
    with pytest.raises(AnomriError, match="thresholding has no preset 'tiny'"):
        compare(cohort, out, methods="dae,thresholding", **given)  # type: ignore[arg-type]
    assert not here
    given |= {"methods": ["dae", "vae-restoration", "vae"], "noise_resolution": [8, 16]}
    comparison = compare(cohort, out, **given)  # type: ignore[arg-type]
    assert not comparison.failed
    trained = [name for work, name in here if work == "train_job"]
    # One training serves the VAE's two scores, and resolution 16 is the method's own.
    assert trained == ["dae-seed0", "vae-seed0", "dae-noise_resolution-8-seed0"]
    assert len([work for work, _ in here if work == "evaluate_job"]) == 4

    titles = [row.title for row in comparison.rows]
    assert titles[:4] == [
        "VAE reconstruction",
        "VAE reconstruction + median",
        "VAE restoration",
        "VAE restoration + median",
    ]
    assert "DAE, noise resolution 8 + median" in titles
    by_title = dict(zip(titles, comparison.rows, strict=True))
    assert by_title["VAE restoration"].values("auprc") != by_title["VAE reconstruction"].values(
        "auprc"
    )
    # The row with median is what `evaluate` says of the same model.
    model = out / "models" / "dae-seed0"
    evaluation = anomri.evaluate(cohort, model=model)
    dae = by_title["DAE + median"]
    assert dae.figures["auprc"][0] == pytest.approx(
        (evaluation.figures[0].value, evaluation.figures[0].low, evaluation.figures[0].high)
    )
    assert dae.values("ceil_dice_components")[0] == pytest.approx(
        evaluation["ceil-Dice, pooled, components filtered"]
    )
    assert by_title["DAE"].values("auprc") != dae.values("auprc")

    written = {path.name for path in out.iterdir()}
    assert {
        "table.tsv",
        "table.md",
        "cost.tsv",
        "report.html",
        "examples.png",
        "noise_resolution.png",
    } <= written
    assert "noise_std.png" not in written
    page = (out / "report.html").read_text()
    assert "4 of 4 jobs done" in page and page.count("data:image/png") == 2
    table = (out / "table.md").read_text().splitlines()
    assert table[0].startswith("| method | seeds | AUPRC |")
    costs = [line.split("\t") for line in (out / "cost.tsv").read_text().splitlines()]
    assert [row[0] for row in costs[1:]] == [
        "VAE reconstruction",
        "VAE restoration",
        "DAE",
        "DAE, noise resolution 8",
    ]
    assert all(
        row[2] == "4" and float(row[4]) > 0 and float(row[5]) > 50 and float(row[6]) > 50
        for row in costs[1:]
    )

    # With a second seed, only that seed is done; with other settings, the folder is refused.
    before = list(here)
    given |= {"methods": "dae", "noise_resolution": (), "seeds": 2}
    compare(cohort, out, **given)  # type: ignore[arg-type]
    assert here[len(before) :] == [("train_job", "dae-seed1"), ("evaluate_job", "dae-seed1")]
    assert "| DAE + median | 2 | " in (text := (out / "table.md").read_text()) and "±" in text
    with pytest.raises(
        AnomriError, match=r"comparison.json: was begun with other training; give the same"
    ):
        compare(cohort, out, **{**given, "training": {"steps": 5}})  # type: ignore[arg-type]
    # Training scans must stay the same; test scans that have changed are evaluated again.
    (scan,) = (cohort / "case0").glob("*_flair.nii.gz")
    label = cohort / "case8" / "case8_seg.nii.gz"
    contents = {path: path.read_bytes() for path in (scan, label)}
    before = list(here)
    for path in (scan, label):
        os.utime(path)
    compare(cohort, out, **given)  # type: ignore[arg-type]
    assert here == before, "a file that was only touched is the same"
    scan.write_bytes(gzip.compress(gzip.decompress(contents[scan]), 1))
    with pytest.raises(AnomriError, match="was begun with other files; give"):
        compare(cohort, out, **given)  # type: ignore[arg-type]
    scan.write_bytes(contents[scan])
    label.write_bytes(gzip.compress(gzip.decompress(contents[label]), 1))
    compare(cohort, out, **given)  # type: ignore[arg-type]
    assert here[len(before) :] == [("evaluate_job", "dae-seed0"), ("evaluate_job", "dae-seed1")]


def test_a_stopped_comparison_resumes_where_it_stopped(
    cohort: Path, cache: Path, tiny_preset: None, here: list[tuple[str, str]], tmp_path: Path
) -> None:
    given = {
        "methods": "dae",
        "preset": "tiny",
        "cache": cache,
        "device": "cpu",
        "training": {"steps": 6},
    }

    def stop(job: str, state: Progress) -> None:
        if state.stage == "train" and state.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        compare(cohort, tmp_path, progress=stop, **given)  # type: ignore[arg-type]
    state = TrainingState.load(tmp_path / "models" / "dae-seed0", {})
    assert state.step in (3, 4)
    steps = []
    compare(
        cohort,
        tmp_path,
        progress=lambda job, s: steps.append(s.done) if s.stage == "train" else None,
        **given,
    )  # type: ignore[arg-type]
    assert steps == list(range(state.step + 1, 7))
    assert (tmp_path / "results" / "dae-seed0.json").is_file()


@pytest.mark.slow
def test_a_failed_job_is_named_and_the_others_run(
    cohort: Path, cache: Path, tiny_vae: None, here: list[tuple[str, str]], tmp_path: Path
) -> None:
    given = {
        "preset": "tiny",
        "cache": cache,
        "device": "cpu",
        "training": {"steps": 2, "validate_every": 2},
    }
    comparison = compare(cohort, tmp_path, methods="dae,vae", noise_std=[float("nan")], **given)  # type: ignore[arg-type]
    assert list(comparison.failed) == ["dae-noise_std-nan-seed0"]
    assert "its setting noise_std is nan" in comparison.failed["dae-noise_std-nan-seed0"]
    assert len(comparison.rows) == 4
    assert "failed: dae-noise_std-nan-seed0" in comparison.report.read_text()


@pytest.mark.slow
def test_the_compare_command_runs_each_job_in_its_own_process(
    cohort: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "compare",
        "-i",
        str(cohort),
        "-o",
        str(tmp_path),
        "--methods",
        "dae",
        "--noise-std",
        "much",
    ]
    command += ["--preset", "demo", "--cache", str(cache), "--device", "cpu", "--steps", "2"]
    assert main(command) == 2
    command = [word for word in command if word not in ("--noise-std", "much")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "| DAE + median | 1 |" in out
    result = json.loads((tmp_path / "results" / "dae-seed0.json").read_text())
    assert result["peak_memory_mb"] > 50 and result["cases"] == 2 and result["failed"] == {}
    assert main([*command, "--preset", "huge"]) == 2


def wait_for_a_signal(job: Job, on_progress: comparison_jobs.OnProgress) -> None:
    on_progress(Progress("train", 0, 1))
    time.sleep(60)


def die(job: Job, on_progress: comparison_jobs.OnProgress) -> None:
    os._exit(3)


@pytest.mark.slow
def test_a_job_process_is_stopped_by_signals_and_its_death_is_an_error(tmp_path: Path) -> None:
    job = replace(first(tmp_path), variant="x")
    reported = []

    def report(state: Progress) -> None:
        reported.append(state)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()

    begun = time.monotonic()
    with pytest.raises(Interrupted, match="stopped in x-seed0; rerun the same command to resume"):
        run_in_process(wait_for_a_signal, job, report)
    assert time.monotonic() - begun < 60
    assert len(reported) == 1
    assert not multiprocessing.active_children()
    with pytest.raises(AnomriError, match=r"x-seed0: its process ended with code 3"):
        run_in_process(die, job, report)


def test_a_plan_has_each_method_and_setting_once_for_each_seed(tmp_path: Path) -> None:
    jobs = plan(first(tmp_path, "small"), "all", noise_std=[0.25, 0.4], seeds=3)
    names = [job.name for job in jobs]
    assert names[0].endswith("-seed0") and names[-1].endswith("-seed2")
    assert names.count("dae-noise_std-0.4-seed1") == names.count("dae-seed1") == 1
    assert "dae-noise_std-0.25-seed0" not in names
    assert [name for name in names if name.startswith("thresholding")] == ["thresholding-seed0"]
    restoration = next(job for job in jobs if job.method == "vae-restoration")
    assert restoration.model == tmp_path / "models" / "vae-seed0"
    for bad, message in (
        ({"methods": "magic"}, "no method 'magic'"),
        ({"methods": ""}, "nothing to compare"),
    ):
        with pytest.raises(AnomriError, match=message):
            plan(first(tmp_path, "small"), **bad)
    with pytest.raises(AnomriError, match="at least one seed"):
        plan(first(tmp_path, "small"), "all", seeds=0)


def test_rows_show_mean_deviation_and_interval() -> None:
    row = Row("dae-noise_std-0.4", True, {"auprc": [(0.5, 0.4, 0.6), (0.7, 0.5, 0.8)]})
    assert row.title == "DAE, noise std 0.4 + median"
    assert row.words("auprc") == f"0.600 ± {np.std([0.5, 0.7], ddof=1):.3f}"
    assert row.interval("auprc") == "0.450 - 0.700"
    assert Row("x", False, {"auprc": [(0.5, None, None)]}).interval("auprc") == ""


def test_lists_of_numbers_are_parsed() -> None:
    assert parse_numbers(["1,2, 4", "8"], int) == [1, 2, 4, 8]
    assert parse_numbers(None, float) == []
    with pytest.raises(AnomriError, match="1,x: not a list of numbers|1, x: not a list of numbers"):
        parse_numbers(["1,x"], float)


def test_a_scan_that_fails_does_not_stop_the_evaluation(
    cohort: Path, cache: Path, tiny_preset: None, tmp_path: Path
) -> None:
    cases = find_cases(cohort)
    broken = replace(cases[8], channels={**cases[8].channels, "t1": cohort / "none.nii.gz"})
    job = Job(
        "dae",
        "dae",
        0,
        tmp_path,
        "dae",
        cases,
        [cases[7], broken],
        "tiny",
        training={"steps": 2},
        cache=cache,
        device="cpu",
    )
    train_job(job, lambda state: None)
    evaluate_job(job, lambda state: None)
    result = json.loads(job.result.read_text())
    assert result["cases"] == 1 and list(result["failed"]) == ["case8"]
    with np.load(job.result.with_suffix(".npz")) as arrays:
        assert arrays["map"].shape == arrays["scan"].shape == (1, 128, 128)


def test_failed_scans_are_named_and_evaluated_again_once_repaired(
    cohort: Path, cache: Path, tiny_preset: None, here: list[tuple[str, str]], tmp_path: Path
) -> None:
    shutil.copytree(cohort, tmp_path / "cohort")
    scan = tmp_path / "cohort" / "case8" / "case8_t1.nii.gz"
    whole, given = (
        scan.read_bytes(),
        {"methods": "thresholding", "preset": "small", "cache": cache, "device": "cpu"},
    )
    scan.write_bytes(whole[:2000])
    out = tmp_path / "out"
    for _ in range(2):
        comparison = compare(tmp_path / "cohort", out, **given)  # type: ignore[arg-type]
        assert list(comparison.failed) == ["thresholding-seed0, case8"]
    jobs = len(here)
    scan.write_bytes(whole)
    assert not compare(tmp_path / "cohort", out, **given).failed  # type: ignore[arg-type]
    assert len(here) == jobs + 1
    assert not compare(tmp_path / "cohort", out, **given).failed and len(here) == jobs + 1  # type: ignore[arg-type]
    (out / "comparison.json").write_text("[1]")
    with pytest.raises(AnomriError, match="comparison.json: cannot be read as a JSON object"):
        compare(tmp_path / "cohort", out, **given)  # type: ignore[arg-type]


def test_settings_are_parsed_as_json() -> None:
    assert parse_settings(["noise=coarse", "start=100", "widths=[2,4]"]) == {
        "noise": "coarse",
        "start": 100,
        "widths": [2, 4],
    }
    with pytest.raises(AnomriError, match="noise: not a setting"):
        parse_settings(["noise"])


def test_a_preset_with_varied_noise_is_not_a_point_of_the_noise_curve(tmp_path: Path) -> None:
    def done(variant: str, settings: dict[str, object]) -> tuple[Job, dict[str, object]]:
        figures = {name: {"auprc": [0.5, 0.4, 0.6]} for name in ("plain", "median")}
        return replace(first(tmp_path), variant=variant), {"settings": settings, "figures": figures}

    noised = [done(f"dae-noise_std-{value}", {"noise_std": value}) for value in (0.1, 0.2)]
    varied = done("dae", {"noise_std": [0.03, 0.25]})
    figure = noise_curve("noise_std", [varied, *noised])
    assert figure is not None and list(figure.axes[0].get_xticks()) == [0.1, 0.2]


def test_a_cohort_without_a_test_split_is_refused(cohort: Path, tmp_path: Path) -> None:
    cases = [case for case in find_cases(cohort) if case.split != "test"]
    with pytest.raises(AnomriError, match="no case is in the split test, .* write a splits.csv"):
        compare(cases, tmp_path, methods="thresholding")
