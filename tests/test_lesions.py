"""The schema of a lesion: one field is all that tables, sidecars, the report and the viewer
need."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from anomri.evaluation.report import report
from anomri.model import lesions
from anomri.model.detector import Detector
from anomri.model.lesions import (
    Lesion,
    column,
    find_lesions,
    lesion_labels,
    page_row,
    read_lesion,
    show_number,
    table_row,
)
from anomri.reporting.viewer import serve
from anomri.runs.bids import run_participant
from anomri.runs.detect import detect_cohort
from anomri.scans.case import Case
from anomri.scans.geometry import Geometry
from anomri.scans.own_results import without_own_results
from conftest import read_tsv
from test_bids import add, describe
from test_viewer import ask

LESION = Lesion(2, 1234.5, (-1.5, 2.25, 30.0), 5.123456, 4.0, 0.75, 16.58, 0.25)


@dataclass(frozen=True)
class WiderLesion(Lesion):
    """A lesion with one more field."""

    roundness: float = column(
        "How like a sphere.", "round", show_number(1), default=0.625, unit="1", format=".3g"
    )


def test_a_new_field_is_a_column_of_all_tables_and_pages(
    model: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lesions, "Lesion", WiderLesion)
    out, detector = tmp_path / "out", Detector.load(model, "cpu")
    shutil.copytree(cohort / "case7", tmp_path / "case7")
    detect_cohort(tmp_path / "case7", out, detector)
    columns, rows = read_tsv(out / "lesions.tsv")
    assert columns[-1] == "roundness" and rows[0][-1] == "0.625"
    assert json.loads((out / "case7.json").read_text())["lesions"][0]["roundness"] == 0.625
    for page in (out / "report.html", report(out)):
        text = page.read_text()
        assert 'title="How like a sphere."' in text and ">round<" in text and ">0.6<" in text
    with serve(out, open_browser=False) as server:
        listing = json.loads(ask(server, "/cases.json")[2])
    assert listing["columns"][-1] == {"heading": "round", "description": "How like a sphere."}
    assert listing["cases"][0]["lesions"][0]["cells"][-1] == "0.6"

    dataset = describe(tmp_path / "in")
    add(dataset, "sub-01", 1)
    run_participant(dataset, tmp_path / "bids", detector, skip_bids_validation=True)
    stem = tmp_path / "bids" / "sub-01" / "anat" / "sub-01_desc-anomaly_dseg"
    columns, rows = read_tsv(stem.with_suffix(".tsv"))
    assert columns[-1] == "roundness" and rows[0][-1] == "0.625"
    described = json.loads(stem.with_suffix(".json").read_text())
    assert described["roundness"] == {"Description": "How like a sphere.", "Units": "1"}


def test_numbers_of_lesions_fit_their_data_type() -> None:
    assert lesion_labels(np.zeros((3, 3, 3), bool)).dtype == np.uint8
    grid = np.zeros((40, 40, 1), bool)
    grid[::2, ::2] = True  # 400 voxels that do not touch
    labels = lesion_labels(grid)
    assert labels.dtype == np.uint16 and sorted(labels[grid]) == list(range(1, 401))
    assert not labels[~grid].any()


def test_outputs_beside_a_scan_are_not_its_mask_or_label(tmp_path: Path) -> None:
    mask, label = tmp_path / "p_mask.nii.gz", tmp_path / "p_lesions.nii.gz"
    case = Case("p", {}, label=label, mask=mask)
    assert without_own_results(case) == case  # a user's own
    (tmp_path / "p.json").write_text('{"anomri": "0.1.0"}')
    assert without_own_results(case) == Case("p", {})


def test_a_lesion_becomes_a_row_of_the_table_and_of_the_page() -> None:
    assert table_row(LESION) == ["2", "1234.5", "-1.5", "2.25", "30.0", "5.1235", "4", "0.75", "16.58", "0.25"]  # fmt: skip
    shown = ["2", "1.23", "\N{MINUS SIGN}2, 2, 30", "5.12", "4.00", "3 of 3", "16.6", "25%"]
    assert page_row(LESION, 3) == shown
    without = Lesion(1, 8.0, (0.0, 0.0, 0.0), 1.0, 1.0)
    assert table_row(without, missing="n/a")[-3:] == ["n/a"] * 3
    assert page_row(without, 3)[-3:] == ["-"] * 3


@pytest.mark.parametrize(("slice_mm", "share_of_long"), [(1.0, 5 / 40), (8.0, 8 / 40)])
def test_a_finding_in_a_rim_is_at_the_edge_and_a_lesion_that_reaches_it_is_not(
    slice_mm: float, share_of_long: float
) -> None:
    # With slices of 8 mm the last one is at the edge too, though the next lies more than 5 mm away.
    axes = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    geometry = Geometry((90, 90, 40), np.diag([1, 1, slice_mm, 1]), axes, nib.Nifti1Header())
    brain, found = (np.zeros((90, 90, 40), bool) for _ in range(2))
    brain[5:85, 5:85, 5:35] = True
    found[5:45, 40:50, 20] = True  # a lesion from the edge to deep inside
    found[60:75, 5:9, 20] = True  # what is left of the scalp
    found[30:40, 60:70, 34] = True  # in the last slice
    found[30:40, 20:25, 20] = True  # deep inside
    scores = found.astype(np.float32)
    listed = find_lesions(found, scores, geometry, brain)
    share = {one.volume_mm3 / slice_mm: one.edge_share for one in listed}
    assert share == {400: share_of_long, 100: 1, 60: 1, 50: 0}
    assert [one.at_edge for one in listed] == [False, True, True, False]


def test_a_confidence_is_a_count_if_it_is_a_whole_number_of_scans() -> None:
    shown = [lesions.show_healthy_below(share, scans) for share, scans in ((0.5, 3), (0.6, 3))]
    assert shown == ["2 of 3", "0.60"]


def test_a_lesion_is_read_from_json_and_bad_fields_are_dropped() -> None:
    facts = json.loads(json.dumps(asdict(LESION)))
    assert read_lesion(facts) == LESION
    for broken in (None, "x", float("nan"), 10**400, [1.0]):
        read = read_lesion({**facts, "peak": broken, "confidence": broken, "centroid_mm": broken})
        assert math.isnan(read.peak) and read.confidence is None
        assert all(map(math.isnan, read.centroid_mm)) and len(read.centroid_mm) == 3
    assert page_row(read_lesion({}), 3) == ["-"] * 8
