"""The model in the package: it is there, small, and finds what is plainly wrong in a scan of any
of its channels."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import anomri
from anomri.cli import main
from anomri.demo.cohort import make_cohort
from anomri.model.detector import BUILT_IN
from anomri.scans.find import find_cases
from anomri.slices import SliceStack, Window


def test_the_built_in_model_is_small_and_has_a_card() -> None:
    assert sum(path.stat().st_size for path in BUILT_IN.iterdir()) < 16 * 2**20
    card = " ".join((BUILT_IN / "MODEL_CARD.md").read_text().split())
    for word in ("not a medical device", "Menze", "Bakas", "Where it fails", "AUPRC"):
        assert word in card
    spec = anomri.load().spec
    assert spec.channels == ("flair", "t1", "t1ce", "t2")
    assert len(spec.subset_thresholds) == 14
    assert "BraTS 2018" in spec.data_licence and "no lesion label used" in spec.score.chosen_by


@pytest.fixture(scope="module")
def lesioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One synthetic scan with lesions."""
    folder = tmp_path_factory.mktemp("lesioned")
    make_cohort(folder, healthy=0, lesioned=1, seed=3)
    return folder


@pytest.mark.slow
def test_the_built_in_model_finds_synthetic_lesions_with_all_channels_and_with_some(
    lesioned: Path,
) -> None:
    detector, (case,) = anomri.load(), find_cases(lesioned)
    for part in (detector.spec.channels, ("flair", "t2"), ("flair",)):
        found = detector.with_channels(part).detect(case)
        label = found.volume.label
        assert label is not None
        brain = (found.volume.data > 0).any(0)
        rank = np.mean(found.anomaly_map[label].mean() > found.anomaly_map[brain & ~label])
        assert rank > 0.7, part  # synthetic brains are not those it knows


@pytest.mark.slow
def test_the_built_in_model_takes_one_file_of_any_name(
    lesioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (case,) = find_cases(lesioned)
    scan = tmp_path / "scan.nii.gz"
    shutil.copy(case.channels["flair"], scan)
    assert main(["detect", "-i", str(scan), "-o", str(tmp_path / "out")]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "for research only" in told and "has no t1, t1ce, t2" in told
    facts = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert facts["channels"] == ["flair"]
    named = anomri.load().detect(replace(case, channels={"flair": scan}))
    assert facts["peak"] == pytest.approx(float(named.anomaly_map.max()))


def test_the_built_in_model_looks_at_a_scan_once() -> None:
    detector = anomri.load(precision="32-true")
    assert not detector.spec.score.flips
    x = torch.rand((2, 4, 128, 128), generator=torch.Generator().manual_seed(0))
    foreground = torch.ones((2, 128, 128), dtype=torch.bool)
    stack = SliceStack(x, foreground, range(2), (), None, Window(0, 0, 128, 128))
    assert torch.equal(detector.output(stack), detector.inference(x, (0, 128, 0, 128)))
