import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

import anomri
import anomri.evaluation.scored as scored_module
from anomri.cli import main
from anomri.errors import AnomriError
from anomri.evaluation.cases import choose_cases
from anomri.evaluation.evaluate import evaluate, evaluate_shard, merge_evaluations
from anomri.model.detector import Detector
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.splits import read_split_cases, splits_by_name, write_splits
from anomri.scoring.metrics import count_lesions, dice, drop_small_components
from anomri.spec import Grid, Scaling
from anomri.training.packing import pack_cohort
from conftest import AFFINE, SHAPE, brain, write
from phantom import thresholding


def test_pooled_figures_equal_those_of_all_voxels_together(
    model: Path, cohort: Path, tmp_path: Path
) -> None:
    evaluation = evaluate(cohort, tmp_path / "out", model=model)
    detector = Detector.load(model)
    detections = [detector.detect(case) for case in find_cases(cohort) if case.split == "test"]
    scores = [detection.scores for detection in detections]
    labels = [
        detection.stack.label.numpy()
        for detection in detections
        if detection.stack.label is not None
    ]
    pooled, truth = (
        np.concatenate([s.ravel() for s in scores]),
        np.concatenate([label.ravel() for label in labels]),
    )
    assert evaluation["AUPRC, pooled"] == pytest.approx(
        average_precision_score(truth, pooled), abs=1e-9
    )
    tried = np.unique(pooled[truth])[::7]
    best = max(dice(pooled >= t, truth) for t in tried)
    assert best <= evaluation["ceil-Dice, pooled"] + 1e-12
    assert evaluation["ceil-Dice, pooled"] < best + 0.02
    threshold = detector.spec.thresholds.threshold if detector.spec.thresholds else 0
    for patient, score, label in zip(evaluation.patients, scores, labels, strict=True):
        assert patient.average_precision == pytest.approx(
            average_precision_score(label.ravel(), score.ravel())
        )
        assert patient.dice_unfiltered == pytest.approx(dice(score > threshold, label))
        assert patient.dice == pytest.approx(
            dice(drop_small_components(score > threshold, 2), label)
        )
    figure = evaluation.figures[0]
    assert figure.low is not None
    assert figure.high is not None
    assert figure.low <= figure.value <= figure.high
    # What was computed is what was written.
    facts = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert facts["figures"][0]["value"] == evaluation["AUPRC, pooled"]
    assert facts["protocol"]["cases"] == "2 (split test)"
    assert len((tmp_path / "out" / "patients.tsv").read_text().splitlines()) == 3
    assert (tmp_path / "out" / "report.html").is_file()
    assert not list((tmp_path / "out").glob(".scores-*"))


def test_saved_maps_score_like_the_model_on_the_input_grid(
    model: Path, cohort: Path, tmp_path: Path
) -> None:
    anomri.detect_cohort(
        [case for case in find_cases(cohort) if case.split == "test"], tmp_path / "maps", model
    )
    by_maps = evaluate(cohort, maps=tmp_path / "maps", threshold=0.1)
    by_model = evaluate(cohort, model=model, grid="input", threshold=0.1)
    assert by_maps.figures == by_model.figures
    assert "every voxel of the scan's own grid" in by_maps.protocol["voxels"]


def synthetic_maps(
    folder: Path, count: int = 4
) -> tuple[list[Case], list[np.ndarray], list[np.ndarray]]:
    """Cases with random scores, negative ones and ties among them, and labels."""
    cases, scores, labels = [], [], []
    for number in range(count):
        rng = np.random.default_rng(number)
        label = np.zeros(SHAPE, bool)
        label[20 + number : 30, 20:30, 4:8] = True
        score = np.round(rng.normal(0, 1, SHAPE) + 2 * label, 1).astype(np.float32)
        score[:10] = 0
        write(folder / f"c{number}.nii.gz", score)
        cases.append(
            Case(
                f"c{number}",
                {},
                write(folder / "labels" / f"c{number}_seg.nii.gz", label.astype(np.uint8)),
            )
        )
        scores.append(score)
        labels.append(label)
    return cases, scores, labels


def test_maps_of_any_program_may_have_ties_and_negative_scores(tmp_path: Path) -> None:
    cases, scores, labels = synthetic_maps(tmp_path)
    evaluation = evaluate(cases, maps=tmp_path)
    expected = average_precision_score(np.ravel(labels), np.ravel(scores))
    assert evaluation["AUPRC, pooled"] == pytest.approx(expected, abs=1e-12)
    assert evaluation.patients[0].dice is None
    assert evaluation.protocol["threshold"] == "none"


def test_lesion_voxels_that_score_zero_count_for_every_patient(tmp_path: Path) -> None:
    """Erosion leaves lesion voxels at the brain's edge without a score; nothing may be left out
    for it."""
    cases, scores, labels = synthetic_maps(tmp_path, 2)
    scores[0][labels[0]] = np.where(np.arange(labels[0].sum()) % 2, 0, scores[0][labels[0]])
    scores[0] = np.abs(scores[0]) * (np.indices(SHAPE)[0] > 20)
    write(tmp_path / "c0.nii.gz", scores[0])
    patient = evaluate(cases, maps=tmp_path, threshold=-1).patients[0]
    assert patient.average_precision == pytest.approx(
        average_precision_score(labels[0].ravel(), scores[0].ravel())
    )
    assert patient.dice == pytest.approx(2 * labels[0].sum() / (labels[0].sum() + labels[0].size))


def test_lesion_figures_and_filtered_ceil_dice_are_computed(tmp_path: Path) -> None:
    cases, scores, labels = synthetic_maps(tmp_path, 2)
    evaluation = evaluate(cases, maps=tmp_path, threshold=0.9)
    best = max(
        np.unique(np.array(scores)[np.array(labels)]),
        key=lambda t: dice(np.array(scores) >= t, np.array(labels)),
    )
    limit = 0  # 70 mm3 are less than one of these voxels
    filtered = np.array([drop_small_components(score >= best, limit) for score in scores])
    assert evaluation["ceil-Dice, pooled, components filtered"] == pytest.approx(
        dice(filtered, np.array(labels))
    )
    counts = [
        count_lesions(score > np.float32(0.9), label)
        for score, label in zip(scores, labels, strict=True)
    ]
    sensitivity = np.mean([c.detected / c.lesions for c in counts])
    assert evaluation["lesion-wise sensitivity, unfiltered, mean of patients"] == pytest.approx(
        sensitivity
    )
    false = np.mean([c.false_positives for c in counts])
    assert evaluation["false positive components per scan, unfiltered"] == pytest.approx(false)


def test_patients_of_the_training_are_left_out_unless_asked_for(
    model: Path, cohort: Path, tmp_path: Path
) -> None:
    cases = [replace(case, split=None) for case in find_cases(cohort)]
    evaluation = evaluate(cases, model=model)
    assert [patient.case for patient in evaluation.patients] == ["case7", "case8"]
    assert "without 7 that the model was trained or validated on" in evaluation.protocol["cases"]
    with pytest.raises(AnomriError, match="trained or validated on all 7 cases"):
        evaluate(cases[:7], model=model)
    assert evaluation.protocol["threshold"].endswith("the model's, without labels")
    given = evaluate(cases, tmp_path, model=model, threshold=0.3)
    assert given.protocol["threshold"] == "0.3, given by the user"
    anomri.detect_cohort([case for case in cases if case.name == "case7"], tmp_path, model)
    assert "Anomalies in the scan case7" in (tmp_path / "report.html").read_text()
    assert "Anomalies in the scan case7" in anomri.report(tmp_path).read_text()


def test_the_interval_of_a_pooled_figure_resamples_patients(tmp_path: Path) -> None:
    cases, scores, labels = synthetic_maps(tmp_path, 6)
    figure = evaluate(cases, maps=tmp_path).figures[0]
    rng = np.random.default_rng(1)
    resampled = []
    for _ in range(60):
        drawn = rng.integers(0, 6, 6)
        truth, pooled = (
            np.concatenate([array[k].ravel() for k in drawn]) for array in (labels, scores)
        )
        resampled.append(average_precision_score(truth, pooled))
    low, high = np.quantile(resampled, [0.025, 0.975])
    width = high - low
    assert figure.low == pytest.approx(low, abs=0.35 * width)
    assert figure.high == pytest.approx(high, abs=0.35 * width)


def test_a_case_that_fails_is_named_and_the_others_count(tmp_path: Path) -> None:
    cases, _, _ = synthetic_maps(tmp_path)
    (tmp_path / "c1.nii.gz").unlink()
    write(tmp_path / "c2.nii.gz", np.zeros((4, 4, 4), np.float32))
    evaluation = evaluate(cases, tmp_path / "out", maps=tmp_path)
    assert [patient.case for patient in evaluation.patients] == ["c0", "c3"]
    assert "holds no c1_anomaly.nii.gz" in evaluation.failed["c1"]
    assert "has (4, 4, 4) voxels" in evaluation.failed["c2"]
    assert evaluation.protocol["cases"].endswith("; 2 failed")
    assert "c2.nii.gz" in (tmp_path / "out" / "report.html").read_text()


def test_only_failed_cases_are_evaluated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, _, _ = synthetic_maps(tmp_path)
    expected = evaluate(cases, maps=tmp_path).figures
    read, tried, broken = scored_module.read_map, list[str](), {"c1.nii.gz"}

    def read_or_fail(path: Path, *others: Any) -> Any:
        tried.append(path.name)
        if path.name in broken:
            raise MemoryError
        return read(path, *others)

    monkeypatch.setattr(scored_module, "read_map", read_or_fail)
    assert list(evaluate(cases, tmp_path / "out", maps=tmp_path).failed) == ["c1"]
    broken.clear()
    tried.clear()
    again = evaluate(cases, tmp_path / "out", maps=tmp_path)
    assert (again.failed, again.figures, tried) == ({}, expected, ["c1.nii.gz"])
    assert not (tmp_path / "out" / ".scores").exists()
    assert evaluate(cases, tmp_path / "out", maps=tmp_path).figures == expected and tried == [
        "c1.nii.gz"
    ]
    # The same with shards, of which one is given again after the merge.
    broken.add("c2.nii.gz")
    shards = tmp_path / "shards"
    failed = [evaluate_shard(cases, shards, f"{k}/2", maps=tmp_path) for k in (1, 2)]
    assert sum(failed) == 1 and list(merge_evaluations(tmp_path / "shards").failed) == ["c2"]
    broken.clear()
    assert evaluate_shard(cases, shards, f"{failed.index(1) + 1}/2", maps=tmp_path) == 0
    merged = merge_evaluations(tmp_path / "shards")
    assert (merged.failed, merged.figures) == ({}, expected)


@pytest.mark.parametrize("name", ["metrics.json", "patients.tsv", "curve.tsv", "report.html"])
def test_a_table_not_written_by_anomri_is_not_replaced(tmp_path: Path, name: str) -> None:
    cases, _, _ = synthetic_maps(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(AnomriError, match=f"{name}: was not written by anomri"):
        evaluate(cases, tmp_path / "out", maps=tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."] == [name]


def test_pictures_of_an_earlier_model_are_removed(
    cohort: Path, model: Path, tmp_path: Path
) -> None:
    evaluate(cohort, tmp_path / "out", model=model)
    assert "data:image/jpeg" in (tmp_path / "out" / "report.html").read_text()
    for case in find_cases(cohort):
        write(
            tmp_path / "maps" / f"{case.name}.nii.gz",
            np.random.default_rng(0).random(SHAPE).astype(np.float32),
        )
    evaluate(cohort, tmp_path / "out", maps=tmp_path / "maps", overwrite=True)
    assert "data:image/jpeg" not in (tmp_path / "out" / "report.html").read_text()
    # Beside the maps they are theirs.
    anomri.detect_cohort(
        [case for case in find_cases(cohort) if case.split == "test"], tmp_path / "own", model
    )
    evaluate(cohort, tmp_path / "own", maps=tmp_path / "own")
    assert "data:image/jpeg" in (tmp_path / "own" / "report.html").read_text()


def test_maps_keep_the_precision_of_float64(tmp_path: Path) -> None:
    cases, scores, labels = synthetic_maps(tmp_path)
    fine = [1 - 1e-9 * np.exp(-score.astype(np.float64)) for score in scores]
    for case, score in zip(cases, fine, strict=True):
        write(tmp_path / f"{case.name}.nii.gz", score)
    expected = average_precision_score(np.ravel(labels), np.ravel(scores))
    assert average_precision_score(np.ravel(labels), np.ravel(fine)) == pytest.approx(expected)
    assert evaluate(cases, maps=tmp_path)["AUPRC, pooled"] == pytest.approx(expected, abs=1e-12)


def test_a_threshold_of_the_curve_gives_the_dice_of_its_row(tmp_path: Path) -> None:
    cases, _, labels = synthetic_maps(tmp_path)
    for case, label in zip(cases, labels, strict=True):
        write(tmp_path / f"{case.name}.nii.gz", np.roll(label, 1, 0).astype(np.uint8))
    curve = evaluate(cases, maps=tmp_path).curve
    threshold, *_, best = max(curve, key=lambda point: point[3])
    found = evaluate(cases, maps=tmp_path, threshold=threshold)
    dices = [patient.dice_unfiltered for patient in found.patients]
    assert best > 0.8 and np.mean(dices) == pytest.approx(best, abs=0.02)


def test_notes_about_labels_are_in_the_protocol(cohort: Path, model: Path, tmp_path: Path) -> None:
    cases, _, labels = synthetic_maps(tmp_path, 2)
    assert "labels" not in evaluate(cases, maps=tmp_path).protocol
    for number, (case, most) in enumerate(zip(cases, (1, 2 / 3), strict=True)):
        soft = np.where(labels[number], most, 0.0)
        soft[0, 0, 0] = 1 / 3
        write(case.label, soft.astype(np.float32))  # type: ignore[arg-type]
    cases[1] = replace(
        cases[1], notes=("c1: c1_seg.nii.gz is taken for its label, not c1_seg2.nii.gz.", "other")
    )
    protocol = evaluate(cases, tmp_path / "out", maps=tmp_path).protocol
    assert protocol["labels"] == (
        "c0: c0_seg.nii.gz has values between whole numbers (up to 1); those from 0.5 on are taken "
        "(45 ml). "
        "c1: c1_seg.nii.gz is taken for its label, not c1_seg2.nii.gz. "
        "c1: c1_seg.nii.gz has values between whole numbers (up to 0.667); those from 0.5 on are "
        "taken (40.5 ml)."
    )
    case = replace(find_cases(cohort)[7], label=cases[1].label, notes=cases[1].notes)
    assert evaluate([case], model=model).protocol["labels"].count("c1_seg.nii.gz") == 2


def test_the_protocol_counts_lesions_that_the_grid_loses(
    cohort: Path, model: Path, tmp_path: Path
) -> None:
    label = np.zeros(SHAPE, np.uint8)
    label[20:28, 20:28, 4:8] = 1
    label[12, 14, 2] = label[14, 30, 3] = label[31, 12, 5] = label[35, 35, 6] = 1
    case = replace(find_cases(cohort)[7], label=write(tmp_path / "x_seg.nii.gz", label))
    coarse = Detector.load(model)
    coarse = coarse.with_spec(replace(coarse.spec, grid=Grid((16, 16))))
    told = evaluate([case], model=coarse).protocol["lesion"]
    assert re.search(
        r"[1-4] of 5 lesions vanish on this grid, or grow together; --grid input keeps them", told
    )
    assert "vanish" not in evaluate([case], model=coarse, grid="input").protocol["lesion"]


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -3.0])
def test_a_method_with_negative_or_infinite_scores_is_refused(
    cohort: Path, model: Path, monkeypatch: pytest.MonkeyPatch, score: float
) -> None:
    detector = Detector.load(model)
    monkeypatch.setattr(
        type(detector.method), "residual", lambda self, x, *others: torch.full_like(x[:, 0], score)
    )
    detector.spec = replace(detector.spec, score=replace(detector.spec.score, kind="own"))
    with pytest.raises(
        AnomriError, match="the method dae scores from .* scores are numbers from 0 up"
    ):
        detector.detect(find_cases(cohort)[7])


def test_nothing_to_evaluate_is_refused_with_the_reason(
    cohort: Path, model: Path, tmp_path: Path
) -> None:
    cases = find_cases(cohort)
    with pytest.raises(AnomriError, match="either a model or a folder of maps"):
        evaluate(cases)
    with pytest.raises(AnomriError, match=r"no case of the split 'train' has a label"):
        evaluate([case for case in cases if case.label is None], model=model, split="train")
    with pytest.raises(AnomriError, match="no case could be evaluated"):
        evaluate(cases, maps=tmp_path)
    moved = AFFINE.copy()
    moved[0, 3] += 5
    label = write(tmp_path / "x_seg.nii.gz", np.ones(SHAPE, np.uint8), moved)
    with pytest.raises(AnomriError, match=r"x_seg.nii.gz: its header places it up to 5 mm away"):
        evaluate([Case("x", cases[7].channels, label)], model=model)


def test_cases_without_a_label_are_left_out_and_counted(cohort: Path, model: Path) -> None:
    evaluation = evaluate(cohort, model=model, split="val")
    assert evaluation.protocol["cases"] == "1 (split val, without 1 that have no label)"


def test_a_patient_without_a_lesion_counts_in_figures_that_are_defined(tmp_path: Path) -> None:
    cases, _, _ = synthetic_maps(tmp_path, 2)
    write(tmp_path / "healthy.nii.gz", np.random.default_rng(0).random(SHAPE).astype(np.float32))
    healthy = Case(
        "healthy", {}, write(tmp_path / "labels" / "healthy_seg.nii.gz", np.zeros(SHAPE, np.uint8))
    )
    evaluation = evaluate([*cases, healthy], tmp_path / "out", maps=tmp_path, threshold=0.5)
    assert np.isnan(evaluation.patients[2].average_precision)
    mean = np.mean([patient.average_precision for patient in evaluation.patients[:2]])
    assert evaluation["AUPRC, mean of patients"] == pytest.approx(mean)
    assert evaluation.figures[0].low is not None
    assert (
        evaluation.figures[0].low > 0.5 * evaluation.figures[0].value
    )  # resamples without a lesion say nothing
    assert (
        np.isnan(evaluation.patients[2].dice) and evaluation.patients[2].lesions.false_positives > 0
    )
    dices = [patient.dice for patient in evaluation.patients[:2]]
    assert evaluation[
        "Dice at the threshold, components filtered, mean of patients"
    ] == pytest.approx(np.mean(dices))
    assert "NaN" not in (tmp_path / "out" / "metrics.json").read_text()
    with pytest.raises(AnomriError, match="none of the 1 cases has a labelled lesion"):
        evaluate([healthy], maps=tmp_path)


def test_a_patient_with_many_scans_is_one_patient(tmp_path: Path) -> None:
    cases, _, _ = synthetic_maps(tmp_path)
    once = evaluate(cases, maps=tmp_path, threshold=0.9)
    many = []
    for case in cases:
        for visit in range(3):
            name = f"sub-{case.name}_ses-{visit}"
            shutil.copy(tmp_path / f"{case.name}.nii.gz", tmp_path / f"{name}.nii.gz")
            many.append(replace(case, name=name))
    often = evaluate(many, maps=tmp_path, threshold=0.9)
    for one, other in zip(once.figures, often.figures, strict=True):
        assert (other.name, other.value) == (one.name, pytest.approx(one.value))
        assert (other.low, other.high) == (
            pytest.approx(one.low, abs=2e-3),
            pytest.approx(one.high, abs=2e-3),
        )
    assert "resamples of patients (4, of 12 scans)" in often.protocol["intervals"]
    assert often.patients[4].patient == "sub-c1"
    alone = evaluate(many[:3], maps=tmp_path)
    assert all(figure.low is None for figure in alone.figures)
    with pytest.raises(KeyError, match="there is no figure 'AUPRC'; there are AUPRC, pooled"):
        alone["AUPRC"]


def test_patients_that_become_known_later_are_counted(tmp_path: Path) -> None:
    cases, _, _ = synthetic_maps(tmp_path)
    cases = [case for case in cases if case.label]
    first = evaluate(cases, tmp_path / "out", maps=tmp_path)
    again = evaluate(
        [replace(case, subject="s") for case in cases], tmp_path / "out", maps=tmp_path
    )
    assert first.figures[0].low is not None and again.figures[0].low is None


def test_other_scans_of_training_patients_are_left_out(tmp_path: Path) -> None:
    label = tmp_path / "x_seg.nii.gz"
    cases = [Case(name, {}, label) for name in ("sub-01_ses-2", "sub-02_ses-1", "b")]
    table = tmp_path / "splits.csv"
    write_splits(
        table, [Case("sub-01_ses-1", {}, split="train"), Case("a", {}, split="val", subject="P7")]
    )
    seen = splits_by_name(read_split_cases(table))
    assert [case.name for case in choose_cases(cases, None, seen)[0]] == ["sub-02_ses-1", "b"]
    known = [*cases[1:2], replace(cases[2], subject="P7")]
    assert [case.name for case in choose_cases(known, None, seen)[0]] == ["sub-02_ses-1"]


def test_a_scan_with_missing_channels_is_evaluated_at_its_own_threshold(
    model_with_head: Path, cohort: Path, tmp_path: Path
) -> None:
    cases = [case for case in find_cases(cohort) if case.split == "test"]
    cases[0] = replace(cases[0], channels={"flair": cases[0].channels["flair"]})
    detector = Detector.load(model_with_head)
    evaluation = evaluate(cases, tmp_path, model=detector)
    for case, row in zip(cases, evaluation.patients, strict=True):
        found = detector.detect(case)
        assert found.stack.label is not None
        mask = drop_small_components(found.scores > found.threshold, 2)
        assert row.dice == pytest.approx(dice(mask, found.stack.label.numpy()))
    assert evaluation.protocol["threshold"].endswith(
        "for 1 that lack channels, the one for the channels they have, if there is one"
    )
    preview = json.loads((tmp_path / "previews" / f"{cases[0].name}.preview.json").read_text())
    assert preview["threshold"] == detector.spec.subset_thresholds["flair"].threshold
    given = evaluate(cases, tmp_path / "given", model=detector, threshold=0.7)
    assert given.threshold == 0.7
    preview = json.loads(
        (tmp_path / "given" / "previews" / f"{cases[0].name}.preview.json").read_text()
    )
    assert preview["threshold"] == 0.7


def test_options_of_a_model_are_refused_for_maps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic_maps(tmp_path)
    command = [
        "evaluate",
        "-i",
        str(tmp_path / "labels"),
        "-o",
        str(tmp_path / "out"),
        "--maps",
        str(tmp_path),
    ]
    assert main([*command, "--min-volume", "3"]) == 2
    assert "--channels, --score and --min-volume are a model's" in " ".join(
        capsys.readouterr().err.split()
    )
    with pytest.raises(AnomriError, match="no such folder; name the one that holds the maps"):
        evaluate(tmp_path / "labels", maps=tmp_path / "nowhere")


@pytest.fixture
def with_ignored(tmp_path: Path) -> tuple[Path, Path]:
    """A data set of nnU-Net of two scans whose labels ignore a region, and maps of them.

    In that region and on the lesion the maps are high, and a bit in a second healthy place.
    """
    root, maps = tmp_path / "in", tmp_path / "maps"
    for seed, case in enumerate(("a", "b")):
        rng = np.random.default_rng(seed)
        channels, lesion = brain(rng, lesion=True)
        values = lesion.astype(np.uint8)
        values[12:20, 12:20, 6:10] = 2
        scores = rng.random(SHAPE).astype(np.float32)
        scores[values > 0] += 2
        scores[24:27, 24:27, 6:8] += 2
        write(root / f"imagesTr/{case}_0000.nii.gz", channels["flair"])
        write(root / f"labelsTr/{case}.nii.gz", values)
        write(maps / f"{case}_anomaly.nii.gz", scores)
    labels = {"background": 0, "lesion": 1, "ignore": 2}
    (root / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "FLAIR"}, "labels": labels})
    )
    return root, maps


def test_ignored_voxels_are_left_out_of_every_figure(with_ignored: tuple[Path, Path]) -> None:
    root, maps = with_ignored
    evaluation = evaluate(root, maps=maps, threshold=1.5)
    truth, scores, dices = [], [], []
    for case in find_cases(root):
        values = np.asarray(nib.load(str(case.label)).dataobj)
        found = nib.load(maps / f"{case.name}_anomaly.nii.gz").get_fdata(dtype=np.float32)
        assessed = values != 2
        truth.append(values[assessed] == 1)
        scores.append(found[assessed])
        dices.append(dice(scores[-1] > 1.5, truth[-1]))
    pooled_truth, pooled = np.concatenate(truth), np.concatenate(scores)
    expected = average_precision_score(pooled_truth, pooled)
    assert evaluation["AUPRC, pooled"] == pytest.approx(expected, abs=1e-9)
    best = max(dice(pooled >= t, pooled_truth) for t in np.unique(pooled[pooled_truth]))
    assert evaluation["ceil-Dice, pooled"] == pytest.approx(best)
    assert [patient.lesion_voxels for patient in evaluation.patients] == [t.sum() for t in truth]
    assert [patient.dice_unfiltered for patient in evaluation.patients] == pytest.approx(dices)
    # One false positive in each, which lies where the label says healthy.
    assert evaluation["false positive components per scan, components filtered"] == 1
    assert f"background counted: {pooled.size:,}" in evaluation.protocol["voxels"]
    assert "voxels of value 2 are not assessed" in evaluation.protocol["labels"]


@pytest.mark.parametrize("grid", ["model", "input"])
def test_findings_in_ignored_voxels_change_no_figure(
    with_ignored: tuple[Path, Path], tmp_path: Path, grid: str
) -> None:
    root, _ = with_ignored
    detector = thresholding("flair")
    before = evaluate(root, model=detector, grid=grid)
    for path in (root / "imagesTr").iterdir():
        data = nib.load(path).get_fdata(dtype=np.float32)
        data[13:19, 13:19, 7:9] = data.max()
        write(path, data)
    after = evaluate(root, model=detector, grid=grid)
    assert after["AUPRC, pooled"] == pytest.approx(before["AUPRC, pooled"], abs=0.02)
    (root / "dataset.json").write_text('{"channel_names": {"0": "FLAIR"}}')
    taken_for_lesion = evaluate(root, model=detector, grid=grid)
    more = [one.lesion_voxels for one in taken_for_lesion.patients]
    assert min(more) > max(one.lesion_voxels for one in after.patients)


def test_slices_with_ignored_voxels_are_not_healthy(
    with_ignored: tuple[Path, Path], tmp_path: Path
) -> None:
    root, _ = with_ignored

    def healthy() -> list[tuple[int, ...]]:
        cases = find_cases(root)
        packed = pack_cohort(cases, ["flair"], Grid(), Scaling(), tmp_path / "cache")
        return [case.healthy for case in packed]

    with_ignore = healthy()
    first = [thresholding("flair").detect(case).stack.index.start for case in find_cases(root)]
    for numbers, start in zip(with_ignore, first, strict=True):
        assert numbers and not {z - start for z in range(6, 10)} & {*numbers}
    for path in (root / "labelsTr").iterdir():
        values = np.asarray(nib.load(path).dataobj)
        write(path, np.where(values == 2, 0, values).astype(np.uint8))
    assert all(len(more) > len(few) for more, few in zip(healthy(), with_ignore, strict=True))


def test_an_evaluation_starts_again_if_the_ignored_values_change(
    with_ignored: tuple[Path, Path], tmp_path: Path
) -> None:
    root, maps = with_ignored
    first = evaluate(root, tmp_path / "out", maps=maps)
    assert evaluate(root, tmp_path / "out", maps=maps).figures == first.figures
    (root / "dataset.json").write_text('{"channel_names": {"0": "FLAIR"}}')
    second = evaluate(root, tmp_path / "out", maps=maps)
    assert second.patients[0].lesion_voxels > first.patients[0].lesion_voxels
