"""Results in a folder: they replace nothing that is not theirs, and none of two models or runs
lie side by side."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import anomri
from anomri.cli import main
from anomri.errors import AnomriError
from anomri.model.detector import Detector
from anomri.reporting.viewer import find_scans
from anomri.runs.bids import run_group, run_participant
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
def test_a_file_not_written_by_anomri_is_not_replaced(flat: Path, model: Path, name: str) -> None:
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


def test_results_beside_their_scans_can_be_written_again(flat: Path, model: Path) -> None:
    for threshold in (None, "high"):
        (result,) = anomri.detect_cohort(flat, flat, model, sensitivity=threshold, overwrite=True)
        assert result.error is None and (flat / "p_mask.nii.gz").is_file()
    (flat / "p_anomaly.nii.gz").unlink()
    anomri.detect_cohort(flat, flat, model, sensitivity="high")
    assert (flat / "p_anomaly.nii.gz").is_file()


def test_outputs_of_an_earlier_run_are_removed(flat: Path, model: Path, tmp_path: Path) -> None:
    out, detector = tmp_path / "out", Detector.load(model)
    anomri.detect_cohort(flat, out, detector, reconstruction=True)
    (out / "p_mask.dcm").touch()
    maps = {f"p_{kind}.nii.gz" for kind in ("anomaly", "mask", "lesions", "reconstruction")}
    assert {path.name for path in out.glob("p[_.]*")} == {*maps, "p.json", "p_mask.dcm"}
    anomri.detect_cohort(flat, out, detector, sensitivity="high", overwrite=True)
    assert {path.name for path in out.glob("p[_.]*")} == {
        "p_anomaly.nii.gz",
        "p_mask.nii.gz",
        "p_lesions.nii.gz",
        "p_reconstruction.nii.gz",  # it belongs to the map, which is the same
        "p.json",
    }
    anomri.detect_cohort(flat, out, detector.with_score(kind="absolute"), overwrite=True)
    assert {path.name for path in out.glob("p[_.]*")} == {"p_anomaly.nii.gz", "p.json"}
    (flat / "p_t1.nii.gz").write_bytes(b"no image")
    (result,) = anomri.detect_cohort(flat, out, detector, overwrite=True)
    assert result.error and not list(out.glob("p[_.]*"))


def test_without_a_threshold_the_table_claims_no_lesion_count(
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


def test_shards_and_whole_runs_do_not_share_a_folder(
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


def test_a_dicom_seg_that_cannot_be_written_is_no_failed_case(tmp_path: Path) -> None:
    mask = write(tmp_path / "a_mask.nii.gz", np.zeros((4, 4, 4), np.uint8))
    summary = {"channels": ["flair"], "method": "dae", "threshold": 1.0}
    done = CaseResult("a", 1.0, summary, files=(mask,))
    (tmp_path / "a_mask.nii.gz").write_bytes(b"no image")
    failed = write_dicom_seg(tmp_path, done, {})
    assert failed.error is None and failed.files == (mask,)
    assert failed.export_error and "a_mask.nii.gz" in failed.export_error
    facts = failed.to_json()
    assert facts["status"] == "done" and facts["export_error"] == failed.export_error
    without = replace(done, files=())
    assert write_dicom_seg(tmp_path, without, {}) is without


def test_a_channel_given_twice_is_refused_and_options_of_another_level_are_noted(
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


def test_scans_named_after_their_channel_get_the_name_of_their_folder(tmp_path: Path) -> None:
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


# Names of files are bytes, and may be anything.


@pytest.fixture
def odd_folder(tmp_path: Path) -> Path:
    """A folder whose name is not UTF-8."""
    folder = tmp_path / os.fsdecode(b"caf\xe9 <b>&\"'\x1b[31m")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    return folder


@pytest.mark.usefixtures("cache")
def test_a_folder_name_that_is_not_utf8_and_a_failed_case_leave_the_tables_whole(
    odd_folder: Path, cohort: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans, out = odd_folder / "scans", odd_folder / "out"
    shutil.copytree(cohort, scans)
    (scans / "case7" / "case7_flair.nii.gz").write_bytes(b"junk")
    arguments = ["-i", str(scans), "-m", str(model), "-o"]
    for _ in range(2):  # and once more, over what is there
        assert main(["detect", *arguments, str(out / "maps")]) == 1
    assert r"caf\udce9" in capsys.readouterr().err
    _, rows = read_tsv(out / "maps" / "cases.tsv")
    status = {row[0]: row[1] for row in rows}
    assert status.pop("case7") == "failed" and set(status.values()) == {"done"}
    page = (out / "maps" / "report.html").read_text(encoding="utf-8")
    assert r"caf\udce9 &lt;b&gt;" in page and "<b>&\"'" not in page
    # Where its scans lie is still known.
    assert find_scans(out / "maps")["case8"].channels["flair"].is_file()
    assert main(["evaluate", *arguments, str(out / "figures")]) == 1
    assert (out / "figures" / "patients.tsv").is_file()
    assert "case7" in json.loads((out / "figures" / "metrics.json").read_text())["failed"]
    by_maps = ["evaluate", "-i", str(scans), "--maps", str(out / "maps"), "-o", str(out / "b")]
    assert main(by_maps) == 1
    copied = odd_folder / "model"
    shutil.copytree(model, copied)
    assert main(["info", str(copied)]) == 0


def test_a_training_runs_in_a_folder_that_is_not_utf8(odd_folder: Path, cohort: Path) -> None:
    trained = anomri.train(
        cohort,
        odd_folder / "model",
        preset="tiny",
        training={"steps": 2},
        cache=odd_folder / "cache",
    )
    assert Detector.load(odd_folder / "model").spec == trained.spec


def test_a_bids_data_set_is_read_in_a_folder_that_is_not_utf8(odd_folder: Path) -> None:
    pytest.importorskip("ancpbids", reason="needs anomri[bids]")
    anat = odd_folder / "in" / "sub-1" / "anat"
    data = scan((64, 72, 56), np.diag([3, 3, 3, 1])).astype(np.float32)
    write(anat / "sub-1_FLAIR.nii.gz", data, np.diag([3.0, 3, 3, 1]))
    write(odd_folder / "in" / "sub-2" / "anat" / "sub-2_FLAIR.nii.gz", data * 0)
    (odd_folder / "in" / "dataset_description.json").write_text(
        '{"Name": "x", "BIDSVersion": "1.10.0"}'
    )
    out = odd_folder.parent / "out"
    results = run_participant(odd_folder / "in", out, thresholding(), skip_bids_validation=True)
    assert [result.error is None for result in results] == [True, False]
    assert run_group(out).is_file()
    said = json.loads((out / "dataset_description.json").read_text())
    assert said["DatasetLinks"]["source"].startswith("../caf%E9%20%3Cb%3E")


@pytest.mark.slow
def test_the_command_line_prints_names_that_its_stream_cannot_encode(
    odd_folder: Path, tmp_path: Path
) -> None:
    data = scan((64, 72, 56), np.diag([3, 3, 3, 1])).astype(np.float32)
    write(odd_folder / "a_flair.nii.gz", data, np.diag([3.0, 3, 3, 1]))
    (odd_folder / "b_flair.nii.gz").write_bytes(b"junk")
    thresholding().save(tmp_path / "m")
    command = [sys.executable, "-m", "anomri", "detect", "-i", odd_folder, "-m", tmp_path / "m"]
    ran = subprocess.run(
        [*command, "-o", odd_folder / "out"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert ran.returncode == 1, ran.stderr
    assert rb"caf\udce9" in ran.stdout and b"Traceback" not in ran.stderr
    assert len((odd_folder / "out" / "cases.tsv").read_text().splitlines()) == 3


def test_a_label_called_as_a_result_is_named_in_a_note(tmp_path: Path) -> None:
    affine = np.diag([3.0, 3, 3, 1])
    data = scan((64, 72, 56), affine).astype(np.float32)
    write(tmp_path / "p_flair.nii.gz", data, affine)
    (case,) = find_cases(tmp_path)
    thresholding().detect(case).save(tmp_path)
    (again,) = find_cases(tmp_path)
    assert (again.label, again.mask, again.notes) == (None, None, ())  # these are our own
    (tmp_path / "p.json").unlink()
    (case,) = find_cases(tmp_path)
    assert len(case.notes) == 2
    label = next(note for note in case.notes if "p_lesions.nii.gz is not read" in note)
    assert "call it p_seg" in label


def test_a_label_beside_an_anomaly_map_is_not_replaced(tmp_path: Path) -> None:
    affine = np.diag([3.0, 3, 3, 1])
    data = scan((64, 72, 56), affine).astype(np.float32)
    write(tmp_path / "in" / "p_flair.nii.gz", data, affine)
    out = tmp_path / "out"

    def detect() -> None:
        anomri.detect_cohort(tmp_path / "in", out, thresholding())

    detect()
    (out / "p.json").unlink()
    shutil.rmtree(out / "logs")
    detect()  # as after a run that was killed: its lesions are the components of its mask
    (out / "p.json").unlink()
    shutil.rmtree(out / "logs")
    drawn = write(out / "p_lesions.nii.gz", (data > 500).astype(np.uint8), affine).read_bytes()
    with pytest.raises(AnomriError, match="p_lesions.nii.gz: was not written by anomri"):
        detect()
    assert (out / "p_lesions.nii.gz").read_bytes() == drawn
