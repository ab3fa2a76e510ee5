"""A new threshold makes masks and tables of the maps that an earlier run stored, without the
network."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anomri
from anomri.errors import AnomriError
from anomri.model.detection import Detection
from anomri.model.detector import Detector
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.nifti import read_image, write_image

PICTURES = ("planes", "findings", "slices", "row")


@pytest.fixture
def cases(cohort: Path) -> list[Case]:
    """The two test cases of the small cohort, both with a lesion."""
    return [case for case in find_cases(cohort) if case.split == "test"]


@pytest.fixture
def run(cases: list[Case], model: Path, shared: Path, tmp_path: Path) -> Path:
    """A finished run over the cases with the model's own threshold."""
    anomri.detect_cohort(cases, tmp_path / "run", model, reconstruction=True)
    return tmp_path / "run"


def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, the network is an error."""

    def refuse(self: Detector, stack: object) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr(Detector, "output", refuse)


def results(folder: Path) -> dict[str, bytes]:
    """What a user takes from a run: images, summaries and the table of lesions."""
    found = {path.name: path.read_bytes() for path in folder.glob("case[0-9]*")}
    return found | {"lesions.tsv": (folder / "lesions.tsv").read_bytes()}


def rows(folder: Path) -> list[dict[str, str]]:
    """The table of cases without the times."""
    with (folder / "cases.tsv").open(newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file, delimiter="\t")]


@pytest.mark.parametrize(
    "settings",
    [
        {"sensitivity": "high"},
        {"sensitivity": "lowest"},
        {"min_volume": 2000.0},
        {"false_positive_ml": 0.5},
        {"sensitivity": "highest", "min_volume": 0.0},
    ],
)
def test_a_new_threshold_gives_what_a_fresh_run_gives(
    run: Path,
    cases: list[Case],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    before = results(run)
    fresh = tmp_path / "fresh"
    anomri.detect_cohort(cases, fresh, model, reconstruction=True, **settings)
    without_network(monkeypatch)
    again = anomri.detect_cohort(cases, run, model, overwrite=True, **settings)
    assert [one.error for one in again] == [None, None]
    assert results(run) == results(fresh) != before
    assert rows(run) == rows(fresh)
    for case in cases:
        for kind in PICTURES:
            old, new = (place / "previews" / f"{case.name}.{kind}.jpg" for place in (fresh, run))
            assert old.exists() == new.exists()
        facts = [
            json.loads((place / "previews" / f"{case.name}.preview.json").read_text())
            for place in (fresh, run)
        ]
        assert facts[0] == facts[1]


def test_the_run_says_that_the_network_is_not_needed(
    run: Path, cases: list[Case], model: Path
) -> None:
    words = r"The stored maps of 2 serve again: the network is not needed for them\."
    with pytest.raises(AnomriError, match=rf"sensitivity: default -> high\).*--overwrite.*{words}"):
        anomri.detect_cohort(cases, run, model, sensitivity="high")
    notes: list[str] = []
    anomri.detect_cohort(cases, run, model, sensitivity="high", overwrite=True, notify=notes.append)
    assert notes == [
        "settings differ from those of an earlier run (sensitivity: default -> high); 2 cases are "
        "done again. The stored maps of 2 serve again: the network is not needed for them."
    ]


def test_reconstructions_stay_with_their_maps(
    run: Path, cases: list[Case], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_network(monkeypatch)
    anomri.detect_cohort(cases, run, model, sensitivity="high", overwrite=True)
    image = run / f"{cases[0].name}_reconstruction.nii.gz"
    assert image.is_file()
    # They also serve a run that asks for them.
    anomri.detect_cohort(cases, run, model, sensitivity="high", reconstruction=True)
    anomri.detect_cohort(cases, run, model, sensitivity="low", reconstruction=True, overwrite=True)
    assert image.is_file()


def change_map(run: Path, case: Case, scans: Path) -> None:
    """Another value in the stored map."""
    path = run / f"{case.name}_anomaly.nii.gz"
    image = read_image(path)
    values = np.asarray(image.dataobj).copy()
    values.flat[0] += 1
    write_image(path, type(image)(values, image.affine, image.header))


def cut_map(run: Path, case: Case, scans: Path) -> None:
    """The stored map ends early."""
    path = run / f"{case.name}_anomaly.nii.gz"
    path.write_bytes(path.read_bytes()[:-100])


def remove_map(run: Path, case: Case, scans: Path) -> None:
    """The stored map is gone."""
    (run / f"{case.name}_anomaly.nii.gz").unlink()


def change_scan(run: Path, case: Case, scans: Path) -> None:
    """The scan is another one than the map's."""
    path = next(iter(case.channels.values()))
    image = read_image(path)
    values = np.asarray(image.dataobj) * 2
    write_image(path, type(image)(values, image.affine, image.header))


@pytest.mark.parametrize("change", [change_map, cut_map, remove_map, change_scan])
def test_a_map_that_is_not_the_stored_one_goes_through_the_network(
    cohort: Path, model: Path, tmp_path: Path, change: Any
) -> None:
    scans, run = tmp_path / "scans", tmp_path / "run"
    shutil.copytree(cohort / "case7", scans / "case7")
    (case,) = find_cases(scans)
    anomri.detect_cohort([case], run, model)
    change(run, case, scans)
    anomri.detect_cohort([case], run, model, sensitivity="high", overwrite=True)
    anomri.detect_cohort([case], tmp_path / "fresh", model, sensitivity="high")
    assert results(run) == results(tmp_path / "fresh")


@pytest.mark.parametrize("settings", [{"channels": ["flair"]}, {"reconstruction": True}])
def test_other_settings_need_the_network(
    cases: list[Case],
    model_with_head: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    anomri.detect_cohort(cases[:1], tmp_path, model_with_head)
    without_network(monkeypatch)
    (result,) = anomri.detect_cohort(
        cases[:1], tmp_path, model_with_head, overwrite=True, sensitivity="high", **settings
    )
    assert result.error is not None and "the network was used" in result.error


def test_a_run_that_is_stopped_while_it_replaces_files_leaves_no_entry_that_names_them(
    run: Path, cases: list[Case], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Detection.save

    def stopped(self: Detection, folder: Path, **options: Any) -> Any:
        save(self, folder, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Detection, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        anomri.detect_cohort(cases, run, model, sensitivity="highest", overwrite=True)
    monkeypatch.setattr(Detection, "save", save)
    # The earlier settings again: the mask of the stopped run is not taken for theirs.
    anomri.detect_cohort(cases, run, model, reconstruction=True)
    anomri.detect_cohort(cases, tmp_path / "fresh", model, reconstruction=True)
    assert results(run) == results(tmp_path / "fresh")


def test_a_detection_in_a_stored_map_has_no_reconstruction(cases: list[Case], model: Path) -> None:
    detector = Detector.load(model)
    volume = detector.read(cases[0])
    made = detector.detect(volume)
    found = detector.detect_in_map(volume, made.anomaly_map)
    assert found.lesions == made.lesions and np.array_equal(found.mask, made.mask)
    with pytest.raises(AnomriError, match="holds no reconstruction; detect in the scan again"):
        _ = found.reconstruction
