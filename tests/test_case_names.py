"""Names of cases as file systems and people make them: one that cannot name files costs only its
case, and results among the scans are taken for neither masks nor labels."""

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import anomri
from anomri.cli import main
from anomri.errors import AnomriError
from anomri.runs import case_names
from anomri.runs.case_names import MAX_BYTES, with_usable_names
from anomri.scans.case import Case
from anomri.scans.find import find_cases, read_cohort
from anomri.training.train import Progress, train
from conftest import read_tsv, write, write_case

BAD = {
    os.fsdecode(b"caf\xe9"): "caf%E9",
    "tab\there": "tab%09here",
    "new\nline": "new%0Aline",
    "back\\slash": "back%5Cslash",
    "run": None,
    "x" * 230: None,
}
ODD = ("it's", 'quo"te', "-v", "Case", "case", "ümlaut", "a b", "=1+1", "<b>", "y" * MAX_BYTES)


def flat(folder: Path, names: list[str]) -> None:
    """A scan of two channels and a label for each name, in one folder."""
    write_case(folder / "made", "p", 3, lesion=True)
    for name in names:
        for kind in ("flair", "t1", "seg"):
            made = folder / "made" / "p" / f"p_{kind}.nii.gz"
            # A name of 230 bytes leaves room for .nii, not for .nii.gz and more.
            nib.save(nib.load(made), folder / f"{name}_{kind}.nii")
    for made in (folder / "made" / "p").iterdir():
        made.unlink()
    (folder / "made" / "p").rmdir()
    (folder / "made").rmdir()


def test_a_name_that_cannot_name_files_costs_only_its_case(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat(tmp_path / "in", ["good", *BAD])
    assert (
        main(["detect", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "o"), "-m", str(model)])
        == 1
    )
    columns, rows = read_tsv(tmp_path / "o" / "cases.tsv")
    assert len(rows) == 1 + len(BAD) and all(len(row) == len(columns) for row in rows)
    status = {row[0]: row[1] for row in rows}
    assert [name for name, one in status.items() if one == "done"] == ["good"]
    assert status.keys() >= {safe for safe in BAD.values() if safe}
    errors = " ".join(row[columns.index("error")] for row in rows)
    assert r"a case is called 'caf\udce9', which cannot name its files; rename it." in errors
    assert "which is too long to name its files (230 bytes" in errors
    printed = "".join(capsys.readouterr())
    assert "Traceback" not in printed and "caf%E9" in printed
    # Given again, what is done is kept.
    assert (
        main(["detect", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "o"), "-m", str(model)])
        == 1
    )
    assert read_tsv(tmp_path / "o" / "cases.tsv")[1][0][0] == rows[0][0]


def test_an_evaluation_goes_on_after_a_name_that_cannot_name_files(
    model: Path, tmp_path: Path
) -> None:
    flat(tmp_path / "in", ["good", "other", "tab\there", os.fsdecode(b"caf\xe9")])
    evaluation = anomri.evaluate(tmp_path / "in", tmp_path / "out", model=model)
    assert len(evaluation.failed) == 2 and len(evaluation.patients) == 2
    anomri.detect_cohort(tmp_path / "in", tmp_path / "maps", model)
    evaluation = anomri.evaluate(tmp_path / "in", tmp_path / "out2", maps=tmp_path / "maps")
    assert len(evaluation.failed) == 2 and len(evaluation.patients) == 2


def test_odd_names_that_can_name_files_are_kept(model: Path, tmp_path: Path) -> None:
    flat(tmp_path / "in", list(ODD))
    results = anomri.detect_cohort(tmp_path / "in", tmp_path / "out", model)
    assert {result.case for result in results} == set(ODD)
    assert not any(result.error for result in results)
    assert {row[0] for row in read_tsv(tmp_path / "out" / "cases.tsv")[1]} == set(ODD)


def test_names_that_differ_in_capitals_only_are_not_mixed_on_a_disk_without_capitals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [Case("Anna", {}), Case("anna", {}), Case("Anna", {})]
    assert with_usable_names(cases[:2], tmp_path) == cases[:2]
    monkeypatch.setattr(case_names, "_has_letter_case", lambda folder: False)
    first, second = with_usable_names(cases[:2], tmp_path / "new")
    assert first == cases[0]
    assert second.name.casefold() != "anna" and "differ only in capital letters" in second.problem
    with pytest.raises(AnomriError, match="differ only in capital letters"):
        second.files(["flair"])


def test_safe_names_differ_from_each_other_and_from_real_ones() -> None:
    names = ["p%09", "p\t", "p\\", "q" * 300, "q" * 301, "RUN", "run"]
    safe = [case.name for case in with_usable_names([Case(name, {}) for name in names])]
    assert len({name.casefold() for name in safe}) == len(names)
    assert safe[0] == "p%09" and safe[5] == "RUN" and all(len(name) <= MAX_BYTES for name in safe)


def test_results_among_the_scans_are_neither_labels_nor_masks(model: Path, tmp_path: Path) -> None:
    """Also where their anomaly maps were deleted to save room."""
    folder = tmp_path / "in"
    flat(folder, ["p", "q"])
    for name in ("p", "q"):
        (folder / f"{name}_seg.nii").rename(folder / f"{name}_wmh.nii")
    before = find_cases(folder)
    figures = anomri.evaluate(folder, tmp_path / "before", model=model)
    anomri.detect_cohort(folder, folder, model)
    for path in folder.glob("*_anomaly.nii.gz"):
        path.unlink()
    assert find_cases(folder) == before  # the label is the user's, not the lesions found
    left_out = {one.path.name: one.reason for one in read_cohort(folder).left_out}
    assert (
        left_out["p_lesions.nii.gz"] == left_out["p_mask.nii.gz"] == "was written by anomri detect"
    )
    again = anomri.evaluate(folder, tmp_path / "after", model=model)
    assert again.patients == figures.patients

    given = [
        Case("p", dict(before[0].channels), label=folder / "p_lesions.nii.gz"),
        Case("q", dict(before[1].channels), label=before[1].label, mask=folder / "q_mask.nii.gz"),
    ]
    third = anomri.evaluate(given, tmp_path / "given", model=model)
    assert third.patients == figures.patients[1:]


def test_a_users_mask_beside_a_summary_without_threshold_stays(tmp_path: Path) -> None:
    write(tmp_path / "p_flair.nii.gz", np.ones((3, 3, 3), np.float32))
    write(tmp_path / "p_mask.nii.gz", np.ones((3, 3, 3), np.uint8))
    (tmp_path / "p.json").write_text('{"anomri": "0.1.0", "threshold": null}')
    (case,) = find_cases(tmp_path)
    assert case.mask is not None
    (tmp_path / "p.json").write_text('{"anomri": "0.1.0", "threshold": 0.2}')
    (case,) = find_cases(tmp_path)
    assert case.mask is None


def test_a_training_leaves_out_names_that_fit_in_no_table_and_says_so(
    tmp_path: Path, tiny_preset: None
) -> None:
    """Else an evaluation would take them for scans that the model has not seen."""
    names = ["a", "b", "c", os.fsdecode(b"caf\xe9"), "new\nline"]
    flat(tmp_path / "in", names)
    for path in (tmp_path / "in").glob("*_seg.nii"):
        path.unlink()
    notes: list[str] = []

    def note(progress: Progress) -> None:
        notes.extend([progress.note] if progress.note else [])

    arguments: dict[str, Any] = {"preset": "tiny", "training": {"steps": 1}, "device": "cpu"}
    for _ in range(2):  # the second time it finds that this is done
        train(tmp_path / "in", tmp_path / "m", **arguments, resume=True, progress=note)
    assert (
        r"names that fit in no table, not used: 2 of 5 cases ('caf\udce9', 'new\nline'" in notes[0]
    )
    splits = (tmp_path / "m" / "splits.csv").read_text()
    assert sorted(line.split(",")[0] for line in splits.splitlines()[1:]) == ["a", "b", "c"]
    flat(tmp_path / "bad", names[3:])
    with pytest.raises(AnomriError, match="names that fit in no table"):
        train(tmp_path / "bad", tmp_path / "n", **arguments)


def test_a_training_does_not_take_results_for_labels(tmp_path: Path, tiny_preset: None) -> None:
    flat(tmp_path / "in", ["a", "b", "c"])
    for name in ("a", "b", "c"):
        (tmp_path / "in" / f"{name}_seg.nii").rename(tmp_path / "in" / f"{name}_lesions.nii")
        (tmp_path / "in" / f"{name}.json").write_text('{"anomri": "0.1.0", "threshold": 0.2}')
    notes: list[str] = []
    train(
        [
            Case(
                "a",
                {"flair": tmp_path / "in" / "a_flair.nii"},
                label=tmp_path / "in" / "a_lesions.nii",
            ),
            *find_cases(tmp_path / "in")[1:],
        ],
        tmp_path / "m",
        preset="tiny",
        channels=["flair"],
        training={"steps": 1},
        device="cpu",
        progress=lambda progress: notes.append(progress.note or ""),
    )
    assert "a_lesions.nii was written by anomri detect, and is not taken for its label" in notes[0]
    assert any("no label, so all slices are taken for healthy: every case." in one for one in notes)
