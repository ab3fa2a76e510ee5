"""What only a GPU can show; all of it is skipped where there is none."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import anomri
from anomri.errors import Interrupted
from anomri.methods.dae import ACCURATE, DAE
from anomri.methods.draws import PartGenerator
from anomri.runs.detect import detect_cohort
from anomri.runtime.devices import can_compile
from anomri.scans.find import find_cases
from anomri.spec import Grid, Scaling
from anomri.training import steps
from anomri.training import train as training
from anomri.training.packing import HealthySlices, pack_cohort

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
GPU = "cuda"


def losses(model: Path) -> list[float]:
    with (model / "log.csv").open(newline="") as file:
        return [float(row["validation_loss"]) for row in csv.DictReader(file)]


def test_slices_kept_on_the_gpu_equal_those_of_the_files(cohort: Path, cache: Path) -> None:
    packed = pack_cohort(find_cases(cohort), ("flair", "t1"), Grid(), Scaling(), cache)
    there, here = HealthySlices(packed, GPU), HealthySlices(packed)
    numbers = [0, len(here) - 1, 7, 7]
    assert torch.equal(there.batch(numbers).cpu(), here.batch(numbers))
    there._resident = None
    assert torch.equal(there.batch(numbers).cpu(), here.batch(numbers))


# That the check may miss something is no reason to fail.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_training_step_of_the_dae_waits_for_the_gpu() -> None:
    network = DAE(("flair", "t1", "t1ce", "t2"), **ACCURATE).to(GPU)
    x = torch.rand((4, 4, 96, 88), device=GPU)
    generator = PartGenerator(torch.device(GPU), 0, 4).manual_seed(1)
    network(x, x.sum(1) > 0, generator).backward()  # constants are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        network(x, x.sum(1) > 0, generator).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_gpu_trains_the_model_of_a_processor(
    cohort: Path, cache: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "preset": "tiny",
        "cache": cache,
        "training": {"precision": precision, "average": 0.9},
    }
    here = anomri.train(cohort, tmp_path / "here", device="cpu", **settings)
    there = anomri.train(cohort, tmp_path / "there", device=GPU, **settings)
    # Their random numbers differ, and so does the noise of the validation.
    assert losses(tmp_path / "there")[-1] == pytest.approx(losses(tmp_path / "here")[-1], rel=0.35)
    assert there.spec.settings == here.spec.settings
    if precision == "bf16-mixed" and can_compile(torch.device(GPU)):
        monkeypatch.setattr(training, "COMPILED_FROM", 1)
        anomri.train(cohort, tmp_path / "compiled", device=GPU, **settings)
        assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "there"), rel=0.05)
        assert anomri.load(tmp_path / "compiled", "cpu").fingerprint


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_recorded_step_equals_its_kernels_one_by_one(
    cohort: Path, cache: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "preset": "tiny",
        "settings": {**ACCURATE, "widths": [4, 8, 16, 32]},
        "cache": cache,
        "device": GPU,
        "training": {"precision": precision, "average": 0.9, "validate_every": 10},
    }
    recorded = []
    record = steps.Step._record
    monkeypatch.setattr(
        steps.Step,
        "_record",
        lambda step, part: (record(step, part), recorded.append(step.graph is not None)),
    )
    anomri.train(cohort, tmp_path / "recorded", **settings)
    assert recorded == [True]
    monkeypatch.setattr(steps, "WARM_UP", 100)
    anomri.train(cohort, tmp_path / "launched", **settings)
    assert recorded == [True]
    assert losses(tmp_path / "recorded") == pytest.approx(losses(tmp_path / "launched"), rel=0.02)


def test_a_training_on_a_gpu_resumes_where_it_stopped(
    cohort: Path, cache: Path, tmp_path: Path
) -> None:
    def stop(state: training.Progress) -> None:
        if state.stage == "train" and state.done == 30:  # between validations: losses are saved
            os.kill(os.getpid(), signal.SIGINT)

    settings = {"preset": "tiny", "cache": cache, "device": GPU, "training": {"average": 0.9}}
    anomri.train(cohort, tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        anomri.train(cohort, tmp_path / "part", progress=stop, **settings)
    anomri.train(cohort, tmp_path / "part", resume=True, **settings)
    assert losses(tmp_path / "part") == pytest.approx(losses(tmp_path / "whole"), rel=0.02)


def test_scans_in_parallel_on_a_gpu_give_the_maps_of_a_processor(
    cohort: Path, model: Path, tmp_path: Path
) -> None:
    for device in (GPU, "cpu"):
        results = detect_cohort(cohort, tmp_path / device, anomri.load(model, device, "32-true"))
        assert [result.error for result in results] == [None] * 9
    for path in (tmp_path / "cpu").glob("*_anomaly.nii.gz"):
        here, there = (
            np.asanyarray(nib.load(tmp_path / device / path.name).dataobj)
            for device in ("cpu", GPU)
        )
        assert np.abs(there - here).max() < 0.01
