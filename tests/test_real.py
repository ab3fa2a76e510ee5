"""The real scans, where they are at hand: the data flow end to end on one patient."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import anomri
from anomri.evaluation.evaluate import evaluate
from anomri.scans.case import common_channels
from anomri.scans.find import find_cases
from anomri.scans.read import read_volume
from anomri.slices import slice_volume


def test_the_real_cohort_is_found_with_its_splits(real_scans: Path) -> None:
    cases = find_cases(real_scans / "brats18")
    assert common_channels(cases) == ("flair", "t1", "t1ce", "t2")
    assert [sum(case.split == split for case in cases) for split in ("train", "val", "test")] == [
        20,
        3,
        5,
    ]
    assert all(case.label is not None for case in cases)


def test_a_real_scan_is_cut_as_published(real_scans: Path) -> None:
    case = find_cases(real_scans / "brats18" / "Brats18_2013_11_1")[0]
    stack = slice_volume(read_volume(case, common_channels([case])))
    assert stack.index == range(2, 144)
    assert stack.x.shape == (142, 4, 128, 128)
    # Every channel's 99th percentile is 1 before slices are shrunk.
    assert 0.9 < float(stack.x[:, 0][stack.foreground].quantile(0.99)) < 1.1


@pytest.mark.slow
def test_real_patients_are_trained_on_detected_and_evaluated(
    real_scans: Path, tmp_path: Path
) -> None:
    for name in ("Brats18_CBICA_ABM_1", "Brats18_CBICA_APZ_1", "Brats18_TCIA10_639_1"):
        shutil.copytree(real_scans / "brats18" / name, tmp_path / "cohort" / name)
    shutil.copy(real_scans / "brats18" / "splits.csv", tmp_path / "cohort")
    anomri.train(
        tmp_path / "cohort", tmp_path / "m", preset="tiny", cache=tmp_path / "cache", device="cpu"
    )
    evaluation = evaluate(tmp_path / "cohort", tmp_path / "ev", model=tmp_path / "m")
    # A network of a few seconds is no detector yet, but far better than chance (the lesion's share
    # of voxels).
    patient = evaluation.patients[0]
    assert patient.case == "Brats18_TCIA10_639_1"
    assert patient.average_precision > 0.3
    detection = anomri.load(tmp_path / "m").detect(tmp_path / "cohort" / patient.case)
    written = detection.save(tmp_path / "out")
    source = nib.load(tmp_path / "cohort" / patient.case / f"{patient.case}_flair.nii.gz")
    header = nib.load(written[0]).header
    for field in (
        "qform_code",
        "sform_code",
        "srow_x",
        "srow_y",
        "srow_z",
        "qoffset_y",
        "pixdim",
        "xyzt_units",
    ):
        np.testing.assert_array_equal(header[field], source.header[field], err_msg=field)


@pytest.mark.slow
def test_another_grid_and_bit_depth_are_handled(real_scans: Path, tmp_path: Path) -> None:
    """The stroke subject: oblique, 124 x 160 x 140, 8 bit, channels named FLAIR.nii.gz, no case
    name."""
    (case,) = find_cases(real_scans / "stroke")
    assert (case.name, sorted(case.channels)) == ("stroke", ["flair", "t1", "t2"])
    shutil.copytree(real_scans / "stroke", tmp_path / "cohort" / "b")
    shutil.copytree(real_scans / "stroke", tmp_path / "cohort" / "a")
    arguments = {
        "preset": "tiny",
        "training": {"steps": 10},
        "cache": tmp_path / "cache",
        "device": "cpu",
    }
    detector = anomri.train(tmp_path / "cohort", tmp_path / "m", **arguments)
    detection = detector.detect(case)
    assert 0 < detection.anomaly_map.max() < 10
    written = detection.save(tmp_path / "out")
    source, anomaly = nib.load(case.channels["flair"]), nib.load(written[0])
    assert anomaly.shape == source.shape
    np.testing.assert_array_equal(anomaly.affine, source.affine)
    # Nothing is scored outside the brain.
    outside = np.asarray(source.dataobj) == 0
    assert np.mean(anomaly.get_fdata()[outside] > 0) < 0.02
