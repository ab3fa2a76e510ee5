"""`anomri list` and `read_cohort`: what was understood of a cohort, as a table that comes back."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

import anomri
from anomri.cli import listing, main
from anomri.errors import AnomriError
from anomri.scans.case import Case
from anomri.scans.cohort import Cohort, case_table
from anomri.scans.find import find_cases, read_cohort
from anomri.scans.layouts import LAYOUTS as READERS
from test_cases import LAYOUTS, touch


def without_notes(cases: list[Case]) -> list[Case]:
    """Notes say how a file was chosen; in a table nothing is left to choose."""
    return [replace(case, notes=()) for case in cases]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("table", ["cohort.tsv", "elsewhere/cohort.tsv"])
def test_a_written_table_gives_the_same_cases(tmp_path: Path, layout: str, table: str) -> None:
    folder = touch(tmp_path / "scans", *(f"{name}.nii.gz" for name in LAYOUTS[layout][0]))
    (tmp_path / "elsewhere").mkdir()
    cohort = read_cohort(folder)
    cohort.write(tmp_path / table)
    assert without_notes(find_cases(tmp_path / table)) == without_notes(cohort.cases)
    assert cohort.cases == find_cases(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_image_is_in_a_case_or_left_out_with_a_reason(tmp_path: Path, layout: str) -> None:
    touch(tmp_path, *(f"{name}.nii.gz" for name in LAYOUTS[layout][0]), "far/far/away/x_t1.nii")
    cohort = read_cohort(tmp_path)
    used = [path for case in cohort.cases for path in case.channels.values()]
    used += [path for case in cohort.cases for path in (case.label, case.mask) if path]
    left_out = [path for path, _ in cohort.left_out]
    assert sorted(used + left_out) == sorted(tmp_path.rglob("*.nii*"))
    assert all(reason for _, reason in cohort.left_out)


NAMES = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0"), min_size=1, max_size=12
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(NAMES, st.sampled_from(["t1", "flair", "seg", "mask", "odd name"])))
def test_any_name_survives_a_table_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("scans")
    for name, kind in files.items():
        try:
            touch(folder, f"{name}_{kind}.nii")
        except OSError:  # the file system refuses it
            return
    try:
        cases = find_cases(folder)
        Cohort("", cases, []).write(folder / "cohort.tsv")
    except AnomriError:
        return
    assert without_notes(find_cases(folder / "cohort.tsv")) == without_notes(cases)


def test_splits_patients_and_odd_paths_survive_a_table(tmp_path: Path) -> None:
    touch(tmp_path, "p 1/v1/FLAIR.nii.gz", 'p 1/v2/"T1"\t_FLAIR.nii.gz', " p2/FLAIR.nii")
    (tmp_path / "splits.csv").write_text("case,split\np 1_v1,test\np 1_v2,test\n")
    cases = find_cases(tmp_path)[1:]  # the last, of a folder that begins with a space, is refused
    Cohort("", cases, []).write(tmp_path / "cohort.tsv")
    again = find_cases(tmp_path / "cohort.tsv")
    assert again == cases
    assert [(case.split, case.patient) for case in again] == [("test", "p 1")] * 2
    with pytest.raises(AnomriError, match="case ' p2' does not fit in a table; rename"):
        Cohort("", find_cases(tmp_path), []).write(tmp_path / "all.tsv")


@pytest.mark.parametrize("channel", ["case", "split", "subject"])
def test_a_channel_named_like_another_column_is_refused(channel: str) -> None:
    with pytest.raises(AnomriError, match=f"channel called '{channel}' does not fit in a table"):
        case_table([Case("p", {channel: Path("p.nii")})])


def test_names_that_are_not_utf_8_are_left_out_of_a_table_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "caf\udce9"
    touch(folder, "p_flair.nii")
    assert main(["list", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "is not valid UTF-8; rename that file or folder" in printed.err
    assert "Not in the table (1):" in printed.err and printed.out == "case\n"
    assert main(["list", str(folder), "-o", str(tmp_path / "t.tsv")]) == 2
    assert "cannot list any case" in capsys.readouterr().err


def test_one_name_that_fits_no_table_costs_only_its_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path / "in", "p_flair.nii", "caf\udce9_flair.nii", "a\tb_flair.nii", "q\n_flair.nii")
    assert main(["list", str(tmp_path / "in"), "-o", str(tmp_path / "t.tsv")]) == 0
    printed = capsys.readouterr()
    table = (tmp_path / "t.tsv").read_text()
    assert table == "case\tflair\np\tin/p_flair.nii\n"
    assert "Not in the table (3):" in printed.err
    for name in (r"'caf\udce9'", r"'a\tb'", r"'q\n'"):
        assert f"case {name} does not fit in a table" in printed.err.replace("\n", " ")


def test_a_table_that_exists_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path / "scans", "p_flair.nii")
    table = tmp_path / "cohort.tsv"
    assert main(["list", str(tmp_path / "scans"), "-o", str(table)]) == 0
    assert table.read_text() == "case\tflair\np\tscans/p_flair.nii\n"
    assert main(["list", str(tmp_path / "scans"), "-o", str(table)]) == 0  # nothing has changed
    table.write_text("edited")
    assert main(["list", str(tmp_path / "scans"), "-o", str(table)]) == 2
    assert "exists and would be overwritten; choose another file" in capsys.readouterr().err
    assert table.read_text() == "edited"
    assert main(["list", str(tmp_path / "scans"), "-o", str(tmp_path / "cohort.csv")]) == 2
    assert "a table of cases ends in .tsv" in capsys.readouterr().err


def test_what_is_left_out_is_listed_by_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = ("p1/pre/FLAIR.nii", "p1/pre/phase.nii", "p1/orig/FLAIR.nii", "p1/wmh.nii")
    other = ("q/q_T1.nii", "q/q_T1_brain.nii", "q/q_wm_mask.nii", "q/deep/q_T2.nii")
    results = ("r_flair.nii", "r_anomaly.nii.gz", "r_mask.nii.gz")
    marks = ("q/q_seg.nii", "q/q_manual.nii", "q/q_mask.nii", "q/q_T1_mask.nii")
    touch(tmp_path, *scan, *other, *results, *marks)
    cohort = read_cohort(tmp_path)
    found = {str(path.relative_to(tmp_path)): reason for path, reason in cohort.left_out}
    assert found == {
        "p1/orig/FLAIR.nii": "the images are read from pre",
        "q/q_T1.nii": "another file is taken for t1",
        "q/q_wm_mask.nii": "shows healthy tissue, not the whole brain",
        "q/deep/q_T2.nii": "is not where this layout has images (a folder per case)",
        "q/q_manual.nii": "another file is taken for the label",
        "q/q_T1_mask.nii": "another file is taken for the brain mask",
        "r_anomaly.nii.gz": "was written by anomri detect",
        "r_mask.nii.gz": "was written by anomri detect",
    }
    assert cohort.unknown_channels == ["phase"]
    assert main(["list", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    for path, reason in found.items():
        assert f"Left out, {reason} (" in shown.err
        assert f"  {path}\n" in shown.err
    assert "a folder per case; cases: 3, patients: 3" in shown.err
    assert "not known by name: phase." in shown.err
    assert "p1: its images are those in pre; not read: orig/FLAIR.nii." in shown.err


def test_the_table_printed_in_a_pipe_can_be_given_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path / "scans", "p_flair.nii", "p_seg.nii", "q_t1.nii")
    assert main(["list", str(tmp_path / "scans")]) == 0
    (tmp_path / "piped.tsv").write_text(capsys.readouterr().out)
    assert find_cases(tmp_path / "piped.tsv") == find_cases(tmp_path / "scans")


def test_on_a_terminal_each_case_is_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "P1_v1_flair.nii", "P1_v1_seg.nii", "P1_v2_[t1]_flair.nii")
    touch(tmp_path, *(f"{k}/x_anomaly.nii" for k in range(8)), "x_anomaly.nii")
    (tmp_path / "splits.csv").write_text("case,split\nP1_v1,test\n")
    monkeypatch.setattr(listing, "out", Console(force_terminal=True, width=120, color_system=None))
    assert main(["list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("cases: 2, patients: 2")
    assert lines[1].split() == ["case", "patient", "flair", "label", "split"]
    assert lines[2].split() == ["P1_v1", "P1", "P1_v1_flair.nii", "P1_v1_seg.nii", "test"]
    assert lines[3].split()[-1] == "P1_v2_[t1]_flair.nii"
    assert lines[-1] == "  and 4 more; --all names them"
    assert main(["list", str(tmp_path), "--all"]) == 0
    assert capsys.readouterr().out.count("_anomaly.nii") == 9


def test_bids_and_nnunet_survive_a_table_and_name_what_is_left_out(tmp_path: Path) -> None:
    bids = touch(
        tmp_path / "bids",
        "sub-1/anat/sub-1_FLAIR.nii.gz",
        "sub-1/anat/sub-1_run-2_T1w.nii.gz",
        "sub-1/anat/sub-1_run-10_T1w.nii.gz",
        "sub-1/func/sub-1_bold.nii.gz",
        "derivatives/x/sub-1/anat/sub-1_space-MNI_desc-brain_mask.nii.gz",
        "derivatives/x/sub-1/anat/sub-1_label-lesion_mask.nii.gz",
    )
    (bids / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    cohort = read_cohort(bids)
    assert [(path.name, reason) for path, reason in cohort.left_out] == [
        (
            "sub-1_space-MNI_desc-brain_mask.nii.gz",
            "lies in another space or shows something else",
        ),
        ("sub-1_run-10_T1w.nii.gz", "another file is taken for t1"),
        ("sub-1_bold.nii.gz", "is not where this layout has images (BIDS data set)"),
    ]
    nnunet = touch(
        tmp_path / "nnunet",
        *("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b_0000.nii.gz", "other/c.nii"),
    )
    (nnunet / "dataset.json").write_text('{"channel_names": {"0": "T1"}}')
    other = read_cohort(nnunet)
    assert [path.name for path, _ in other.left_out] == ["c.nii"]
    for found in (cohort, other):
        table = tmp_path / f"{found.cases[0].name}.tsv"
        found.write(table)
        assert without_notes(find_cases(table)) == without_notes(found.cases)


def test_links_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "p/p_flair.nii", "p/a/b/p_t1.nii")
    (tmp_path / "p/a/again").symlink_to(tmp_path)
    assert [path.name for path, _ in read_cohort(tmp_path).left_out] == ["p_t1.nii"]


def test_the_layout_is_named_and_every_layout_has_an_example(tmp_path: Path) -> None:
    touch(tmp_path / "flat", "p_flair.nii")
    touch(tmp_path / "visits", "p/v1/FLAIR.nii")
    touch(tmp_path / "steps", "pre/FLAIR.nii", "orig/FLAIR.nii")
    assert [anomri.read_cohort(tmp_path / name).layout for name in ("flat", "visits", "steps")] == [
        "one folder of images",
        "a folder per patient and visit",
        "one patient, a folder per step of processing",
    ]
    with pytest.raises(AnomriError, match="no scans found") as error:
        read_cohort(touch(tmp_path / "empty", "notes.txt"))
    assert all(layout.EXAMPLE in str(error.value) for layout in READERS)


def test_listing_needs_no_torch(tmp_path: Path) -> None:
    touch(tmp_path, "p_flair.nii")
    code = (
        f"import sys; from anomri.cli import main; main(['list', {str(tmp_path)!r}]);"
        "print([name for name in ('torch', 'nibabel', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("annotation", ["p_flair_mni_mask", "p_flair_mni_seg", "p_flair_mask"])
def test_a_mask_or_label_of_an_image_on_another_grid_is_refused(
    tmp_path: Path, annotation: str
) -> None:
    """The image as it was is taken, or one without skull: the file belongs to the other."""
    brain = "_brain" if annotation == "p_flair_mask" else ""
    for name in ("p_flair", f"p_flair_mni{brain}", annotation):
        (tmp_path / f"{name}.nii.gz").touch()
    with pytest.raises(AnomriError, match=rf"{annotation}.nii.gz: belongs to p_flair.*is taken"):
        find_cases(tmp_path)


def test_a_mask_of_an_image_after_bias_correction_fits_the_image_before(tmp_path: Path) -> None:
    for name in ("p_flair", "p_flair_n4", "p_flair_n4_mask", "p_t1_reg", "p_t1_reg_seg"):
        (tmp_path / f"{name}.nii.gz").touch()
    (case,) = find_cases(tmp_path)
    assert case.mask == tmp_path / "p_flair_n4_mask.nii.gz"
    assert case.label == tmp_path / "p_t1_reg_seg.nii.gz"
