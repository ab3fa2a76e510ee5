"""The BIDS app: finding scans in a data set, derivatives that the validator accepts, clear
errors."""

from __future__ import annotations

import copy
import gzip
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import anomri
from anomri.cli import main
from anomri.errors import AnomriError
from anomri.model.detector import Detector
from anomri.model.lesions import lesion_labels
from anomri.optional import install_command
from anomri.runs.bids import run_group, run_participant
from anomri.scans.bids import bids_cases, validate
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from conftest import AFFINE, SHAPE, brain, read_tsv

VALIDATOR = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))


def describe(folder: Path, **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    said = {"Name": "Small", "BIDSVersion": "1.10.0", **more}
    (folder / "dataset_description.json").write_text(json.dumps(said))
    (folder / "README").write_text("Ellipsoids, for a test.\n")
    return folder


def save(path: Path, data: np.ndarray) -> Path:
    image = nib.Nifti1Image(data, AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def add(
    root: Path,
    name: str,
    seed: int,
    *,
    lesion: bool = True,
    images: tuple[str, ...] = ("FLAIR", "T1w"),
) -> None:
    """Write images of one subject or session; the part of a name before the suffix may hold
    entities."""
    channels, label = brain(np.random.default_rng(seed), lesion=lesion)
    anat = Path(*name.split("_"), "anat")
    for image in images:
        save(
            root / anat / f"{name}_{image}.nii.gz",
            channels["flair" if image.endswith("FLAIR") else "t1"],
        )
    if lesion:
        save(
            root / "derivatives" / "hand" / anat / f"{name}_label-lesion_mask.nii.gz",
            label.astype(np.uint8),
        )
        inside = (channels["t1"] > 0).astype(np.uint8)
        save(root / "derivatives" / "strip" / anat / f"{name}_desc-brain_mask.nii.gz", inside)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three participants: with one image a channel, with two sessions, with a contrast agent and
    two runs."""
    root = describe(tmp_path / "in", DatasetDOI="doi:10.0000/small")
    add(root, "sub-01", 1)
    add(root, "sub-02_ses-a", 2)
    add(root, "sub-02_ses-b", 3, lesion=False)
    add(
        root, "sub-03", 4, images=("run-10_FLAIR", "run-2_FLAIR", "T1w", "ce-gad_T1w"), lesion=False
    )
    return root


@pytest.fixture(scope="module")
def detector(model: Path) -> Detector:
    return Detector.load(model, "cpu")


def errors(folder: Path) -> list[object]:
    """Errors that the BIDS validator finds."""
    if VALIDATOR is None:
        pytest.skip("bids-validator-deno is not installed")
    ran = subprocess.run(
        [VALIDATOR, "--format", "json", str(folder)], capture_output=True, text=True, check=False
    )
    return [
        issue
        for issue in json.loads(ran.stdout)["issues"]["issues"]
        if issue["severity"] == "error"
    ]


def test_a_data_set_may_have_sessions_or_none(dataset: Path) -> None:
    told: list[str] = []
    cases = {case.name: case for case in bids_cases(dataset, warn=told.append)}
    assert list(cases) == ["sub-01", "sub-02_ses-a", "sub-02_ses-b", "sub-03"]
    assert set(cases["sub-01"].channels) == {"flair", "t1"}
    assert cases["sub-02_ses-a"].patient == "sub-02"
    assert (
        cases["sub-01"].label
        == dataset / "derivatives/hand/sub-01/anat/sub-01_label-lesion_mask.nii.gz"
    )
    assert (
        cases["sub-01"].mask
        == dataset / "derivatives/strip/sub-01/anat/sub-01_desc-brain_mask.nii.gz"
    )
    assert cases["sub-02_ses-b"].mask is None and cases["sub-02_ses-b"].label is None
    anat = dataset / "sub-03" / "anat"
    assert cases["sub-03"].channels == {
        "flair": anat / "sub-03_run-2_FLAIR.nii.gz",
        "t1": anat / "sub-03_T1w.nii.gz",
        "t1ce": anat / "sub-03_ce-gad_T1w.nii.gz",
    }
    assert told == [
        "sub-03: 2 files for flair; sub-03_run-2_FLAIR.nii.gz is taken, not sub-03_run-10_FLAIR.nii.gz."
    ]


def test_a_bids_data_set_is_found_as_a_cohort(dataset: Path, cache: Path) -> None:
    (dataset / "sub-04" / "anat").mkdir(parents=True)
    (dataset / "splits.csv").write_text(
        "case,split\nsub-01,test\nsub-02_ses-a,train\nsub-02_ses-b,train\nsub-03,val\n"
    )
    cases = find_cases(dataset)
    assert [(case.name, case.split) for case in cases] == [
        ("sub-01", "test"),
        ("sub-02_ses-a", "train"),
        ("sub-02_ses-b", "train"),
        ("sub-03", "val"),
    ]
    assert cases[0].label and cases[0].mask and [len(case.notes) for case in cases] == [0, 0, 0, 1]
    trained = anomri.train(
        dataset, dataset.parent / "model", preset="tiny", training={"steps": 2}, cache=cache
    )
    assert trained.spec.channels == ("flair", "t1") and trained.splits["sub-02"] == "train"
    (patient,) = anomri.evaluate(dataset, model=trained, split="test").patients
    assert patient.case == "sub-01"


@pytest.mark.parametrize(
    "place",
    [
        "derivatives/les/sub-03/anat/sub-03_space-FLAIR_label-WMH_mask",
        "derivatives/les/sub-03/anat/sub-03_label-L_desc-T1lesion_mask",
        "derivatives/sub-03/sub-03_msk",
        "sub-03/anat/sub-03_label-lesion_roi",
        "sub-03/anat/sub-03_FLAIR_roi",
        "derivatives/hand/sub-03/anat/sub-03_seg-manual_mask",
        "derivatives/hand/sub-03/anat/sub-03_desc-gt_mask",
    ],
)
def test_a_file_that_may_be_a_label_but_is_not_read_as_one_is_refused_by_name(
    dataset: Path, place: str
) -> None:
    other = dataset / "derivatives" / "other" / "sub-01" / "anat" / "sub-01_desc-tumour_mask.nii.gz"
    save(other, np.ones(SHAPE, np.uint8))
    assert len(find_cases(dataset)) == 4
    save(dataset / f"{place}.nii.gz", np.ones(SHAPE, np.uint8))
    with pytest.raises(
        AnomriError, match=rf"{Path(place).name}.*looks like the label of a lesion, but is not read"
    ):
        find_cases(dataset)


def test_a_participant_label_may_be_a_word_for_a_lesion(dataset: Path) -> None:
    for place in [dataset / "sub-03", *dataset.glob("derivatives/*/sub-03")]:
        for file in place.rglob("sub-03*"):
            file.rename(file.with_name(file.name.replace("sub-03", "sub-stroke3")))
        place.rename(place.with_name("sub-stroke3"))
    assert "sub-stroke3" in [case.name for case in find_cases(dataset)]


def test_a_folder_named_as_in_bids_may_have_another_layout(dataset: Path) -> None:
    other = describe(dataset.parent / "brats")
    for case in ("sub-1", "sub-2"):
        save(other / case / f"{case}_flair.nii.gz", np.ones(SHAPE, np.float32))
    assert [case.name for case in find_cases(other)] == ["sub-1", "sub-2"]


def test_labels_choose_participants_and_sessions(dataset: Path) -> None:
    chosen = bids_cases(dataset, participant_labels=["01", "sub-02"])
    assert [case.name for case in chosen] == ["sub-01", "sub-02_ses-a", "sub-02_ses-b"]
    assert [case.name for case in bids_cases(dataset, session_labels=["b"])] == ["sub-02_ses-b"]
    both = bids_cases(dataset, participant_labels=["01", "02"], session_labels=["ses-b"])
    assert [(case.name, len(case.channels)) for case in both] == [
        ("sub-01", 0),
        ("sub-02_ses-b", 2),
    ]


def test_the_channels_of_a_case_are_in_one_space(tmp_path: Path) -> None:
    root = describe(tmp_path / "prep", DatasetType="derivative", GeneratedBy=[{"Name": "prep"}])
    anat = root / "sub-1" / "anat"
    names = ("desc-preproc_T1w", "desc-preproc_FLAIR", "desc-brain_mask", "desc-anomaly_FLAIR")
    for name in (
        *names,
        *(f"space-T1w_{name}" for name in names[1:]),
        "space-MNI_res-1_desc-preproc_T1w",
    ):
        anat.mkdir(parents=True, exist_ok=True)
        (anat / f"sub-1_{name}.nii.gz").touch()
    (case,) = bids_cases(root, channels=("flair", "t1"))
    assert case.channels["t1"].name == "sub-1_desc-preproc_T1w.nii.gz"
    assert case.channels["flair"].name == "sub-1_desc-preproc_FLAIR.nii.gz"
    (anat / "sub-1_desc-preproc_FLAIR.nii.gz").unlink()
    (anat / "sub-1_desc-brain_mask.nii.gz").unlink()
    (case,) = bids_cases(root, channels=("flair", "t1"))
    assert case.channels["t1"].name == "sub-1_desc-preproc_T1w.nii.gz"
    assert case.channels["flair"].name == "sub-1_space-T1w_desc-preproc_FLAIR.nii.gz"
    assert case.mask == anat / "sub-1_space-T1w_desc-brain_mask.nii.gz"


@pytest.mark.parametrize(
    ("images", "space"), [(("FLAIR",), "FLAIR"), (("FLAIR", "T1w"), "FLAIR"), (("T1w",), "T1w")]
)
def test_masks_and_labels_may_be_named_after_the_image_whose_grid_they_share(
    tmp_path: Path, images: tuple[str, ...], space: str
) -> None:
    root = describe(tmp_path / "in")
    add(root, "sub-01", 1, images=images, lesion=False)
    marks = root / "derivatives" / "hand" / "sub-01" / "anat"
    for of in ("T1w", "FLAIR"):
        save(marks / f"sub-01_space-{of}_label-lesion_mask.nii.gz", np.ones(SHAPE, np.uint8))
    save(marks / f"sub-01_space-{space}_desc-brain_mask.nii.gz", np.ones(SHAPE, np.uint8))
    (case,) = find_cases(root)
    assert case.label == marks / f"sub-01_space-{space}_label-lesion_mask.nii.gz"
    assert case.mask == marks / f"sub-01_space-{space}_desc-brain_mask.nii.gz"
    assert not case.notes


def test_a_pickle_in_the_data_set_is_not_loaded(dataset: Path) -> None:
    (dataset / ".ancpbids-dataset.pickle").write_bytes(b"cos\n_exit\n(I3\ntR.")
    assert len(bids_cases(dataset)) == 4


@pytest.mark.slow
def test_participants_run_one_by_one_and_then_the_group(dataset: Path, detector: Detector) -> None:
    out = dataset / "derivatives" / "anomri"
    assert errors(dataset) == []
    (first,) = run_participant(dataset, out, detector, participant_labels=["01"])
    assert first.error is None and first.summary
    written = sorted(path.name for path in (out / "sub-01" / "anat").iterdir())
    images = ("sub-01_desc-anomaly_FLAIR", "sub-01_desc-anomaly_dseg", "sub-01_desc-anomaly_mask")
    assert written == sorted(
        [f"{name}{end}" for name in images for end in (".json", ".nii.gz")] + [f"{images[1]}.tsv"]
    )
    before = (out / "sub-01" / "anat" / "sub-01_desc-anomaly_FLAIR.nii.gz").stat().st_mtime_ns
    (out / "README.md").write_text("Mine.\n")

    results = run_participant(dataset, out, detector, participant_labels=["02", "03"])
    assert [result.case for result in results] == ["sub-02_ses-a", "sub-02_ses-b", "sub-03"]
    assert not any(result.error for result in results)
    assert (out / "sub-02/ses-b/anat/sub-02_ses-b_desc-anomaly_mask.nii.gz").is_file()
    assert (
        out / "sub-01" / "anat" / "sub-01_desc-anomaly_FLAIR.nii.gz"
    ).stat().st_mtime_ns == before
    assert (out / "README.md").read_text() == "Mine.\n"

    report = run_group(out)
    assert report == out / "report.html" and "sub-02_ses-a" in report.read_text()
    columns, rows = read_tsv(out / "cases.tsv")
    assert [row[0] for row in rows] == ["sub-01", "sub-02_ses-a", "sub-02_ses-b", "sub-03"]
    assert {row[columns.index("status")] for row in rows} == {"done"}
    _, lesions = read_tsv(out / "lesions.tsv")
    of_first = first.summary["lesions"]
    assert (
        isinstance(of_first, list)
        and len([row for row in lesions if row[0] == "sub-01"]) == len(of_first) > 0
    )
    assert errors(out) == []
    assert errors(dataset) == []
    # What was written is no input of the next run.
    assert [case.label for case in bids_cases(dataset, participant_labels=["01"])] == [
        dataset / "derivatives/hand/sub-01/anat/sub-01_label-lesion_mask.nii.gz"
    ]


def test_a_participant_gets_images_sidecars_and_a_table(dataset: Path, detector: Detector) -> None:
    out = dataset.parent / "out"
    (result,) = run_participant(
        dataset, out, detector, participant_labels=["01"], skip_bids_validation=True
    )
    stem = str(out / "sub-01" / "anat" / "sub-01_desc-anomaly_")
    images = {kind: nib.load(f"{stem}{kind}.nii.gz") for kind in ("FLAIR", "mask", "dseg")}
    said = {kind: json.loads(Path(f"{stem}{kind}.json").read_text()) for kind in images}
    (case,) = bids_cases(dataset, participant_labels=["01"])
    detection = detector.detect(case)
    assert result.summary == detection.summary()
    for image in images.values():
        assert image.shape == SHAPE
        np.testing.assert_allclose(image.affine, AFFINE)
    geometry = detection.volume.geometry
    assert detection.mask is not None
    np.testing.assert_array_equal(
        images["FLAIR"].get_fdata(dtype=np.float32), geometry.native(detection.anomaly_map)
    )
    np.testing.assert_array_equal(
        np.asarray(images["mask"].dataobj), geometry.native(detection.mask)
    )

    reference = "bids:source:sub-01/anat/sub-01_FLAIR.nii.gz"
    assert said["FLAIR"]["Sources"] == [
        reference,
        "bids:source:sub-01/anat/sub-01_T1w.nii.gz",
        "bids:source:derivatives/strip/sub-01/anat/sub-01_desc-brain_mask.nii.gz",
    ]
    assert said["mask"]["Sources"] == ["bids::sub-01/anat/sub-01_desc-anomaly_FLAIR.nii.gz"]
    assert said["dseg"]["Sources"] == ["bids::sub-01/anat/sub-01_desc-anomaly_mask.nii.gz"]
    assert {sidecar["SpatialReference"] for sidecar in said.values()} == {reference}
    assert said["mask"]["Threshold"] == detector.spec.thresholds.threshold  # type: ignore[union-attr]
    for sidecar in said.values():
        for source in sidecar["Sources"]:
            folder, path = (
                (dataset, source[12:]) if source.startswith("bids:source:") else (out, source[6:])
            )
            assert (folder / path).is_file()

    columns, rows = read_tsv(Path(f"{stem}dseg.tsv"))
    counts = np.bincount(np.asarray(images["dseg"].dataobj).ravel())[1:]
    volumes = [float(row[columns.index("volume_mm3")]) for row in rows]
    np.testing.assert_allclose(volumes, counts * geometry.voxel_mm3, rtol=1e-3)

    description = json.loads((out / "dataset_description.json").read_text())
    assert (
        description["DatasetType"] == "derivative"
        and description["GeneratedBy"][0]["Name"] == "anomri"
    )
    assert description["DatasetLinks"] == {"source": "../in"}
    assert description["SourceDatasets"] == [{"URL": "../in", "DOI": "doi:10.0000/small"}]
    texts = [path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".md", ".tsv")]
    assert not any(str(dataset.parent) in text for text in texts)


def test_outputs_are_in_the_space_of_the_images(tmp_path: Path, detector: Detector) -> None:
    root = describe(tmp_path / "prep", DatasetType="derivative", GeneratedBy=[{"Name": "prep"}])
    add(
        root,
        "sub-1",
        5,
        lesion=False,
        images=("space-MNI152Lin_res-4_desc-x_FLAIR", "space-MNI152Lin_res-4_desc-x_T1w"),
    )
    run_participant(root, tmp_path / "out", detector, skip_bids_validation=True)
    assert (tmp_path / "out/sub-1/anat/sub-1_space-MNI152Lin_desc-anomaly_mask.nii.gz").is_file()
    assert errors(tmp_path / "out") == []


def test_a_model_without_threshold_writes_maps_only_and_other_channels_are_refused(
    dataset: Path, detector: Detector
) -> None:
    out = dataset.parent / "my out"
    bare = copy.copy(detector)
    bare.spec = replace(detector.spec, thresholds=None)
    (result,) = run_participant(
        dataset, out, bare, participant_labels=["01"], skip_bids_validation=True
    )
    assert result.error is None
    written = {path.name for path in (out / "sub-01" / "anat").iterdir()}
    assert written == {"sub-01_desc-anomaly_FLAIR.nii.gz", "sub-01_desc-anomaly_FLAIR.json"}
    assert run_group(out).is_file()
    assert errors(out) == []
    bare.spec, bare.channels = replace(detector.spec, channels=("pd",)), ("pd",)
    with pytest.raises(
        AnomriError, match="the model's channels are pd; in BIDS there are flair, t1, t1ce, t2"
    ):
        run_participant(dataset, out, bare)


def test_lesions_are_numbered_as_in_the_lesion_table() -> None:
    mask = np.zeros((9, 9, 9), bool)
    mask[0, 0, 0], mask[2:5, 2:5, 2:5], mask[7, 7, 7:9] = True, True, True
    numbered = lesion_labels(mask)
    assert [int((numbered == number).sum()) for number in (1, 2, 3)] == [27, 2, 1]
    assert not lesion_labels(np.zeros((3, 3, 3), bool)).any()


def test_a_case_that_lacks_a_channel_fails_and_the_others_go_on(
    dataset: Path, detector: Detector
) -> None:
    (dataset / "sub-01" / "anat" / "sub-01_T1w.nii.gz").unlink()
    (dataset / "sub-04" / "anat").mkdir(parents=True)
    out = dataset.parent / "out"
    labels = ["01", "03", "04"]
    ran = run_participant(
        dataset, out, detector, participant_labels=labels, skip_bids_validation=True
    )
    results = {result.case: result for result in ran}
    assert [result.error is None for result in ran] == [False, True, False]
    assert "sub-01: no image for channel t1 (*_T1w.nii.gz) in" in str(results["sub-01"].error)
    assert "channels found in one space: flair" in str(results["sub-01"].error)
    assert "sub-04: no image for channel flair (*_FLAIR.nii.gz), t1" in str(results["sub-04"].error)
    run_group(out)
    columns, rows = read_tsv(out / "cases.tsv")
    failed = {
        row[0]: row[columns.index("error")]
        for row in rows
        if row[columns.index("status")] == "failed"
    }
    assert list(failed) == ["sub-01", "sub-04"]
    assert errors(out) == []


def test_errors_of_a_data_set_say_what_to_do(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AnomriError, match="no participant 99; labels found: 01, 02, 03"):
        bids_cases(dataset, participant_labels=["99"])
    with pytest.raises(AnomriError, match="no session z; labels found: a, b"):
        bids_cases(dataset, session_labels=["z"])
    with pytest.raises(AnomriError, match=r"none/dataset_description.json: no such file"):
        bids_cases(tmp_path / "none")
    (tmp_path / "flat").mkdir()
    with pytest.raises(
        AnomriError, match=r"not a BIDS data set .found: nothing.; name another folder"
    ):
        bids_cases(tmp_path / "flat")
    prep = describe(tmp_path / "raw")
    (prep / "sub-1").mkdir()
    with pytest.raises(AnomriError, match=r"no image of any participant"):
        bids_cases(prep)
    save(
        prep / "derivatives/prep/sub-1/anat/sub-1_desc-preproc_T1w.nii.gz",
        np.ones((2, 2, 2), np.float32),
    )
    with pytest.raises(
        AnomriError, match=r"There is .*sub-1_desc-preproc_T1w.nii.gz: name that data set's folder"
    ):
        bids_cases(prep, participant_labels=["1"])
    (prep / "dataset_description.json").write_text("{")
    with pytest.raises(
        AnomriError, match=r"dataset_description.json: cannot be read as a JSON object"
    ):
        bids_cases(prep)
    (prep / "dataset_description.json").write_text("[]")
    with pytest.raises(AnomriError, match=r"cannot be read as a JSON object"):
        bids_cases(prep)
    monkeypatch.setitem(sys.modules, "ancpbids", None)
    with pytest.raises(AnomriError, match=re.escape(install_command("bids"))):
        bids_cases(dataset)


def test_files_of_others_are_not_overwritten(
    dataset: Path, detector: Detector, tmp_path: Path
) -> None:
    description = (dataset / "dataset_description.json").read_text()
    with pytest.raises(AnomriError, match="was not written by anomri"):
        run_participant(dataset, dataset, detector, skip_bids_validation=True)
    assert (dataset / "dataset_description.json").read_text() == description
    out = tmp_path / "out"
    run_participant(dataset, out, detector, participant_labels=["01"], skip_bids_validation=True)
    other = describe(tmp_path / "other")
    add(other, "sub-01", 8)
    with pytest.raises(AnomriError, match=r"holds results of .*'../in'.*not of ../other"):
        run_participant(other, out, detector, skip_bids_validation=True)
    facts = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**facts, "method": "thresholding"}))
    with pytest.raises(AnomriError, match="another model"):
        run_participant(dataset, out, detector, skip_bids_validation=True)


def test_finished_participants_run_again_only_if_they_changed(
    dataset: Path, detector: Detector
) -> None:
    out = dataset.parent / "out"
    anat, told = out / "sub-01" / "anat", list[str]()

    def run() -> int:
        told.clear()
        arguments = {"participant_labels": ["01", "03"], "skip_bids_validation": True}
        results = run_participant(
            dataset, out, detector, progress=lambda r, _: told.append(r.case), **arguments
        )  # type: ignore[arg-type]
        assert not any(result.error for result in results) and sorted(told) == ["sub-01", "sub-03"]
        return (anat / "sub-01_desc-anomaly_mask.nii.gz").stat().st_mtime_ns

    first = run()
    assert run() == first
    (anat / "sub-01_desc-anomaly_dseg.nii.gz").unlink()
    second = run()
    assert second > first and (anat / "sub-01_desc-anomaly_dseg.nii.gz").is_file()
    scan = dataset / "sub-01" / "anat" / "sub-01_FLAIR.nii.gz"
    scan.touch()
    assert run() == second
    scan.write_bytes(gzip.compress(gzip.decompress(scan.read_bytes()), 1))
    assert run() > second
    scan.write_bytes(b"no image")
    (failed,) = run_participant(
        dataset, out, detector, participant_labels=["01"], skip_bids_validation=True
    )
    assert failed.error and not list(anat.iterdir())


def test_group_needs_participants(tmp_path: Path) -> None:
    with pytest.raises(AnomriError, match="run the level participant first"):
        run_group(tmp_path)


def test_invalid_data_sets_are_refused(
    dataset: Path, detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dataset / "sub-01" / "anat" / "sub-01_notes.nii.gz").write_bytes(b"")
    told: list[str] = []
    if VALIDATOR is not None:
        with pytest.raises(
            AnomriError, match=r"is not valid BIDS: .*sub-01_notes.*--skip-bids-validation"
        ):
            run_participant(dataset, dataset.parent / "out", detector)
        assert not (dataset.parent / "out").exists()
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    validate(dataset, told.append)
    assert "was not validated" in told[0]


def test_participants_may_have_different_subsets_of_the_channels(
    dataset: Path, model_with_head: Path
) -> None:
    """With a model whose score has healthy maps, which `run.json` leaves out."""
    shutil.rmtree(dataset / "derivatives")
    (dataset / "sub-01" / "anat" / "sub-01_T1w.nii.gz").unlink()
    detector, out = Detector.load(model_with_head, "cpu"), dataset.parent / "out"
    detector.spec = replace(
        detector.spec,
        score=replace(detector.spec.score, kind="anomaly_probability", healthy_maps="x"),
    )
    for label in ("01", "03"):
        (result,) = run_participant(
            dataset, out, detector, participant_labels=[label], skip_bids_validation=True
        )
        assert result.error is None
    said = json.loads((out / "sub-01/anat/sub-01_desc-anomaly_mask.json").read_text())
    assert said["Threshold"] == detector.spec.subset_thresholds["flair"].threshold
    said = json.loads((out / "sub-01/anat/sub-01_desc-anomaly_FLAIR.json").read_text())
    assert said["Channels"] == ["flair"] and len(said["Sources"]) == 1


def test_the_bids_command_takes_the_options_of_detect(dataset: Path, model_with_head: Path) -> None:
    arguments = [
        "--sensitivity",
        "lowest",
        "--channels",
        "flair",
        "--min-volume",
        "5000",
        "--participant-label",
        "01",
    ]
    command = [
        "bids",
        str(dataset),
        str(dataset.parent / "out"),
        "participant",
        "-m",
        str(model_with_head),
    ]
    assert main([*command, *arguments, "--skip-bids-validation"]) == 0
    anat = dataset.parent / "out" / "sub-01" / "anat"
    said = json.loads((anat / "sub-01_desc-anomaly_mask.json").read_text())
    part = Detector.load(model_with_head).spec.subset_thresholds["flair"]
    assert said["VoxelFalsePositiveRate"] == part.false_positive_rate[-1]
    other = [*command, *arguments, "--skip-bids-validation", "--bias-correction"]
    assert main(other) == 2  # results of two preparations do not mix
    by_volume = [
        *command[:2],
        str(dataset.parent / "volume"),
        *command[3:],
        "--false-positive-ml",
        "0",
    ]
    assert main([*by_volume, "--participant-label", "01", "--skip-bids-validation"]) == 0
    sidecar = json.loads(
        (dataset.parent / "volume/sub-01/anat/sub-01_desc-anomaly_mask.json").read_text()
    )
    assert "VoxelFalsePositiveRate" not in sidecar and sidecar["FalsePositiveVolume"].startswith(
        "0"
    )
    assert json.loads((anat / "sub-01_desc-anomaly_FLAIR.json").read_text())["Channels"] == [
        "flair"
    ]
    columns, rows = read_tsv(anat / "sub-01_desc-anomaly_dseg.tsv")
    assert all(float(row[columns.index("volume_mm3")]) >= 5000 for row in rows)


# Files that belong together.

REC_MASKS = ("rec-a_desc-brain_mask", "rec-b_desc-brain_mask")


def entities_of(case: Case) -> dict[str, str | None]:
    files = {**case.channels, "mask": case.mask, "label": case.label}
    names = {what: path.name.split("_", 1)[1] for what, path in files.items() if path}
    return {what: name.removesuffix(".nii.gz") for what, name in names.items()}


def touch(root: Path, *names: str) -> None:
    """Empty files of sub-01: images in the data set, masks in its derivatives."""
    for name in names:
        folder = root / ("derivatives/hand" if name.endswith("mask") else "") / "sub-01" / "anat"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"sub-01_{name}.nii.gz").touch()


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (
            ["run-1_FLAIR", "run-2_FLAIR", "run-2_label-lesion_mask"],
            {"flair": "run-2_FLAIR", "label": "run-2_label-lesion_mask"},
        ),
        (
            ["run-1_FLAIR", "run-02_FLAIR", "run-2_desc-brain_mask"],
            {"flair": "run-02_FLAIR", "mask": "run-2_desc-brain_mask"},
        ),
        (
            ["acq-2d_FLAIR", "acq-3d_FLAIR", "acq-3d_desc-brain_mask", "acq-3d_label-lesion_mask"],
            {
                "flair": "acq-3d_FLAIR",
                "mask": "acq-3d_desc-brain_mask",
                "label": "acq-3d_label-lesion_mask",
            },
        ),
        (  # masks of both: the label says which image, and the image which mask
            ["rec-a_FLAIR", "rec-b_FLAIR", "rec-b_label-lesion_mask", *REC_MASKS],
            {
                "flair": "rec-b_FLAIR",
                "mask": "rec-b_desc-brain_mask",
                "label": "rec-b_label-lesion_mask",
            },
        ),
        (["run-2_FLAIR", "run-1_T1w", "run-2_T1w"], {"flair": "run-2_FLAIR", "t1": "run-2_T1w"}),
        (  # what names no run belongs to the image that names none
            ["FLAIR", "run-2_FLAIR", "label-lesion_mask"],
            {"flair": "FLAIR", "label": "label-lesion_mask"},
        ),
        (  # other sequences are called otherwise
            ["acq-2d_FLAIR", "acq-mprage_T1w", "acq-mprage_desc-brain_mask", "label-lesion_mask"],
            {
                "flair": "acq-2d_FLAIR",
                "t1": "acq-mprage_T1w",
                "mask": "acq-mprage_desc-brain_mask",
                "label": "label-lesion_mask",
            },
        ),
        (["part-imag_FLAIR", "part-mag_FLAIR", "part-phase_FLAIR"], {"flair": "part-mag_FLAIR"}),
        (
            ["echo-1_T1w", "echo-2_T1w", "echo-2_desc-brain_mask"],
            {"t1": "echo-2_T1w", "mask": "echo-2_desc-brain_mask"},
        ),
    ],
)
def test_images_mask_and_label_of_one_case_agree_in_their_entities(
    tmp_path: Path, names: list[str], taken: dict[str, str]
) -> None:
    root = describe(tmp_path / "in")
    touch(root, *names)
    (case,) = find_cases(root)
    assert entities_of(case) == taken and not case.problem
    (same,) = bids_cases(root)
    assert entities_of(same) == taken


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["run-1_FLAIR", "run-2_desc-brain_mask"], "run-2_desc-brain_mask.*sub-01_run-1_FLAIR"),
        (["run-1_FLAIR", "run-2_label-lesion_mask"], "run-2_label-lesion_mask.*sub-01_run-1_FLAIR"),
        (["FLAIR", "run-2_desc-brain_mask"], "run-2_desc-brain_mask.*sub-01_FLAIR"),
        (["acq-2d_FLAIR", "acq-3d_label-lesion_mask"], "acq-3d_label.*sub-01_acq-2d_FLAIR"),
        (["run-1_FLAIR", "run-2_T1w"], "run-1_FLAIR.*sub-01_run-2_T1w.*different runs"),
        (["run-1_FLAIR", "T1w", "run-2_desc-brain_mask"], "run-2_desc.*sub-01_run-1_FLAIR"),
        (
            ["run-1_FLAIR", "run-2_FLAIR", "label-lesion_mask"],
            "label-lesion_mask.*whether it belongs to sub-01_run-1_FLAIR.nii.gz or sub-01_run-2_FL",
        ),
        (  # the label is of one image, the mask of another
            ["run-1_FLAIR", "run-2_FLAIR", "run-1_desc-brain_mask", "run-2_label-lesion_mask"],
            "run-1_desc-brain_mask.*is the brain mask of another image than sub-01_run-2_FLAIR",
        ),
    ],
)
def test_files_of_different_images_are_refused_and_both_named(
    tmp_path: Path, names: list[str], message: str
) -> None:
    root = describe(tmp_path / "in")
    touch(root, *names)
    with pytest.raises(AnomriError, match=message):
        find_cases(root)


def test_a_mask_that_may_be_of_either_image_is_used_with_a_note(tmp_path: Path) -> None:
    root = describe(tmp_path / "in")
    touch(root, "run-1_FLAIR", "run-2_FLAIR", "desc-brain_mask")
    (case,) = find_cases(root)
    assert entities_of(case) == {"flair": "run-1_FLAIR", "mask": "desc-brain_mask"}
    assert "does not say whether it belongs to sub-01_run-1_FLAIR" in case.notes[-1]


def test_a_mask_that_names_no_session_is_not_used_without_a_note(tmp_path: Path) -> None:
    root = describe(tmp_path / "in")
    anat = root / "sub-01" / "ses-a" / "anat"
    anat.mkdir(parents=True)
    (anat / "sub-01_ses-a_FLAIR.nii.gz").touch()
    touch(root, "desc-brain_mask")
    (case,) = find_cases(root)
    assert case.mask is None
    assert case.notes == (
        "sub-01_ses-a: sub-01_desc-brain_mask.nii.gz is not used: its name says no session.",
    )


def test_masks_of_several_pipelines_are_named_with_their_folders(tmp_path: Path) -> None:
    root = describe(tmp_path / "in")
    touch(root, "FLAIR", "desc-brain_mask")
    shutil.copytree(root / "derivatives" / "hand", root / "derivatives" / "strip")
    (case,) = find_cases(root)
    assert case.mask and case.mask.parts[-4] == "hand"
    assert "derivatives/hand/sub-01" in case.notes[0] and "not " in case.notes[0]
    assert "derivatives/strip/sub-01" in case.notes[0]


def test_results_of_the_right_run_are_written_and_a_case_that_mixes_runs_fails_alone(
    dataset: Path, detector: Detector
) -> None:
    """Brain masks of half the brain: only the one of the image that is taken counts."""
    for run in (2, 10):
        inside = np.ones(SHAPE, np.uint8)
        if run == 10:
            inside[: SHAPE[0] // 2] = 0
        name = f"sub-03/anat/sub-03_run-{run}_desc-brain_mask.nii.gz"
        save(dataset / "derivatives" / "strip" / name, inside)
    anat = dataset / "derivatives" / "strip" / "sub-01" / "anat"
    mask = anat / "sub-01_desc-brain_mask.nii.gz"
    mask.rename(anat / "sub-01_run-2_desc-brain_mask.nii.gz")
    out = dataset.parent / "out"
    results = run_participant(
        dataset, out, detector, participant_labels=["01", "03"], skip_bids_validation=True
    )
    assert "is the brain mask of another image than sub-01_FLAIR" in str(results[0].error)
    assert results[1].error is None
    names = {path.name for path in results[1].files}
    assert "sub-03_run-2_desc-anomaly_FLAIR.nii.gz" in names
    (whole,) = bids_cases(dataset, participant_labels=["03"])
    without = detector.detect(replace(whole, mask=None))
    assert without.summary()["lesions"] == results[1].summary["lesions"]  # type: ignore[index]
