"""Results in a folder: they replace nothing that is not theirs, and none of two models or runs lie side by side."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import anomri
from anomri.cli import main
from anomri.errors import AnomriError
from anomri.model.detector import Detector
from anomri.runs.shards import Shard
from anomri.runs.tables import CaseResult, write_dicom_seg
from anomri.runtime.folders import sole_use
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from conftest import read_tsv, write
from phantom import scan, thresholding


@pytest.fixture
def flat(cohort: Path, tmp_path: Path) -> Path:
    """One lesioned case in a flat folder, with a mask of its brain."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for channel in ("flair", "t1"):
        shutil.copy(cohort / "case7" / f"case7_{channel}.nii.gz", folder / f"p_{channel}.nii.gz")
    return folder


@pytest.mark.parametrize(
    "name", ["p_mask.nii.gz", "p_lesions.nii.gz", "p_reconstruction.nii.gz", "p_mask.dcm", "p.json"]
)
def test_a_file_that_is_no_result_is_not_replaced(flat: Path, model: Path, name: str) -> None:
    (flat / name).write_text('{"EchoTime": 0.1}')
    with pytest.raises(
        AnomriError,
        match=f"{name}: was not written by anomri and would be overwritten",
    ):
        anomri.detect_cohort([Case("p", dict(find_cases(flat)[0].channels))], flat, model)
    assert (flat / name).read_text() == '{"EchoTime": 0.1}' and not (
        flat / "p_anomaly.nii.gz"
    ).exists()


@pytest.mark.parametrize("name", ["cases.tsv", "report.html"])
def test_a_table_that_no_run_wrote_is_not_replaced(
    flat: Path, model: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(AnomriError, match=f"{name}: was not written by anomri"):
        anomri.detect_cohort(flat, tmp_path / "out", model)
    assert (tmp_path / "out" / name).read_text() == "mine"
    (tmp_path / "out" / name).unlink()
    for _ in range(2):  # what a run wrote is known without its records
        anomri.detect_cohort(flat, tmp_path / "out", model)
        shutil.rmtree(tmp_path / "out" / "logs")


def test_a_converter_s_json_beside_a_map_is_not_replaced(flat: Path, model: Path) -> None:
    (flat / "p_anomaly.nii.gz").touch()
    (flat / "p.json").write_text('{"EchoTime": 0.1}')
    with pytest.raises(AnomriError, match="p.json: was not written by anomri"):
        anomri.detect_cohort(flat, flat, model)


def test_results_beside_their_scans_are_made_again(flat: Path, model: Path) -> None:
    for threshold in (None, "high"):
        (result,) = anomri.detect_cohort(flat, flat, model, sensitivity=threshold)
        assert result.error is None and (flat / "p_mask.nii.gz").is_file()
    (flat / "p_anomaly.nii.gz").unlink()
    anomri.detect_cohort(flat, flat, model, sensitivity="high")
    assert (flat / "p_anomaly.nii.gz").is_file()


def test_nothing_of_another_run_stays_beside_results(
    flat: Path, model: Path, tmp_path: Path
) -> None:
    out, detector = tmp_path / "out", Detector.load(model)
    anomri.detect_cohort(flat, out, detector, reconstruction=True)
    (out / "p_mask.dcm").touch()
    maps = {f"p_{kind}.nii.gz" for kind in ("anomaly", "mask", "lesions", "reconstruction")}
    assert {path.name for path in out.glob("p[_.]*")} == {*maps, "p.json", "p_mask.dcm"}
    anomri.detect_cohort(flat, out, detector, sensitivity="high")
    assert {path.name for path in out.glob("p[_.]*")} == {
        "p_anomaly.nii.gz",
        "p_mask.nii.gz",
        "p_lesions.nii.gz",
        "p.json",
    }
    anomri.detect_cohort(flat, out, detector.with_score(kind="absolute"))
    assert {path.name for path in out.glob("p[_.]*")} == {"p_anomaly.nii.gz", "p.json"}
    (flat / "p_t1.nii.gz").write_bytes(b"no image")
    (result,) = anomri.detect_cohort(flat, out, detector)
    assert result.error and not list(out.glob("p[_.]*"))


def test_without_a_threshold_nothing_was_looked_for(
    flat: Path, model: Path, tmp_path: Path
) -> None:
    anomri.detect_cohort(flat, tmp_path / "out", Detector.load(model).with_score(kind="absolute"))
    columns, (row,) = read_tsv(tmp_path / "out" / "cases.tsv")
    facts = dict(zip(columns, row, strict=True))
    assert (facts["status"], facts["lesions"], facts["lesion_volume_mm3"], facts["threshold"]) == (
        "done",
        "",
        "",
        "",
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        "no threshold, so no mask" in page
        and "nothing found" not in page
        and "median volume" not in page
    )


def test_shards_and_whole_runs_keep_each_other_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anomri.runtime.folders.MOMENT_S", 0.1)
    first, second = Shard(1, 2), Shard(2, 2)
    with first.sole_use(tmp_path):
        (half := tmp_path / ".partial-0-x").touch()
        with second.sole_use(tmp_path):
            pass
        with (
            pytest.raises(AnomriError, match="another run is writing to this folder"),
            sole_use(tmp_path),
        ):
            pass
        assert half.exists()
    with sole_use(tmp_path):
        assert not half.exists()
        with (
            pytest.raises(AnomriError, match="another run is writing to this folder"),
            first.sole_use(tmp_path),
        ):
            pass


def test_a_threshold_of_numpy_is_written_as_a_number(
    flat: Path, model: Path, tmp_path: Path
) -> None:
    detection = Detector.load(model).detect(flat, threshold=np.float32(0.25))
    detection.save(tmp_path)
    assert json.loads((tmp_path / "p.json").read_text())["threshold"] == 0.25


def test_a_segmentation_that_cannot_be_written_is_the_error_of_its_case(tmp_path: Path) -> None:
    mask = write(tmp_path / "a_mask.nii.gz", np.zeros((4, 4, 4), np.uint8))
    summary = {"channels": ["flair"], "method": "dae", "threshold": 1.0}
    done = CaseResult("a", 1.0, summary, files=(mask,))
    (tmp_path / "a_mask.nii.gz").write_bytes(b"no image")
    failed = write_dicom_seg(tmp_path, done, {})
    assert failed.error and "a_mask.nii.gz" in failed.error and failed.files == (mask,)
    without = replace(done, files=())
    assert write_dicom_seg(tmp_path, without, {}) is without


def test_channels_given_twice_and_options_of_another_level(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "detect",
        "-m",
        str(model),
        "-o",
        str(tmp_path / "out"),
        "--flair",
        "x.nii",
        "--channel",
        "flair=y.nii",
    ]
    assert main(arguments) == 2
    assert "flair is given twice" in capsys.readouterr().err
    assert (
        main(["bids", str(tmp_path), str(tmp_path), "group", "-m", "x", "--participant-label", "1"])
        == 2
    )
    assert (
        "note: --model, --participant-label: not used at the level group" in capsys.readouterr().err
    )
    assert main(["bids", str(tmp_path / "none"), str(tmp_path), "group"]) == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_scans_called_by_their_channel_are_named_by_their_folder(tmp_path: Path) -> None:
    thresholding("flair").save(tmp_path / "m")
    for name in ("s1", "s2"):
        write(tmp_path / name / "FLAIR.nii.gz", scan((32, 36, 28), np.diag([6.0, 6, 6, 1])))
        assert (
            main(
                [
                    "detect",
                    "-m",
                    str(tmp_path / "m"),
                    "-i",
                    str(tmp_path / name / "FLAIR.nii.gz"),
                    "-o",
                    str(tmp_path / "o"),
                ]
            )
            == 0
        )
    assert {path.name for path in (tmp_path / "o").glob("*_anomaly.nii.gz")} == {
        "s1_anomaly.nii.gz",
        "s2_anomaly.nii.gz",
    }
