"""Finished work is recognised by the content of its scan, the version, the model and the
settings."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import anomri
from anomri.errors import AnomriError
from anomri.runs.identity import ScanIdentity, are_same, identify, store_scans
from anomri.runs.ledger import Ledger, Task
from anomri.scans.case import Case
from anomri.scans.find import find_cases


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """A case of two files; nothing but their bytes matters here."""
    files = {}
    for channel in ("flair", "t1"):
        files[channel] = tmp_path / "scans" / f"a_{channel}.nii"
        files[channel].parent.mkdir(exist_ok=True)
        files[channel].write_bytes(channel.encode() * 1000)
    return Case("a", files)


def ledger(folder: Path, case: Case, **settings: object) -> Ledger:
    return Ledger(
        folder, folder / "logs", Task("model", settings), identify([case], ["flair", "t1"])
    )


def test_a_different_scan_with_equal_size_and_time_is_noticed(case: Case, tmp_path: Path) -> None:
    book = ledger(tmp_path, case).begin()
    book.save("a", {"error": None})
    assert book.finished("a")
    path = case.channels["t1"]
    stat = path.stat()
    other = tmp_path / "other"
    other.write_bytes(b"2" + path.read_bytes()[1:])
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and path.stat().st_size == stat.st_size
    assert ledger(tmp_path, case).finished("a") is None
    path.write_bytes(b"t1" * 1000)
    assert ledger(tmp_path, case).finished("a")


def test_a_changed_byte_anywhere_is_noticed(case: Case) -> None:
    path = case.channels["t1"]
    path.write_bytes(bytes(3 * 2**20))
    stored = store_scans(identify([case], ["t1"]))
    assert are_same(stored, identify([case], ["t1"]))
    with path.open("r+b") as file:
        file.seek(2**20 + 12345)
        file.write(b"1")
    assert not are_same(stored, identify([case], ["t1"]))
    assert not are_same(None, {}) and not are_same({"a": 1}, identify([case], ["t1"]))


def test_a_touched_copied_or_moved_scan_is_the_same(case: Case, tmp_path: Path) -> None:
    ledger(tmp_path, case).begin().save("a", {"error": None})
    entry = tmp_path / "logs" / "a.json"
    for path in case.channels.values():
        os.utime(path)
    assert ledger(tmp_path, case).finished("a")
    noted = entry.read_bytes()
    assert ledger(tmp_path, case).finished("a") and entry.read_bytes() == noted
    shutil.copytree(tmp_path / "scans", tmp_path / "copy")
    copied = {name: tmp_path / "copy" / path.name for name, path in case.channels.items()}
    assert ledger(tmp_path, Case("a", copied)).finished("a")
    assert entry.read_bytes() != noted
    renamed = copied["t1"].rename(tmp_path / "copy" / "b_t1.nii")
    assert ledger(tmp_path, Case("a", copied | {"t1": renamed})).finished("a") is None


def test_a_change_of_patient_or_files_is_noticed(case: Case) -> None:
    now = ScanIdentity.from_case(case, ["flair", "t1"])
    stored = ScanIdentity.from_json(now.with_content().to_json())
    assert stored.is_same(now)
    for other in (
        replace(case, subject="someone"),
        replace(case, mask=case.channels["t1"]),
        replace(case, channels={"flair": case.channels["flair"]}),
        replace(case, channels=case.channels | {"t1": case.channels["t1"].parent / "none.nii"}),
    ):
        assert not stored.is_same(ScanIdentity.from_case(other, ["flair", "t1"]))


def test_changed_settings_version_or_model_are_noticed_and_named(
    case: Case, tmp_path: Path
) -> None:
    first = ledger(tmp_path, case, sensitivity=None, channels=("flair", "t1"), register=False)
    first.begin().save("a", {"error": None})
    same = ledger(tmp_path, case, sensitivity=None, channels=["flair", "t1"], register=False)
    assert same.finished("a") and same.changes([case]) == ([], 0)
    other = ledger(tmp_path, case, sensitivity="high", channels=("t1",), register=True)
    assert other.finished("a") is None
    words = ["sensitivity: default -> high", "channels: flair,t1 -> t1", "register: off -> on"]
    assert other.changes([case]) == (words, 1)
    newer = replace(first, task=replace(first.task, version="99", model="m2"))
    assert newer.finished("a") is None
    assert newer.changes([case])[0][0].endswith(" -> 99")
    assert newer.changes([case])[0][1] == "another model"


def test_a_failed_case_and_one_without_its_files_are_done_again(case: Case, tmp_path: Path) -> None:
    book = ledger(tmp_path, case).begin()
    book.save("a", {"error": "a: is damaged"})
    assert book.finished("a") is None and book.entries()[0]["error"] == "a: is damaged"
    book.save("a", {"error": None, "files": ["a_anomaly.nii.gz"]})
    assert book.finished("a") is None
    (tmp_path / "a_anomaly.nii.gz").touch()
    assert book.finished("a")


def test_a_resumed_run_keeps_its_start_time(case: Case, tmp_path: Path) -> None:
    first = replace(ledger(tmp_path, case), facts={"started": 1.0, "cases": 1})
    second = replace(first, facts={"started": 2.0, "cases": 1})
    assert first.begin().facts["started"] == 1.0 and second.begin().facts["started"] == 1.0
    other = replace(second, task=Task("another", {}))
    assert other.begin().facts["started"] == 2.0


def test_results_with_other_settings_are_replaced_only_with_consent(
    cohort: Path, model: Path, tmp_path: Path
) -> None:
    cases = [case for case in find_cases(cohort) if case.split == "test"]
    notes: list[str] = []

    def detect(**settings: Any) -> None:
        anomri.detect_cohort(cases, tmp_path, model, notify=notes.append, **settings)

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.glob("case*")}

    detect()
    detect()
    before = files()
    other = {"sensitivity": "high", "reconstruction": True}
    with pytest.raises(
        AnomriError,
        match=r"settings differ from those of the earlier run \(sensitivity: default -> high; "
        r"reconstruction: off -> on\), and the results of 2 finished cases would be overwritten; "
        r"add --overwrite",
    ):
        detect(**other)
    assert files() == before and notes == []
    detect(**other, overwrite=True)
    assert files() != before
    assert notes == [
        "settings differ from those of an earlier run (sensitivity: default -> high; "
        "reconstruction: off -> on); 2 cases are done again."
    ]
    # A case that is missing is no other setting: the run is resumed without consent.
    (tmp_path / f"{cases[0].name}_anomaly.nii.gz").unlink()
    detect(**other)
    assert (tmp_path / f"{cases[0].name}_anomaly.nii.gz").is_file()


def test_a_run_without_reconstructions_keeps_those_that_are_there(
    cohort: Path, model: Path, tmp_path: Path
) -> None:
    case = next(case for case in find_cases(cohort) if case.split == "test")
    anomri.detect_cohort([case], tmp_path, model, reconstruction=True)
    image = tmp_path / f"{case.name}_reconstruction.nii.gz"
    written = image.stat().st_mtime_ns
    anomri.detect_cohort([case], tmp_path, model)
    assert image.stat().st_mtime_ns == written
    assert (tmp_path / "cases.tsv").is_file()


def test_an_evaluation_is_replaced_only_with_consent(
    cohort: Path, model: Path, tmp_path: Path
) -> None:
    anomri.evaluate(cohort, tmp_path, model=model)
    before = (tmp_path / "metrics.json").read_bytes()
    for settings, words in (
        ({"grid": "input"}, "grid: model -> input"),
        ({"split": "val"}, "other cases"),
    ):
        with pytest.raises(AnomriError, match=f"{words}.*the finished evaluation would be over"):
            anomri.evaluate(cohort, tmp_path, model=model, **settings)
        assert (tmp_path / "metrics.json").read_bytes() == before
    anomri.evaluate(cohort, tmp_path, model=model, grid="input", overwrite=True)
    assert (tmp_path / "metrics.json").read_bytes() != before
