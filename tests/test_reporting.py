import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import anomri
from anomri.errors import AnomriError
from anomri.evaluation.report import report
from anomri.model.detection import Detection
from anomri.reporting.pages import CaseView, Page, Table, write_page
from anomri.reporting.pictures import (
    MASK_COLOUR,
    PALETTE,
    TRUTH_COLOUR,
    closeups,
    lightbox,
    overlay,
    planes,
)
from anomri.reporting.plots import curves_plot, histogram, patients_plot
from anomri.reporting.previews import Picture, Preview, read_preview, save_preview
from anomri.runs.detect import detect_cohort
from conftest import CHROMIUM, CHROMIUM_FLAGS

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def detection(cohort: Path, model: Path) -> Detection:
    """A lesioned case with its label; the model's threshold finds something in it."""
    found = anomri.load(model).with_threshold("highest").detect(cohort / "case7")
    assert found.lesions and found.volume.label is not None
    return found


@pytest.fixture(scope="module")
def run(cohort: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three detected cases, one of them damaged, in a folder."""
    scans, out = tmp_path_factory.mktemp("scans"), tmp_path_factory.mktemp("run")
    for name in ("case6", "case7", "case8"):
        shutil.copytree(cohort / name, scans / name)
    (scans / "case6" / "case6_t1.nii.gz").write_bytes(b"")
    detect_cohort(scans, out, model, sensitivity="highest")
    return out


def evil_page() -> Page:
    columns = (EVIL, "n", "mixed")
    table = Table(
        EVIL,
        columns,
        [(EVIL, 10, "b"), ("x", 9, ""), ("y", "", "a")],
        EVIL,
        {EVIL: "case-1"},
        columns,
    )
    preview = Preview(
        EVIL, (Picture(EVIL, "AAAA", (EVIL,)),), histogram([1], [2], (1.0, 1.0), 0.5), True, EVIL
    )
    plots = [
        curves_plot({EVIL: [(0.1, 0.2, 0.3, 0.4)]}, {EVIL: 0.1}),
        patients_plot({EVIL: [0.1, 0.2]}),
    ]
    view = CaseView("case-1", preview, EVIL, [EVIL], table)
    pair = (EVIL, EVIL)
    return Page(
        EVIL, EVIL, EVIL, [pair], [pair], [table], plots, [view], EVIL, [table], [pair], EVIL
    )


def test_pages_escape_what_comes_from_files_and_need_no_network(tmp_path: Path) -> None:
    text = write_page(tmp_path / "report.html", evil_page()).read_text()
    assert text.count("<script") == 1 and "alert(1)</script>" not in text
    assert "&lt;script&gt;" in text
    assert re.search(
        r"default-src 'none'; img-src data:;[^\"]*script-src 'sha256-[\w+/=]{44}'", text
    )
    assert not re.search(
        r"(src|href)\s*=\s*[\"']?(https?:)?//", re.sub(r"xlink:href=\"#", "", text)
    )


PROBE = """
document.body.dataset.broken = ''
addEventListener('securitypolicyviolation', (event) => (document.body.dataset.broken += event.violatedDirective))
"""
CLICKS = """
const seen = []
const [table] = document.querySelectorAll('table.sortable')
for (const column of [1, 1, 2, 0]) {
  table.tHead.rows[0].cells[column].querySelector('button').click()
  seen.push([...table.tBodies[0].rows].map((row) => row.cells[column].textContent))
}
document.body.dataset.seen = JSON.stringify(seen)
document.body.dataset.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth
"""


def browse(page: Path, profile: Path) -> dict[str, str]:
    options = ("--virtual-time-budget=5000", "--window-size=500,800", f"--user-data-dir={profile}")
    command = [str(CHROMIUM), *CHROMIUM_FLAGS, *options, page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=90).stdout
    body = re.search(r"<body[^>]*>", dom)
    assert body is not None, dom[:500]
    return {
        name: html.unescape(value) for name, value in re.findall(r'data-(\w+)="([^"]*)"', body[0])
    }


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_sorts_the_tables_and_runs_no_other_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import anomri.reporting.pages as module

    real = module.files("anomri") / "templates"
    (tmp_path / "templates").mkdir()
    for kind in ("js", "css"):
        content = (real / f"report.{kind}").read_text("utf-8")
        content = PROBE + content + CLICKS if kind == "js" else content
        (tmp_path / "templates" / f"report.{kind}").write_text(content)
    monkeypatch.setattr(module, "files", lambda package: tmp_path)
    path = write_page(tmp_path / "report.html", evil_page())
    text = path.read_text()
    # Behind the page's own script, which listens for what is refused.
    planted = "<script>document.title = 'owned'; document.body.dataset.owned = 1</script></body>"
    path.write_text(text.replace("</body>", planted))
    data = browse(path, tmp_path / "profile")
    assert "owned" not in data
    rising, falling, mixed, names = json.loads(data["seen"])
    assert rising == ["9", "10", ""] and falling == ["10", "9", ""]  # as numbers, empty cells last
    assert mixed == ["a", "b", ""]
    assert names == [EVIL, "x", "y"]
    assert data["wide"] == "0"  # nothing makes a narrow page scroll sideways
    assert data["broken"] == "script-src-elem"  # the one planted above


def test_columns_of_numbers_are_recognised() -> None:
    table = Table("t", ("name", "n", "mixed"), [("a", "1.5", "2"), ("b", "", "x")])
    assert table.numeric == {1}


def test_an_empty_folder_has_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(AnomriError, match="nothing to report"):
        report(tmp_path)


def test_the_report_of_a_run_is_made_again_from_its_files(run: Path) -> None:
    first = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert report(run).read_text() == first
    assert first.count('<section class="case"') == 2 and first.count("data:image/jpeg;base64,") == 8
    assert first.count('class="healthy" d=') == 2
    assert "2 of 3" in first and "Anomalies in 2 scans" in first
    # The damaged case is an error, and has no line in the table of scans.
    errors = first[first.index('<section class="errors">') : first.index("</section>")]
    assert "1 failed" in errors and "case6" in errors and "the file is empty" in errors
    assert "case6" not in first.replace(errors, "")
    # Each case says its own channels and threshold, and its lesions are in one table.
    assert first.count("<b>above healthy scans</b>") == 1
    record = json.loads((run / "logs" / "case7.json").read_text())["summary"]
    assert f"Threshold: {record['threshold']:.4g} (" in first
    assert first.count(">from edge (mm)<") == 2
    assert 'href="#case-1"' in first and 'id="case-2"' in first
    for name in ("case7", "case8"):
        sizes = [path.stat().st_size for path in (run / "previews").glob(f"{name}.*")]
        assert len(sizes) == 5 and sum(sizes) < 200_000
    # An older run's records and a lost picture are no reason to fail.
    (run / "previews" / "case7.row.jpg").unlink()
    record = json.loads((run / "logs" / "case8.json").read_text())
    for lesion in record["summary"]["lesions"]:
        del lesion["confidence"], lesion["edge_distance_mm"], lesion["edge_share"]
    (run / "logs" / "case8.json").write_text(json.dumps(record))
    assert report(run).read_text().count('<section class="case"') == 1


def test_the_report_says_which_findings_lie_at_the_edge(run: Path) -> None:
    record = run / "logs" / "case8.json"
    facts = json.loads(record.read_text())
    inner = facts["summary"]["lesions"][0] | {"edge_share": 0.5}
    rim = [inner | {"lesion": number, "edge_share": 0.9} for number in (2, 3)]
    sentence = "at the edge of the brain, where what is left of the skull is often taken for a"
    for lesions, said in (
        ([inner], None),
        ([inner, rim[0]], f"1 of 2 findings lies {sentence} lesion: finding 2."),
        ([inner, *rim], f"2 of 3 findings lie {sentence} lesion: findings 2, 3."),
    ):
        facts["summary"]["lesions"] = lesions
        record.write_text(json.dumps(facts))
        text = report(run).read_text()
        part = text[text.index('id="case') :].split('<section class="case"')
        of_case8 = next(one for one in part if "<h3>case8" in one)
        assert (said in of_case8) if said else (sentence not in of_case8)


def test_the_report_of_an_evaluation_shows_its_figures(
    cohort: Path, model: Path, tmp_path: Path
) -> None:
    anomri.evaluate(cohort, tmp_path, model=model)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 2 + 2  # curves, patients, and a histogram a case
    assert ">precision<" in text and ">ceil-Dice<" in text and "currentColor" in text
    assert "truth" in text and text.count('<section class="case"') == 2


def test_a_large_cohort_stays_small_enough_to_open(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import anomri.reporting.pages as module

    monkeypatch.setattr(module, "MAX_PICTURES", 1)
    assert (
        "1 of 2, largest volumes first; pictures of the others are in the folder previews"
        in report(run).read_text()
    )
    monkeypatch.setattr(module, "MAX_PICTURE_BYTES", 10)
    assert "data:image/jpeg" not in report(run).read_text()


def test_planes_show_the_peak_and_both_outlines_upright(detection: Detection) -> None:
    lesion = np.zeros(detection.anomaly_map.shape, bool)
    data = np.zeros_like(detection.volume.data)
    data[:, 10:50, 5:55, 2:12] = 0.5
    lesion[14:18, 10:14, 9:11] = True  # on the patient's right, in front, above
    label = np.zeros_like(lesion)
    label[40:44, 10:14, 9:11] = True
    score = lesion.astype(np.float32)
    volume = replace(detection.volume.with_data(data, "as drawn"), label=label)
    made = replace(detection, anomaly_map=score, mask=lesion, volume=volume)
    both = planes(made, 460).astype(int)
    assert both.shape[1] == 460
    # Above is the scan alone, without any colour.
    alone, picture = np.split(both, 2)
    assert (alone == alone[..., :1]).all()

    def centre(colour: tuple[int, int, int], columns: slice) -> np.ndarray:
        near = (np.abs(picture[:, columns] - np.array(colour)).sum(-1) < 30).nonzero()
        assert near[0].size
        return np.array([near[0].mean(), near[1].mean()])

    _, sizes = zip(*((0, s) for s in (44 * 3.75, 54 * 3.75, 14 * 8)), strict=True)
    scale = 460 / (2 * sizes[0] + sizes[1])
    width, depth, height = (scale * size for size in sizes)
    axial, axial_label = (
        centre(colour, slice(0, round(width))) for colour in (MASK_COLOUR, TRUTH_COLOUR)
    )
    assert axial == pytest.approx([(12 - 3) / 54 * depth, (16 - 8) / 44 * width], abs=3)
    assert axial_label[1] == pytest.approx((42 - 8) / 44 * width, abs=3)
    coronal = centre(MASK_COLOUR, slice(round(width), round(2 * width)))
    assert coronal == pytest.approx([(14 - 10) / 14 * height, (16 - 8) / 44 * width], abs=3)
    sagittal = centre(MASK_COLOUR, slice(round(2 * width), 460))
    assert sagittal == pytest.approx([(14 - 10) / 14 * height, (12 - 3) / 54 * depth], abs=3)


def test_previews_are_read_as_they_were_written(detection: Detection, tmp_path: Path) -> None:
    save_preview(detection, tmp_path)
    preview = read_preview(tmp_path, detection.name)
    assert preview is not None and preview.has_truth and preview.channel == "flair"
    kinds = ["planes", "findings", "slices", "row"]
    assert [picture.kind for picture in preview.pictures] == kinds
    assert [picture.columns != () for picture in preview.pictures] == [False, False, False, True]
    assert preview.colours == pytest.approx(
        (detection.threshold, float(detection.anomaly_map.max()))
    )
    image = cv2.imread(str(tmp_path / "previews" / f"{detection.name}.slices.jpg"))
    assert preview.pictures[2].size == image.shape[1::-1] == lightbox(detection).shape[1::-1]
    assert preview.histogram is not None and preview.histogram.healthy.startswith("M0 40")
    (tmp_path / "previews" / f"{detection.name}.preview.json").write_text("[]")
    assert read_preview(tmp_path, detection.name) is None


def test_an_overlay_leaves_values_below_its_range_visible() -> None:
    image = np.full((2, 2, 3), 100, np.uint8)
    drawn = overlay(image, np.array([[0, 0.1], [0.2, 9]], np.float32), 0.1, 0.3)
    assert (drawn[0] == 100).all() and (drawn[1] != 100).any(axis=-1).all()
    # Half of what is below shows through, and the highest score has the last colour.
    assert drawn[1, 1] == pytest.approx((100 + PALETTE[255].astype(int)) / 2, abs=1)


def test_a_histogram_is_a_density_on_a_log_scale() -> None:
    bars = histogram([100_000, 1, 0, 0], [], (2.0, 0.0), 1.0)
    assert bars.scan == "M0 40V0.0H25.00V40.0H50.00V40.0H75.00V40.0H100.00V40"
    assert (bars.healthy, bars.threshold, bars.top) == ("", 50.0, 2.0)
    assert histogram([10, 1], [], (1.0, 0.0), None).scan == "M0 40V0.0H50.00V8.0H100.00V40"


def test_closeups_show_the_largest_lesions_by_their_numbers(
    detection: Detection, tmp_path: Path
) -> None:
    assert len(detection.lesions) > 1
    row = closeups(detection, 480, 4)
    shown = min(len(detection.lesions), 4)
    assert row is not None and row.shape == (240, shown * 120, 3)
    for number in range(shown):
        cell = row[:, number * 120 : number * 120 + 118]
        assert cell[:120].any() and cell[120:].any()
        # Above is the scan alone.
        assert (cell[:120] == cell[:120, :, :1]).all() and (cell[120:] != cell[120:, :, :1]).any()
    # The first is in the middle of its cell, unless that is at the image's edge.
    outlined = np.argwhere((np.abs(row[120:, :118].astype(int) - MASK_COLOUR) < 12).all(axis=2))
    assert np.abs(outlined.mean(axis=0) - 60).max() < 25
    none = replace(detection, lesions=())
    assert closeups(none) is None
    save_preview(none, tmp_path)
    preview = read_preview(tmp_path, none.name)
    assert preview is not None and [p.title.split()[0] for p in preview.pictures] == [
        "Three",
        "Axial",
        "The",
    ]
