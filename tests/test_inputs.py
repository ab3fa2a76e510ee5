"""Scans as people have them: any header, channels on their own grids, files by name, DICOM
folders."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from anomri.cli import main
from anomri.errors import AnomriError
from anomri.evaluation.evaluate import evaluate
from anomri.model.detector import Detector
from anomri.reporting.viewer import find_scans, named_scans
from anomri.runs.detect import detect_cohort
from anomri.scans.case import Case, case_from_files
from anomri.scans.find import find_cases
from anomri.scans.intake import holds_dicom
from anomri.scans.nifti import read_image, read_values
from anomri.scans.read import read_volume
from phantom import LESION_MM, found_mm, places, scan, thresholding

TILT = Rotation.from_euler("xyz", [18, -9, 12], degrees=True).as_matrix()
STEEP = Rotation.from_euler("xyz", [38, 0, 0], degrees=True).as_matrix()


def grid(directions: np.ndarray, spacing: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The affine of a grid whose middle lies at the origin, but for 7 mm."""
    matrix = directions * np.asarray(spacing)
    return nib.affines.from_matvec(
        matrix, np.array([4, 5, -3]) - matrix @ ((np.array(shape) - 1) / 2)
    )


def flips(*signs: int) -> np.ndarray:
    return np.diag(signs).astype(float)


# name: directions, spacing in mm, shape, data type, slope, (qform code, sform code)
HEADERS: dict[
    str, tuple[np.ndarray, tuple[float, ...], tuple[int, ...], type, float, tuple[int, int]]
] = {
    "RAS int16": (flips(1, 1, 1), (3, 3, 3), (64, 72, 56), np.int16, 1, (1, 1)),
    "LAS uint8 with a slope": (flips(-1, 1, 1), (3, 3, 3), (64, 72, 56), np.uint8, 4.2, (1, 1)),
    "LPI float64": (flips(-1, -1, -1), (3, 3, 3), (64, 72, 56), np.float64, 1, (1, 1)),
    "LPS int16 with a slope": (flips(-1, -1, 1), (2, 3, 4), (96, 72, 42), np.int16, 0.25, (1, 1)),
    "thick slices": (flips(-1, 1, 1), (1.5, 1.5, 5), (128, 136, 30), np.int16, 1, (1, 1)),
    "sagittal slices": (
        np.array([[0.0, 0, 1], [-1, 0, 0], [0, 1, 0]]),
        (3, 3, 5),
        (72, 56, 36),
        np.int16,
        1,
        (1, 1),
    ),
    "coronal slices": (
        np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]),
        (3, 3, 5),
        (64, 56, 44),
        np.int16,
        1,
        (1, 1),
    ),
    "oblique": (TILT, (3, 3, 3), (72, 76, 64), np.int16, 1, (1, 1)),
    "oblique, thick slices": (
        TILT @ flips(-1, 1, 1),
        (2, 2, 5),
        (100, 108, 36),
        np.int16,
        1,
        (1, 1),
    ),
    "steep": (STEEP, (3, 3, 3), (64, 76, 68), np.float32, 1, (2, 2)),
    "sform alone": (TILT, (3, 3, 3), (72, 76, 64), np.float32, 1, (0, 2)),
    "qform alone": (TILT, (3, 3, 3), (72, 76, 64), np.float32, 1, (3, 0)),
    "one frame of 4D": (flips(1, -1, 1), (3, 3, 3), (64, 72, 56, 1), np.int16, 1, (1, 1)),
    "small voxels": (flips(-1, -1, 1), (0.9, 0.9, 6), (220, 230, 26), np.uint8, 5, (1, 4)),
}
KEPT = [
    "pixdim",
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
]
KEPT += ["qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", HEADERS)
def test_a_lesion_is_found_in_its_place_under_any_header(
    tmp_path: Path, name: str, suffix: str
) -> None:
    directions, spacing, shape, dtype, slope, codes = HEADERS[name]
    affine = grid(directions, spacing, shape[:3])
    # nibabel writes values as they are where the header gives a slope.
    image = nib.Nifti1Image(scan(shape[:3], affine).reshape(shape) / slope, None)
    image.header.set_data_dtype(dtype)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    image.header.set_slope_inter(slope, 0)
    nib.save(image, tmp_path / f"a_flair{suffix}")
    source = nib.load(tmp_path / f"a_flair{suffix}")
    detection = thresholding().detect(tmp_path / f"a_flair{suffix}")
    anomaly, mask = detection.save(tmp_path / "out")[:2]
    np.testing.assert_array_less(np.abs((found_mm(mask) - LESION_MM) @ directions), spacing)
    np.testing.assert_array_less(
        np.abs((np.array(detection.lesions[0].centroid_mm) - LESION_MM) @ directions), spacing
    )
    header = nib.load(anomaly).header
    assert nib.load(anomaly).shape == shape[:3]
    for field in KEPT:
        end = 4 if field == "pixdim" else None
        before, after = (np.atleast_1d(one[field])[:end] for one in (source.header, header))
        np.testing.assert_array_equal(after, before, err_msg=field)
    assert detection.summary()["notes"] == []


# Channels of one scan on grids of their own.


FLAIR = (flips(-1, -1, 1), (2.0, 2.0, 5.0), (110, 116, 30))
T1 = (TILT, (3.0, 3.0, 3.0), (80, 80, 68))


def two_grids(folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, (directions, spacing, shape) in {"flair": FLAIR, "t1": T1}.items():
        affine = grid(directions, spacing, shape)
        image = scan(shape, affine).astype(np.float32)
        if name == "t1":
            where = places(shape, affine)
            image = ((where[..., 0] + 200) * (np.abs(where) < 61).all(-1)).astype(
                np.float32
            )  # says where a voxel lies
        paths[name] = folder / f"a_{name}.nii.gz"
        nib.save(nib.Nifti1Image(image, affine), paths[name])
    return paths


def test_a_channel_on_another_grid_is_resampled_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = two_grids(tmp_path / "in")
    detector = thresholding("flair", "t1")
    volume = detector.read(paths)
    x = places(volume.geometry.canonical_shape, volume.geometry.canonical_affine)[..., 0]
    inside = (np.abs(places(volume.data[1].shape, volume.geometry.canonical_affine)) < 54).all(-1)
    np.testing.assert_allclose(volume.data[1][inside], x[inside] + 200, atol=1e-2)
    (note,) = volume.notes
    assert (
        "a_t1.nii.gz lies on another grid than a_flair.nii.gz (80 x 80 x 68 voxels of 3 x 3 x 3 mm instead of"
        in note
    )
    assert "mm apart" in note
    detector.save(tmp_path / "m")
    out = tmp_path / "out"
    assert (
        main(
            [
                "detect",
                *(f"--{k}={v}" for k, v in paths.items()),
                "-o",
                str(out),
                "-m",
                str(tmp_path / "m"),
            ]
        )
        == 0
    )
    assert f"note: a: {note}" in capsys.readouterr().err.replace("\n", " ")
    assert json.loads((out / "a.json").read_text())["notes"] == [note]
    assert (out / "cases.tsv").read_text().splitlines()[1].endswith(note)
    assert nib.load(out / "a_anomaly.nii.gz").shape == FLAIR[2]
    np.testing.assert_array_less(np.abs(found_mm(out / "a_mask.nii.gz") - LESION_MM), FLAIR[1])


def test_a_mask_is_resampled_by_the_nearest_voxel_and_a_label_is_not(tmp_path: Path) -> None:
    two_grids(tmp_path)
    affine = grid(*T1)
    where = places(T1[2], affine)
    mask = nib.Nifti1Image(((where**2).sum(-1) < 60**2).astype(np.uint8), affine)
    nib.save(mask, tmp_path / "a_mask.nii.gz")
    (case,) = find_cases(tmp_path)
    volume = thresholding("flair").read(case)
    there = places(volume.geometry.canonical_shape, volume.geometry.canonical_affine)
    assert 57**2 < (there[volume.data[0] > 0] ** 2).sum(-1).max() < 63**2
    assert len(volume.notes) == 1
    with pytest.raises(AnomriError, match="lies? on one grid"):
        read_volume(case, ["flair"])  # training takes no scan that it has to resample
    nib.save(mask, tmp_path / "a_seg.nii.gz")
    (labelled,) = find_cases(tmp_path)
    without = thresholding("flair").read(labelled)
    assert without.label is None and "its label was left out: " in without.notes[-1]
    with pytest.raises(AnomriError, match=r"a_seg.nii.gz: .* lie on one grid"):
        evaluate([labelled], model=thresholding("flair"))


def test_the_same_grid_in_another_orientation_is_turned_exactly(tmp_path: Path) -> None:
    affine = grid(flips(-1, -1, 1), (3, 3, 3), (64, 72, 56))
    image = nib.Nifti1Image(scan((64, 72, 56), affine).astype(np.float32), affine)
    nib.save(image, tmp_path / "a_flair.nii.gz")
    nib.save(nib.as_closest_canonical(image), tmp_path / "a_t1.nii.gz")
    volume = thresholding("flair", "t1").read(tmp_path)
    np.testing.assert_array_equal(volume.data[0], volume.data[1])
    assert volume.notes == ()


def test_images_that_do_not_overlap_are_an_error(tmp_path: Path) -> None:
    paths = two_grids(tmp_path)
    image = nib.load(paths["t1"])
    affine = image.affine.copy()
    affine[0, 3] += 900
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), affine), paths["t1"])
    with pytest.raises(
        AnomriError,
        match="a_t1.nii.gz: does not overlap with a_flair.nii.gz",
    ):
        thresholding("flair", "t1").detect(paths)


# Files by name.


def test_a_case_given_as_files_is_named_after_them(tmp_path: Path) -> None:
    for name in ("p7_flair.nii.gz", "other.nii", "T1.nii.gz"):
        (tmp_path / name).touch()
    assert (
        case_from_files({"FLAIR": tmp_path / "p7_flair.nii.gz", "t1": tmp_path / "other.nii"}).name
        == "p7"
    )
    assert case_from_files({"t1": str(tmp_path / "other.nii")}).name == "other"
    assert case_from_files({"t1": tmp_path / "T1.nii.gz"}).name == tmp_path.name
    assert (
        case_from_files({"t1": tmp_path / "T1.nii.gz", "mask": tmp_path / "other.nii"}).mask
        == tmp_path / "other.nii"
    )
    for files, message in (
        ({}, "no channel"),
        ({"t1": tmp_path}, "has to be"),
        ({"t1": "gone.nii"}, "no such file"),
    ):
        with pytest.raises(AnomriError, match=message):
            case_from_files(files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either with -i, or a file for each channel"),
        (["-i", "IN", "--flair", "FLAIR"], "either with -i"),
        (["--channel", "flair"], "write it as name=value"),
        (["--channel", "a=x.nii", "--channel", "a=y.nii"], "a is given twice"),
        (["--flair", "FLAIR", "--series", "flair=x"], "for a folder of DICOM files"),
        (["--flair", "FLAIR", "--dicom-seg"], "for a folder of DICOM files"),
        (
            ["--flair", "FLAIR", "--brain-mask", "FLAIR", "--skull-strip"],
            "one of the two is enough",
        ),
        (["--t1", "FLAIR"], "flair is missing"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flair = two_grids(tmp_path / "in")["flair"]
    thresholding().save(tmp_path / "m")
    words = [
        {"IN": str(tmp_path / "in"), "FLAIR": str(flair)}.get(word, word) for word in arguments
    ]
    assert main(["detect", *words, "-o", str(tmp_path / "out"), "-m", str(tmp_path / "m")]) in (
        1,
        2,
    )
    assert message in " ".join(capsys.readouterr().err.split())


# DICOM.


def dicom_folder(folder: Path, **tags: str) -> np.ndarray:
    """A phantom as a FLAIR and a T1 series; returns the affine (column, row, slice) -> LPS mm."""
    pytest.importorskip("highdicom", reason="needs anomri[dicom]")
    from test_dicom import AXIAL, write_series

    shape = (64, 72, 26)
    affine = nib.affines.from_matvec(AXIAL * (3.0, 3.0, 5.0), [-94, -106, -62])
    data = scan(shape, np.diag([-1.0, -1, 1, 1]) @ affine).astype(np.int16)
    write_series(folder / "1", "Ax FLAIR", data, affine, **tags)
    write_series(
        folder / "2",
        "Sag T1",
        np.where(data > 0, 1400 - 7 * (data % 150), 0).astype(np.int16),
        affine,
        **tags,
    )
    return affine


def test_a_dicom_folder_is_detected_and_segmented(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    affine = dicom_folder(tmp_path / "in")
    assert holds_dicom(tmp_path / "in")
    thresholding("flair", "t1").save(tmp_path / "m")
    out = tmp_path / "out"
    arguments = ["-i", str(tmp_path / "in"), "-o", str(out), "-m", str(tmp_path / "m")]
    assert main(["detect", *arguments, "--dicom-seg"]) == 0
    said = capsys.readouterr().err
    assert "flair is the series 'Ax FLAIR'" in said
    (mask,) = out.glob("*_mask.nii.gz")
    name = mask.name.removesuffix("_mask.nii.gz")
    assert sorted(path.name for path in (out / "nifti").iterdir()) == [
        f"{name}_flair.nii.gz",
        f"{name}_t1.nii.gz",
    ]
    assert (
        "MARKER" not in name + (out / "cases.tsv").read_text() + (out / f"{name}.json").read_text()
    )
    np.testing.assert_array_less(np.abs(found_mm(mask) - LESION_MM), (3, 3, 5))
    # Read by pydicom alone; highdicom wrote it.
    import pydicom

    seg = pydicom.dcmread(out / f"{name}_mask.dcm")
    assert seg.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.4"
    frames = np.atleast_3d(seg.pixel_array).reshape(-1, seg.Rows, seg.Columns)
    assert frames.sum() == (np.asanyarray(nib.load(mask).dataobj) > 0).sum() > 0
    centres = []
    for frame, about in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        corner = np.array(about.PlanePositionSequence[0].ImagePositionPatient, float)
        rows, columns = np.nonzero(frame)
        centres.append(corner + np.stack([columns, rows, 0 * rows], 1) * [3, 3, 0])
    centre = np.concatenate(centres).mean(axis=0) * [-1, -1, 1]
    np.testing.assert_array_less(np.abs(centre - LESION_MM), (3, 3, 5))
    assert affine.shape == (4, 4)


def test_the_series_of_a_dicom_folder_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dicom_folder(tmp_path / "in")
    assert main(["list", str(tmp_path / "in")]) == 0
    shown = capsys.readouterr().out
    assert "a DICOM study; one case" in shown and "flair: 'Ax FLAIR' (26 slices" in shown
    assert main(["list", str(tmp_path / "in"), "-o", str(tmp_path / "x.tsv")]) == 2
    assert "holds DICOM files, which a table cannot list" in capsys.readouterr().err


def test_a_dicom_folder_that_holds_its_results_is_detected_again_and_viewed(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "in" / "out"
    dicom_folder(folder)
    thresholding("flair", "t1").save(tmp_path / "m")
    arguments = ["detect", "-i", str(folder), "-o", str(out), "-m", str(tmp_path / "m")]
    written = []
    for more in (["--dicom-seg"], ["--dicom-seg"], []):
        assert main([*arguments, *more]) == 0
        written.append({path.name: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")})
    assert written[0] == written[1] == written[2] and len(written[0]) == 5
    (name,) = (path.name.removesuffix("_mask.dcm") for path in out.glob("*_mask.dcm"))
    kinds = ("anomaly", "mask", "lesions", "flair", "t1")  # the last two are the converted scan
    assert {*written[0]} == {f"{name}_{kind}.nii.gz" for kind in kinds}
    for scans in (find_scans(out), named_scans(out, folder)):
        assert scans[name].channels["flair"] == out / "nifti" / f"{name}_flair.nii.gz"


def test_converted_scans_beside_dicom_are_taken(tmp_path: Path) -> None:
    dicom_folder(tmp_path)
    assert holds_dicom(tmp_path, tmp_path)
    (tmp_path / "s_mask.nii.gz").touch()
    assert not holds_dicom(tmp_path, tmp_path)
    (tmp_path / "s_anomaly.nii.gz").touch()
    assert holds_dicom(tmp_path, tmp_path) and not holds_dicom(tmp_path)
    (tmp_path / "s_flair.nii.gz").touch()
    assert not holds_dicom(tmp_path, tmp_path)
    (tmp_path / "out" / "nifti").mkdir(parents=True)
    assert find_scans(tmp_path / "out") == {}


def test_a_scan_is_viewed_under_the_name_of_its_detection(tmp_path: Path) -> None:
    (file := tmp_path / "scan_01.nii.gz").touch()
    detected = Detector.load(None).find_cases(file)
    (tmp_path / "scan_01_anomaly.nii.gz").touch()
    assert detected[0].name == "scan_01" and named_scans(tmp_path, file)["scan_01"].channels == {
        "01": file
    }


def test_dicom_series_are_named_and_identifiers_kept_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dicom_folder(tmp_path / "in")
    thresholding("flair").save(tmp_path / "m")
    arguments = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", str(tmp_path / "m")]
    assert main(["detect", *arguments, "--series", "flair=Sag T1", "--keep-identifiers"]) == 0
    (written,) = (tmp_path / "out" / "nifti").iterdir()
    assert written.name.startswith("MARKERID77-")
    assert np.asanyarray(nib.load(written).dataobj).max() == 1400
    capsys.readouterr()
    assert main(["detect", *arguments, "--series", "flair=nothing"]) == 2
    assert "MR series found" in capsys.readouterr().err
    (tmp_path / "in" / "stray_flair.nii.gz").touch()
    assert not holds_dicom(tmp_path / "in")


# A real scan on another grid.


def test_a_real_case_with_channels_on_different_grids_is_detected(
    real_scans: Path, tmp_path: Path
) -> None:
    (case,) = find_cases(real_scans / "stroke")
    detector = thresholding("flair", "t1", "t2")
    exact = detector.detect(case)
    assert exact.volume.notes == ()
    t1 = nib.load(case.channels["t1"])
    other = tmp_path / "T1.nii.gz"
    moved = t1.affine @ nib.affines.from_matvec(np.diag([1, 1, 2.0]), [0.3, -0.4, 0.5])
    from anomri.scans.resample import VoxelGrid, resample

    data = np.asanyarray(t1.dataobj).astype(np.float32)
    thick = resample(data, VoxelGrid(t1.shape, t1.affine), VoxelGrid((124, 160, 70), moved))
    nib.save(nib.Nifti1Image(thick, moved), other)
    mixed = detector.detect(Case("stroke", {**case.channels, "t1": other}))
    assert "T1.nii.gz lies on another grid than FLAIR.nii.gz" in mixed.volume.notes[0]
    np.testing.assert_array_equal(mixed.volume.data[0], exact.volume.data[0])
    assert np.corrcoef(mixed.volume.data[1].ravel(), exact.volume.data[1].ravel())[0, 1] > 0.97
    assert np.corrcoef(mixed.anomaly_map.ravel(), exact.anomaly_map.ravel())[0, 1] > 0.99
    anomaly = nib.load(mixed.save(tmp_path / "out")[0])
    np.testing.assert_array_equal(anomaly.affine, nib.load(case.channels["flair"]).affine)


def test_a_file_named_after_another_channel_is_refused_and_unused_channels_are_noted(
    model_with_head: Path, tmp_path: Path
) -> None:
    detector = Detector.load(model_with_head)
    brain = scan((64, 72, 56), grid(flips(1, 1, 1), (3, 3, 3), (64, 72, 56))).astype(np.float32)
    affine = grid(flips(1, 1, 1), (3, 3, 3), (64, 72, 56))
    paths = {
        name: tmp_path / f"p_{name}.nii.gz" for name in ("FLAIR", "T1w", "swi", "visit", "anomaly")
    }
    for path in paths.values():
        nib.save(nib.Nifti1Image(brain, affine), path)
    assert detector.read(paths["T1w"]).missing == ("flair",)
    with pytest.raises(AnomriError, match="trained on flair, t1, but the scan has swi"):
        detector.read(paths["swi"])
    with pytest.raises(AnomriError, match="trained on flair, t1, but the scan has anomaly"):
        detector.read(paths["anomaly"])
    with pytest.raises(AnomriError, match="trained on t1, but the scan has flair"):
        thresholding("t1").read(paths["FLAIR"])
    volume = detector.read(paths["visit"])
    assert volume.missing == ("t1",) and volume.notes[0].startswith(
        "p_visit.nii.gz is read as flair, because its name"
    )
    table = tmp_path / "one.tsv"
    table.write_text("case\tvisit\na\tp_visit.nii.gz\n")
    with pytest.raises(AnomriError, match="the scan has visit"):
        detector.read(table)
    notes = detector.read({"FLAIR": paths["FLAIR"], "swi": paths["swi"]}).notes
    assert (
        "has no t1" in notes[0] and notes[1] == "swi is not a channel of the model and is not used."
    )
    detector.spec = replace(detector.spec, score=replace(detector.spec.score, channels=("flair",)))
    assert (
        detector.read(paths["T1w"])
        .notes[-1]
        .startswith("the score is computed on flair; without, far fewer")
    )
    assert detector.read({"t1w": paths["T1w"], "flair": paths["FLAIR"]}).notes == ()


def test_a_header_without_codes_gives_a_note(tmp_path: Path) -> None:
    image = nib.Nifti1Image(
        scan((64, 72, 56), np.diag([3, 3, 3, 1])).astype(np.float32), np.diag([3, 3, 3, 1])
    )
    image.header.set_zooms((3, 3, 3))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "a_flair.nii.gz")
    (note,) = thresholding("flair").read(tmp_path / "a_flair.nii.gz").notes
    assert (
        note
        == "a_flair.nii.gz does not say how it lies (sform and qform code 0): left may be right. "
        "Its axes are taken to run to the left, to the front and up, with voxels of 3 x 3 x 3 mm "
        "by pixdim."
    )


@pytest.mark.parametrize("unsaid", ["t1", "mask", "flair"])
def test_an_image_without_header_codes_takes_the_geometry_of_the_one_beside_it(
    tmp_path: Path, unsaid: str
) -> None:
    affine = grid(flips(1, 1, 1), (3, 3, 3), (64, 72, 56))
    data = scan((64, 72, 56), affine)
    for name, values in {"flair": data, "t1": data, "mask": data > 0}.items():
        image = nib.Nifti1Image(values.astype(np.float32), affine)
        if name == unsaid:
            image.set_sform(None, 0)
            image.set_qform(None, 0)
        nib.save(image, tmp_path / f"a_{name}.nii.gz")
    volume = thresholding("flair", "t1").read(tmp_path)
    (flair, t1), reported = (
        volume.data,
        [note for note in volume.notes if "was taken to lie as" in note],
    )
    np.testing.assert_array_equal(flair, t1)
    assert (flair > 0).sum() == (data > 0).sum()
    assert reported and all(
        note.startswith(f"a_{unsaid}.nii.gz does not say how it lies") for note in reported
    )
    other = nib.Nifti1Image(data[:-2].astype(np.float32), None if unsaid == "t1" else affine)
    nib.save(other, tmp_path / "a_t1.nii.gz")
    if unsaid != "mask":
        with pytest.raises(
            AnomriError, match=f"a_t1.nii.gz: a_{unsaid}.nii.gz does not say how it lies"
        ):
            thresholding("flair", "t1").read(tmp_path)


def test_the_background_of_a_scaled_image_is_zero(tmp_path: Path) -> None:
    affine = np.diag([3, 3, 3, 1])
    for seed in range(4):
        data = scan((64, 72, 56), affine, seed=seed)
        data[32, 36, 28] = -7.3 - seed
        header = nib.Nifti1Header()
        header.set_data_dtype(np.int16)
        nib.save(nib.Nifti1Image(data, affine, header), tmp_path / "a_flair.nii.gz")
        stored = read_image(tmp_path / "a_flair.nii.gz")
        assert stored.dataobj.inter != 0
        found = read_values(stored)
        np.testing.assert_allclose(found, data, atol=stored.dataobj.slope)
        assert (found[data == 0] == 0).all()
        thresholding("flair").read(tmp_path)


def test_a_header_file_is_not_read_as_voxels(tmp_path: Path) -> None:
    path = tmp_path / "a_flair.nii"
    nib.save(nib.Nifti1Image(scan((64, 72, 56), np.eye(4)).astype(np.float32), np.eye(4)), path)
    content = bytearray(path.read_bytes())
    content[108:112] = np.float32(0).tobytes()
    path.write_bytes(content)
    with pytest.raises(AnomriError, match="places the image 0 bytes into the file"):
        read_image(path)


def test_another_scan_of_the_same_name_does_not_replace_results(tmp_path: Path) -> None:
    out, detector = tmp_path / "out", thresholding("flair")
    affine = grid(flips(1, 1, 1), (3, 3, 3), (64, 72, 56))
    for seed in (0, 1):
        folder = tmp_path / str(seed) / "pre"
        folder.mkdir(parents=True)
        data = scan((64, 72, 56), affine, seed=seed).astype(np.float32)
        nib.save(nib.Nifti1Image(data, affine), folder / "FLAIR.nii.gz")
    first, second = (detector.find_cases(tmp_path / name / "pre") for name in "01")
    assert [case.name for case in (*first, *second)] == ["pre", "pre"]
    detect_cohort(first, out, detector)
    before = (out / "pre_anomaly.nii.gz").read_bytes()
    with pytest.raises(AnomriError, match="the results of another scan that is called pre too"):
        detect_cohort(second, out, detector)
    assert (out / "pre_anomaly.nii.gz").read_bytes() == before
    # The same scan elsewhere, or another in the same place, is the same scan.
    moved = (tmp_path / "0").rename(tmp_path / "moved")
    detect_cohort(detector.find_cases(moved / "pre"), out, detector)
    (tmp_path / "1" / "pre" / "FLAIR.nii.gz").replace(moved / "pre" / "FLAIR.nii.gz")
    detect_cohort(detector.find_cases(moved / "pre"), out, detector)
    assert (out / "pre_anomaly.nii.gz").read_bytes() != before
    # Contents may lie elsewhere, behind a link; and two files in one folder are not one scan.
    store, link = tmp_path / "store", tmp_path / "link_flair.nii.gz"
    store.mkdir()
    for seed in (2, 3):
        nib.save(
            nib.Nifti1Image(scan((64, 72, 56), affine, seed=seed).astype(np.float32), affine),
            store / f"{seed}.nii.gz",
        )
        link.unlink(missing_ok=True)
        link.symlink_to(store / f"{seed}.nii.gz")
        detect_cohort([Case("one", {"flair": link})], out, detector)
    with pytest.raises(AnomriError, match="another scan that is called one too"):
        detect_cohort([Case("one", {"flair": store / "2.nii.gz"})], out, detector)


def test_cases_of_an_earlier_run_are_named(
    model_with_head: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("case7", "case8"):
        flair = cohort / name / f"{name}_flair.nii.gz"
        assert (
            main(["detect", "--flair", str(flair), "-m", str(model_with_head), "-o", str(tmp_path)])
            == 0
        )
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "has maps of case7 from another run; the tables and the report will be of this run alone"
        in said
    )
    report = (tmp_path / "report.html").read_text()
    own = Detector.load(model_with_head).spec.subset_thresholds["flair"].threshold
    assert f"Channels: flair. Threshold: {own:.4g} (" in report


@pytest.mark.parametrize("mm", [1e-3, 1e3])
def test_a_header_that_is_not_in_mm_is_refused(tmp_path: Path, mm: float) -> None:
    image = nib.Nifti1Image(
        scan((64, 72, 56), np.diag([3, 3, 3, 1])).astype(np.float32), np.diag([mm, mm, mm, 1])
    )
    nib.save(image, tmp_path / "a_flair.nii.gz")
    with pytest.raises(
        AnomriError, match="a_flair.nii.gz: its header gives voxels of .* Correct the header"
    ):
        thresholding("flair").read(tmp_path / "a_flair.nii.gz")


def test_a_study_as_anonymisers_leave_it_is_detected_and_no_name_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No preamble, no meta information, a name where a number or a date belongs, no description."""
    dicom_folder(tmp_path / "in")
    import pydicom

    from test_dicom import strip_file

    for path in sorted((tmp_path / "in").rglob("*")):
        if path.is_file():
            one = pydicom.dcmread(path)
            one.SeriesDescription = "SE 5"
            one.EchoTime, one.RepetitionTime = (9, 550) if path.parent.name == "2" else (100, 5000)
            one.StudyTime, one.ImagingFrequency = "123456.789", "123456.789"
            one.save_as(path)
            strip_file(path, "explicit")
            path.write_bytes(path.read_bytes().replace(b"123456.789", b"MARKER^ANN"))
    thresholding("t2", "t1").save(tmp_path / "m")
    arguments = ["-i", str(tmp_path / "in"), "-m", str(tmp_path / "m"), "--dicom-seg"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["detect", *arguments, "-o", str(tmp_path / "out")]) == 0
        assert main(["list", str(tmp_path / "in")]) == 0
    printed = "".join(capfd.readouterr())
    assert "MARKER" not in printed and "Invalid value" not in printed
    assert "taken for t1, guessed from its echo time 9 ms" in " ".join(printed.split())
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and path.suffix != ".dcm":  # a SEG has its study's patient module
            assert b"MARKER" not in path.read_bytes()
    (seg,) = (tmp_path / "out").glob("*_mask.dcm")
    assert b"MARKER^ANN" not in seg.read_bytes()
    (mask,) = (tmp_path / "out").glob("*_mask.nii.gz")
    np.testing.assert_array_less(np.abs(found_mm(mask) - LESION_MM), (3, 3, 5))
