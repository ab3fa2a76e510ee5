"""DICOM in and out: series built here slice by slice, checked in scanner mm, and every damaged
folder named."""

import gzip
import logging
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine

from anomri.errors import AnomriError
from anomri.optional import install_command
from anomri.scans.case import Case, case_from_files
from anomri.scans.dicom.channels import Series, guess_channel
from anomri.scans.dicom.files import quiet
from anomri.scans.dicom.find import MIN_SLICES, choose_series, find_series
from anomri.scans.dicom.read import convert
from anomri.scans.dicom.seg import PATIENT_AND_STUDY, write_segmentation
from anomri.scans.find import find_cases
from anomri.scans.intake import holds_dicom
from anomri.scans.read import read_volume
from anomri.scans.volume import Volume

pydicom = pytest.importorskip("pydicom", reason="needs anomri[dicom]")
pytest.importorskip("dicom2nifti", reason="needs anomri[dicom]")
from pydicom.dataset import FileDataset, FileMetaDataset  # noqa: E402 - only where the extra is installed
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid  # noqa: E402

MR = "1.2.840.10008.5.1.4.1.1.4"
STUDY = generate_uid(entropy_srcs=["study"])
SECRETS = {
    "PatientName": "MARKERNAME^GIVEN",
    "PatientID": "MARKERID77",
    "PatientBirthDate": "19010203",
    "PatientAddress": "MARKERSTREET",
    "OtherPatientIDs": "MARKEROTHER",
    "AccessionNumber": "MARKERACC",
    "InstitutionName": "MARKERINST",
    "ReferringPhysicianName": "MARKERDOC",
    "PatientComments": "MARKERCOMMENT",
    "StudyDate": "19990807",
}
# Pixels a slice in eights: GDCM leaves the last pixels of a binary SEG undefined where they fill no
# whole byte.
COLUMNS, ROWS, SLICES = 8, 7, 12


def rotation(x: float, y: float, z: float) -> np.ndarray:
    out = np.eye(3)
    for axis, degrees in enumerate((x, y, z)):
        (c, s), (i, j) = (
            (np.cos(np.radians(degrees)), np.sin(np.radians(degrees))),
            [a for a in range(3) if a != axis],
        )
        turn = np.eye(3)
        turn[i, i], turn[j, j], turn[i, j], turn[j, i] = c, c, -s, s
        out = turn @ out
    return out


# Directions in LPS of a row (rising column), a column (rising row) and the slices.
AXIAL = np.eye(3)
SAGITTAL = np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0]], float)
CORONAL = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float)
PLANES = {
    "axial": AXIAL,
    "axial from the top": AXIAL * [1, 1, -1],
    "sagittal": SAGITTAL,
    "sagittal from the left": SAGITTAL * [1, 1, -1],
    "coronal": CORONAL,
    "oblique": rotation(20, -15, 10) @ AXIAL,
    "oblique sagittal": rotation(12, 25, -30) @ SAGITTAL,
    "feet first": AXIAL * [-1, 1, -1],
}


def lps_affine(
    directions: np.ndarray = AXIAL, spacing: tuple[float, float, float] = (0.9, 1.1, 5.0)
) -> np.ndarray:
    return nib.affines.from_matvec(directions * spacing, [-31.5, -22.25, 14.75])


def voxels(seed: int = 0, slices: int = SLICES) -> np.ndarray:
    """Stored values (column, row, slice)."""
    return (
        np.random.default_rng(seed).integers(-100, 3000, (COLUMNS, ROWS, slices)).astype(np.int16)
    )


def one_slice(
    data: np.ndarray, affine: np.ndarray, number: int, series: str, **tags: Any
) -> FileDataset:
    """Slice ``number`` of ``data`` (column, row, slice) as an MR image."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = (
        tags.get("SOPClassUID", MR),
        ExplicitVRLittleEndian,
    )
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(number)])
    one = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    one.SOPClassUID, one.SOPInstanceUID = MR, meta.MediaStorageSOPInstanceUID
    one.Modality, one.StudyInstanceUID, one.SeriesInstanceUID = (
        "MR",
        STUDY,
        generate_uid(entropy_srcs=[series]),
    )
    one.FrameOfReferenceUID, one.SeriesDescription = generate_uid(entropy_srcs=["frame"]), series
    one.PatientSex, one.StudyTime, one.StudyID, one.SeriesNumber, one.Manufacturer = (
        "O",
        "120000",
        "1",
        4,
        "Maker",
    )
    one.PositionReferenceIndicator, one.Laterality = "", ""
    one.InstanceNumber, one.ImageType = number + 1, ["ORIGINAL", "PRIMARY", "M"]
    one.RepetitionTime, one.ScanningSequence = 9000, "SE"
    one.ImageOrientationPatient = [
        f"{v:.10g}" for a in (0, 1) for v in affine[:3, a] / np.linalg.norm(affine[:3, a])
    ]
    one.ImagePositionPatient = [f"{v:.10g}" for v in apply_affine(affine, [0, 0, number])]
    columns, rows, slices = np.linalg.norm(affine[:3, :3], axis=0)
    one.PixelSpacing, one.SliceThickness = [f"{rows:.10g}", f"{columns:.10g}"], f"{slices:.10g}"
    one.Columns, one.Rows, one.SamplesPerPixel, one.PhotometricInterpretation = (
        *data.shape[:2],
        1,
        "MONOCHROME2",
    )
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
    one.PixelData = np.ascontiguousarray(data[:, :, number].T).tobytes()
    for keyword, value in {**SECRETS, **tags}.items():
        setattr(one, keyword, value)
    return one


def save(one: FileDataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    one.save_as(path, enforce_file_format=True)
    return path


def write_series(
    folder: Path,
    series: str = "Ax FLAIR",
    data: np.ndarray | None = None,
    affine: np.ndarray | None = None,
    **tags: Any,
) -> list[Path]:
    """Write a series with names that say nothing about the order of its slices; returns them in
    that order."""
    data, affine = voxels() if data is None else data, lps_affine() if affine is None else affine
    names = np.random.default_rng(1).permutation(data.shape[2])
    return [
        save(one_slice(data, affine, k, series, **tags), folder / f"{series[:2]}{names[k]:03d}")
        for k in range(data.shape[2])
    ]


def by_position(image: nib.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """Voxel centres in LPS mm (n, 3) and their values."""
    centres = apply_affine(image.affine, np.indices(image.shape).reshape(3, -1).T) * [-1, -1, 1]
    return centres, image.get_fdata(dtype=np.float64).ravel()


@pytest.mark.parametrize("maker", ["Maker", "SIEMENS", "GE MEDICAL SYSTEMS", "Philips"])
@pytest.mark.parametrize("plane", PLANES)
def test_every_voxel_lies_where_it_was_scanned(tmp_path: Path, plane: str, maker: str) -> None:
    data, affine = voxels(), lps_affine(PLANES[plane])
    write_series(tmp_path / "in", data=data, affine=affine, Manufacturer=maker)
    image = nib.load(convert(tmp_path / "in", tmp_path / "out").channels["flair"])
    assert image.get_data_dtype() == np.int16
    where, values = by_position(image)
    index = apply_affine(np.linalg.inv(affine), where)
    np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
    assert len({tuple(i) for i in np.rint(index)}) == data.size
    np.testing.assert_array_equal(values, data[tuple(np.rint(index).astype(int).T)])
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
    assert image.header["qform_code"] == image.header["sform_code"] == 1


def test_two_series_in_one_folder_are_read_whatever_their_scaling_and_order(tmp_path: Path) -> None:
    flair, t1 = voxels(1), voxels(2, 14)
    write_series(
        tmp_path, "Ax FLAIR", flair, RescaleSlope="0.37", RescaleIntercept="-12.5", EchoTime=90
    )
    for k, path in enumerate(write_series(tmp_path, "T1 MPRAGE", t1, EchoTime=3)):
        one = pydicom.dcmread(path)
        one.InstanceNumber = (k * 5) % 14 + 1  # interleaved, as acquired
        save(one, path)
    (tmp_path / "notes.txt").write_text("not DICOM")
    reported: list[str] = []
    series = find_series(tmp_path, reported.append)
    assert [(s.description, s.slices, s.modality) for s in series] == [
        ("Ax FLAIR", 12, "MR"),
        ("T1 MPRAGE", 14, "MR"),
    ]
    assert len(reported) == 1 and "notes.txt" in reported[0]
    case = convert(tmp_path, tmp_path / "out")
    assert sorted(case.channels) == ["flair", "t1"]
    image = nib.load(case.channels["flair"])
    assert image.get_data_dtype() == np.float32
    np.testing.assert_allclose(image.get_fdata(), flair * 0.37 - 12.5, rtol=1e-6, atol=1e-4)
    np.testing.assert_array_equal(nib.load(case.channels["t1"]).get_fdata(), t1)
    # Written as a case that the rest of the package reads: DICOM's own axes are the working
    # orientation. Values below zero count as background.
    np.testing.assert_array_equal(read_volume(case, ["t1"]).data[0], np.maximum(t1, 0))


def test_unsigned_and_compressed_values_are_read(tmp_path: Path) -> None:
    data = np.random.default_rng(3).integers(0, 65536, (COLUMNS, ROWS, SLICES)).astype(np.uint16)
    for path in write_series(tmp_path / "in", data=data, PixelRepresentation=0):
        one = pydicom.dcmread(path)
        one.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        save(one, path)
    image = nib.load(convert(tmp_path / "in", tmp_path / "out").channels["flair"])
    assert image.get_data_dtype() == np.uint16
    np.testing.assert_array_equal(image.get_fdata(), data)


def test_the_image_equals_that_of_another_dicom_reader(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    affine = lps_affine(PLANES["oblique"])
    files = write_series(tmp_path / "in", affine=affine)
    itk = sitk.ReadImage([str(path) for path in files])
    case = convert(tmp_path / "in", tmp_path / "out")
    image = nib.load(case.channels["flair"])
    for index in [(0, 0, 0), (7, 0, 3), (2, 6, 11)]:
        place = apply_affine(image.affine, index) * [-1, -1, 1]
        there = itk.TransformPhysicalPointToIndex(place.tolist())
        assert itk.GetPixel(there) == image.get_fdata()[index]


def series(text: str, **kwargs: Any) -> Series:
    files = tuple(Path(str(k)) for k in range(20))
    return Series("1.2", "1.1", text, kwargs.pop("protocol", ""), "MR", files, **kwargs)


@pytest.mark.parametrize(
    ("text", "headers", "channel"),
    [
        ("Ax T2 FLAIR", {}, "flair"),
        ("t2_tirm_tra_dark-fluid", {"inversion_time": 2500, "echo_time": 85}, "flair"),
        ("t2_spc_da-fl_sag_p2_iso", {}, "flair"),
        ("FLAIR 3D", {"inversion_time": 750}, None),
        ("Ax T1 FLAIR", {}, None),
        ("t1_mprage_sag", {"echo_time": 2.5, "inversion_time": 900, "gradient_echo": True}, "t1"),
        ("Sag 3D BRAVO", {"agent": ""}, "t1"),
        ("t1_mprage_sag_post", {}, "t1ce"),
        ("AX T1 POST GD", {"agent": "GADAVIST"}, "t1ce"),
        ("AX T1 +C", {}, "t1ce"),
        ("t1ce", {}, "t1ce"),
        ("T1 MPRAGE", {"agent": "Dotarem"}, "t1ce"),
        ("T1 MPRAGE", {"agent": "NONE"}, "t1"),
        ("T1 pre", {"agent": "Dotarem"}, None),
        ("T1 pre contrast", {}, "t1"),
        ("T1 non-contrast", {}, "t1"),
        ("T1 w/o contrast", {}, "t1"),
        ("T1 pre and post contrast", {}, None),
        ("T1 post-op", {}, "t1"),
        ("T1_post_op", {}, "t1"),
        ("AX T1 POSTCONTRAST", {}, "t1ce"),
        ("T1 postgado", {}, "t1ce"),
        ("MPRAGEpost", {}, "t1ce"),
        ("t1_post_3d", {}, "t1ce"),
        ("T1 precontrast", {}, "t1"),
        ("T1 precontrast", {"agent": "Dotarem"}, None),
        ("T1 C-", {}, "t1"),
        ("T1 -C", {}, "t1"),
        ("T1-C", {}, None),
        ("T1 w/wo contrast", {}, None),
        ("T1 with and without contrast", {}, None),
        ("t1w without contrast", {}, "t1"),
        ("T1w w/o", {}, "t1"),
        ("T1 cor", {"echo_time": 95}, None),
        ("t1_tse_dark", {"protocol": "BRAIN T2 FLAIR WITH CONTRAST"}, "t1"),
        ("", {"protocol": "t2_tse_tra"}, "t2"),
        ("t2_tse_tra", {"echo_time": 100}, "t2"),
        ("AX T2 FSE", {"echo_time": 15}, None),
        ("t2_tse", {"inversion_time": 2500}, None),
        ("t2_fl2d_hemo", {"gradient_echo": True}, None),
        ("AX T2* GRE", {}, None),
        ("T2 star", {}, None),
        ("PD T2 TSE", {}, None),
        ("ep2d_dwi_t2", {}, None),
        ("t2 spine sag", {}, None),
        ("T1 T2 mapping", {}, None),
        ("MP2RAGE UNI t1", {}, None),
        ("3-plane", {}, None),
        ("", {}, None),
        ("st12", {}, None),
    ],
)
def test_a_channel_is_guessed_only_if_no_header_contradicts_it(
    text: str, headers: dict, channel: str
) -> None:
    assert guess_channel(series(text, **headers)) == channel


def test_the_user_names_series_and_doubtful_ones_are_listed(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    (
        write_series(first, "T1 MPRAGE"),
        write_series(second, "T1 SPACE"),
        write_series(tmp_path / "3", "T1 SPACE again"),
    )
    with pytest.raises(
        AnomriError, match=r"t1 is 3 series(.|\n)*'T1 SPACE' \(12 slices, [\d.]+\): t1"
    ):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    uid = next(s.uid for s in find_series(tmp_path) if s.description == "T1 SPACE")
    for name in ("t1 space", uid):
        assert choose_series(tmp_path, {"t2": name})["t2"].uid == uid
    with pytest.raises(AnomriError, match="flair is 0 series"):
        choose_series(tmp_path, {"flair": "T9"})
    for bad in ("FLAIR", "a_b", "../x", "seg", ""):
        with pytest.raises(AnomriError, match="name it in lower-case"):
            choose_series(tmp_path, {bad: uid})
    write_series(tmp_path / "4", "DWI b1000")
    with pytest.raises(AnomriError, match=r"no series is known(.|\n)*DWI b1000.*channel not known"):
        convert(tmp_path / "4", tmp_path / "out")
    reported: list[str] = []
    write_series(second, "DWI b1000")
    assert list(choose_series(second, on_skipped=reported.append)) == ["t1"]
    assert "DWI b1000" in reported[0]


def test_studies_are_not_mixed(tmp_path: Path) -> None:
    (
        write_series(tmp_path / "1", "T1"),
        write_series(tmp_path / "2", "FLAIR", StudyInstanceUID=generate_uid()),
    )
    with pytest.raises(AnomriError, match="several studies"):
        convert(tmp_path, tmp_path / "out")


def test_copies_and_localizers_are_left_out(tmp_path: Path) -> None:
    files = write_series(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "copy").write_bytes(files[3].read_bytes())
    write_series(tmp_path / "c", "3-plane", voxels(slices=MIN_SLICES - 1))
    write_series(tmp_path / "d", "T2 survey", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    save(
        one_slice(
            voxels(),
            lps_affine(),
            0,
            "Report",
            SOPClassUID="1.2.840.10008.5.1.4.1.1.104.1",
            Modality="DOC",
        ),
        tmp_path / "pdf.dcm",
    )
    reported: list[str] = []
    assert [s.slices for s in find_series(tmp_path, reported.append)] == [SLICES]
    assert len(reported) == 4 and reported[0].startswith("1 files that are copies")
    assert any("Report" in text and "Encapsulated PDF Storage" in text for text in reported)


def spoil(folder: Path, what: str) -> None:
    """Write a folder with one thing wrong."""
    folder.mkdir()
    if what == "no DICOM":
        (folder / "a.dcm").write_bytes(b"nothing of the kind" * 20)
    elif what == "empty file":
        write_series(folder)[2].write_bytes(b"")
    elif what == "CT":
        write_series(folder, "Thorax", SOPClassUID="1.2.840.10008.5.1.4.1.1.2", Modality="CT")
    elif what == "PDF":
        save(
            one_slice(
                voxels(), lps_affine(), 0, "Report", SOPClassUID="1.2.840.10008.5.1.4.1.1.104.1"
            ),
            folder / "r",
        )
    elif what == "enhanced":
        write_series(folder, SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1")
    elif what == "DICOMDIR":
        one = one_slice(voxels(), lps_affine(), 0, "x", SOPClassUID="1.2.840.10008.1.3.10")
        for keyword in [e.keyword for e in one]:
            delattr(one, keyword)
        one.FileSetID = "DISC"
        save(one, folder / "DICOMDIR")
    elif what in ("gap", "twice", "tilted", "matrix", "no direction"):
        spoil_geometry(write_series(folder), what)
    elif what == "sideways":
        write_series(
            folder,
            affine=lps_affine()
            @ np.array([[1, 0, 0.8, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        )
    elif what == "no position":
        for path in write_series(folder):
            one = pydicom.dcmread(path)
            del one.ImagePositionPatient
            save(one, path)
    elif what == "cut":
        path = write_series(folder)[4]
        path.write_bytes(path.read_bytes()[:-40])
    elif what == "no pixels":
        path = write_series(folder)[4]
        one = pydicom.dcmread(path)
        del one.PixelData
        save(one, path)
    elif what in ("JPEG 2000", "MPEG2"):
        for path in write_series(folder):
            one = pydicom.dcmread(path)
            one.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51 no such image "])
            one["PixelData"].VR, one["PixelData"].is_undefined_length = "OB", True
            uid = {"JPEG 2000": "1.2.840.10008.1.2.4.90", "MPEG2": "1.2.840.10008.1.2.4.100"}[what]
            one.file_meta.TransferSyntaxUID = UID(uid)
            save(one, path)


def spoil_geometry(files: list[Path], what: str) -> None:
    if what == "gap":
        files[5].unlink()
        return
    one = pydicom.dcmread(files[5])
    if what == "twice":
        one.ImagePositionPatient = pydicom.dcmread(files[4]).ImagePositionPatient
    elif what == "tilted":
        one.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    elif what == "no direction":
        for path in files:
            one = pydicom.dcmread(path)
            one.ImageOrientationPatient = [0, 0, 0, 0, 0, 0]
            save(one, path)
        return
    else:
        one.Rows, one.Columns = COLUMNS, ROWS
    save(one, files[5])


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("empty folder", "no file at all"),
        ("no DICOM", r"1 files that are not DICOM \(a.dcm\)"),
        ("empty file", "the file is empty; copy it again"),
        ("CT", "'Thorax': 12 files of CT Image Storage"),
        ("PDF", "'Report': 1 files of Encapsulated PDF Storage"),
        ("enhanced", "'Ax FLAIR': enhanced multi-frame MR; convert it to NIfTI with dcm2niix"),
        ("DICOMDIR", "a DICOMDIR, which is only an index"),
        (
            "gap",
            r"10.00 mm lie between Ax\d+ and Ax\d+, elsewhere 5.00 mm; about 1 slices are missing",
        ),
        ("twice", r"Ax\d+ and Ax\d+ lie at one position; it holds several volumes"),
        ("tilted", "differ in orientation, pixel size or matrix"),
        ("matrix", "differ in orientation, pixel size or matrix"),
        ("sideways", "shifted sideways by 0.72 mm"),
        ("no position", "no usable position"),
        ("no direction", "no usable position"),
        ("cut", r"Ax\d+: cannot be read as DICOM, it is damaged or cut short"),
        ("no pixels", r"Ax\d+: cannot be read as DICOM.*it holds no pixels"),
        (
            "JPEG 2000",
            r"Ax\d+: its pixels are compressed as JPEG 2000.*cannot be decoded.*Decompress",
        ),
        ("MPEG2", r"Ax\d+: its pixels are compressed as MPEG2.*cannot be decoded.*Decompress"),
    ],
)
def test_errors_name_the_folder_or_file(tmp_path: Path, what: str, says: str) -> None:
    spoil(tmp_path / "in", what)
    with pytest.raises(AnomriError, match=says) as error:
        convert(tmp_path / "in", tmp_path / "out")
    assert str(error.value).startswith(str(tmp_path / "in"))
    assert "MARKER" not in str(error.value)
    assert not list(tmp_path.glob("out/*"))


def test_a_folder_that_does_not_exist_and_a_dicomdir_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "DICOMDIR").touch()
    for path, says in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "DICOMDIR", "is a file; name the folder"),
    ):
        with pytest.raises(AnomriError, match=says):
            find_series(path)


def test_a_truncated_file_is_refused_clearly(tmp_path: Path) -> None:
    files = write_series(tmp_path / "in", data=voxels(slices=MIN_SLICES))
    whole = files[0].read_bytes()
    for length in range(1, len(whole), 29):
        files[0].write_bytes(whole[:length])
        with pytest.raises(AnomriError):
            convert(tmp_path / "in", tmp_path / "out", {"flair": "Ax FLAIR"})
    assert not list(tmp_path.glob("out/*"))


def test_without_the_extra_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path / "in")
    case = convert(tmp_path / "in", tmp_path / "out")
    volume, source = read_volume(case, ["flair"]), find_series(tmp_path / "in")[0]
    for module in ("dicom2nifti.convert_dicom", "highdicom", "pydicom"):
        monkeypatch.setitem(sys.modules, module, None)
        arguments = (tmp_path / "s.dcm", volume.data[0] > 9, volume.geometry, source)
        with pytest.raises(AnomriError, match=re.escape(install_command("dicom"))):
            write_segmentation(*arguments) if module == "highdicom" else convert(
                tmp_path / "in", tmp_path / "out"
            )


def test_no_identifier_is_copied_from_the_headers(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    write_series(tmp_path / "in", "Ax FLAIR", ProtocolName="FLAIR", OperatorsName="MARKEROP")
    case = convert(tmp_path / "in", tmp_path / "out")
    assert case.subject is None and case.name.startswith("case") and len(case.name) == 16
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == f"{case.name}_flair.nii.gz"
    packed, content = path.read_bytes(), gzip.decompress(path.read_bytes())
    printed = "".join(capfd.readouterr())
    uids = [
        str(pydicom.dcmread(next((tmp_path / "in").iterdir()))[f"{k}InstanceUID"].value)
        for k in ("Study", "Series")
    ]
    for marker in ("MARKER", "19010203", "19990807", *uids):
        for what in (
            packed,
            content,
            path.name.encode(),
            printed.encode(),
            repr(find_series(tmp_path / "in")).encode(),
        ):
            if marker not in uids:
                assert marker.encode() not in what
        assert marker.encode() not in packed + content
    # Nothing of the file's name or time in the gzip header either.
    assert packed[3:8] == b"\0" * 5
    named = convert(tmp_path / "in", tmp_path / "named", keep_identifiers=True)
    assert named.subject == "MARKERID77" and named.name == f"MARKERID77-{case.name[4:]}"


def test_a_patient_id_makes_a_file_name_that_stays_in_its_folder(tmp_path: Path) -> None:
    write_series(tmp_path / "in", PatientID="../../a b/c")
    case = convert(tmp_path / "in", tmp_path / "out", keep_identifiers=True)
    assert case.channels["flair"].parent == tmp_path / "out" and case.name.startswith("a-b-c-")


@pytest.fixture
def scanned(tmp_path: Path) -> Any:
    """Make a series, convert it and read it as a volume."""
    pytest.importorskip("highdicom", reason="needs anomri[dicom]")

    def make(plane: str, **tags: Any) -> tuple[Series, Volume, np.ndarray]:
        affine = lps_affine(PLANES[plane], (0.9, 1.1, 3.0))
        write_series(tmp_path / "in", data=np.abs(voxels()) + 1, affine=affine, **tags)
        case = convert(tmp_path / "in", tmp_path / "out")
        return find_series(tmp_path / "in")[0], read_volume(case, ["flair"]), affine

    return make


@pytest.mark.parametrize("plane", PLANES)
def test_a_segmentation_lies_where_its_mask_is(tmp_path: Path, plane: str, scanned: Any) -> None:
    sitk = pytest.importorskip("SimpleITK")
    source, volume, _ = scanned(plane)
    geometry = volume.geometry
    mask = np.zeros(geometry.canonical_shape, bool)
    corner = tuple(slice(n // 3, n // 3 + 3) for n in mask.shape)
    mask[corner] = True
    mask[tuple(n // 3 for n in mask.shape)] = False  # so that no flip leaves it as it is
    write_segmentation(
        tmp_path / "seg.dcm",
        mask,
        geometry,
        source,
        parameters={"threshold": 0.25, "method": "dae"},
    )
    expected = apply_affine(geometry.canonical_affine, np.argwhere(mask)) * [-1, -1, 1]
    itk = sitk.ReadImage(str(tmp_path / "seg.dcm"))
    found = [
        itk.TransformIndexToPhysicalPoint(i[::-1].tolist())
        for i in np.argwhere(sitk.GetArrayFromImage(itk))
    ]
    np.testing.assert_allclose(np.mean(found, axis=0), expected.mean(axis=0), atol=0.9)
    np.testing.assert_allclose(
        sorted(np.round(found, 2).tolist()), sorted(np.round(expected, 2).tolist()), atol=0.02
    )
    check_frames(tmp_path, mask, geometry.canonical_affine, source)


def check_frames(folder: Path, mask: np.ndarray, affine: np.ndarray, source: Series) -> None:
    """Each frame of the SEG lies on the slice it refers to and shows the mask there."""
    seg, pixels = (
        pydicom.dcmread(folder / "seg.dcm"),
        pydicom.dcmread(folder / "seg.dcm").pixel_array,
    )
    slices = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, source.files)}
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == source.uid
    assert (
        seg.StudyInstanceUID == STUDY
        and seg.FrameOfReferenceUID == next(iter(slices.values())).FrameOfReferenceUID
    )
    assert pixels.sum() == mask.sum()
    to_mask = np.linalg.inv(affine)
    for frame, image in zip(
        seg.PerFrameFunctionalGroupsSequence, np.atleast_3d(pixels), strict=True
    ):
        of = slices[
            frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        ]
        position = np.array(of.ImagePositionPatient, float)
        assert np.allclose(
            np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float), position
        )
        across, down = np.array(of.ImageOrientationPatient, float).reshape(2, 3)
        row, column = np.indices(image.shape).reshape(2, -1)
        lps = (
            position
            + np.outer(column, across * of.PixelSpacing[1])
            + np.outer(row, down * of.PixelSpacing[0])
        )
        index = np.rint(apply_affine(to_mask, lps * [-1, -1, 1])).astype(int)
        np.testing.assert_array_equal(image.ravel().astype(bool), mask[tuple(index.T)])


def test_headers_without_names_and_times_suffice_for_a_segmentation(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="needs anomri[dicom]")
    for file in write_series(tmp_path / "in", EchoTime=None, RepetitionTime=None):
        one = pydicom.dcmread(file)
        for keyword in (*PATIENT_AND_STUDY, "SliceThickness"):
            if keyword in one:
                delattr(one, keyword)
        one.save_as(file)
    case, (source,) = convert(tmp_path / "in", tmp_path / "out"), find_series(tmp_path / "in")
    volume = read_volume(case, ["flair"])
    write_segmentation(tmp_path / "seg.dcm", volume.data[0] > 1500, volume.geometry, source)
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert (seg.PatientName, seg.PatientID, seg.StudyDate) == ("", "", "")
    assert seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == 5


def test_series_with_several_frames_of_reference_give_a_note(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "1", "Ax FLAIR")
    write_series(tmp_path / "in" / "2", "Sag T1")
    assert convert(tmp_path / "in", tmp_path / "out").notes == ()
    write_series(
        tmp_path / "in" / "2", "Sag T1", FrameOfReferenceUID=generate_uid(entropy_srcs=["another"])
    )
    (note,) = convert(tmp_path / "in", tmp_path / "out").notes
    assert "not of one frame of reference" in note


def test_header_values_that_the_standard_forbids_are_left_empty_in_a_segmentation(
    tmp_path: Path,
) -> None:
    pytest.importorskip("highdicom", reason="needs anomri[dicom]")
    with quiet():
        for file in write_series(tmp_path / "in"):
            one = pydicom.dcmread(file)
            one.PatientSex, one.PatientBirthDate, one.StudyTime = "...", "XXXX", "101500"
            one.save_as(file)
    case, (source,) = convert(tmp_path / "in", tmp_path / "out"), find_series(tmp_path / "in")
    volume = read_volume(case, ["flair"])
    mask = volume.data[0] > 1500
    emptied = write_segmentation(tmp_path / "seg.dcm", mask, volume.geometry, source)
    assert emptied == ["PatientBirthDate", "PatientSex"]
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert not seg.PatientSex and not seg.PatientBirthDate and seg.StudyTime == "101500"


def test_a_segmentation_names_its_algorithm_and_its_source(tmp_path: Path, scanned: Any) -> None:
    source, volume, _ = scanned("axial")
    mask = volume.data[0] > 1500
    write_segmentation(
        tmp_path / "seg.dcm", mask, volume.geometry, source, parameters={"threshold": 0.25}
    )
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert seg.SOPClassUID == "1.2.840.10008.5.1.4.1.1.66.4" and seg.SegmentationType == "BINARY"
    (segment,) = seg.SegmentSequence
    assert (segment.SegmentLabel, segment.SegmentAlgorithmType) == ("Anomaly", "AUTOMATIC")
    assert segment.SegmentAlgorithmName == "anomri"
    category, kind = (
        segment.SegmentedPropertyCategoryCodeSequence[0],
        segment.SegmentedPropertyTypeCodeSequence[0],
    )
    assert (category.CodeValue, category.CodingSchemeDesignator) == ("49755003", "SCT")
    assert (kind.CodeValue, kind.CodeMeaning) == ("52988006", "Lesion")
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmParameters == "threshold=0.25"
    # A SEG is part of the source's study: the standard has it carry the patient module.
    assert (seg.PatientID, seg.PatientBirthDate, seg.StudyDate) == (
        "MARKERID77",
        "19010203",
        "19990807",
    )
    assert seg.PatientName == "MARKERNAME^GIVEN"
    referred = {
        i.ReferencedSOPInstanceUID
        for i in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    }
    assert referred == {pydicom.dcmread(path).SOPInstanceUID for path in source.files}


def test_an_empty_mask_is_written_with_all_its_slices(tmp_path: Path, scanned: Any) -> None:
    source, volume, _ = scanned("sagittal")
    write_segmentation(
        tmp_path / "seg.dcm", np.zeros(volume.data.shape[1:], bool), volume.geometry, source
    )
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    assert seg.NumberOfFrames == SLICES and not seg.pixel_array.any()


def test_a_mask_on_another_grid_or_an_unfit_series_is_refused(tmp_path: Path, scanned: Any) -> None:
    source, volume, affine = scanned("axial")
    mask = volume.data[0] > 1500
    moved = np.diag([1.0, 1, 1, 1])
    moved[0, 3] = 2
    write_series(tmp_path / "other", affine=moved @ affine)
    with pytest.raises(AnomriError, match="the mask lies on another grid"):
        write_segmentation(
            tmp_path / "seg.dcm", mask, volume.geometry, find_series(tmp_path / "other")[0]
        )
    write_series(tmp_path / "shorter", data=voxels(slices=SLICES - 1), affine=affine)
    with pytest.raises(AnomriError, match="the mask lies on another grid"):
        write_segmentation(
            tmp_path / "seg.dcm", mask, volume.geometry, find_series(tmp_path / "shorter")[0]
        )
    for path in source.files:
        one = pydicom.dcmread(path)
        del one.FrameOfReferenceUID
        save(one, path)
    with pytest.raises(AnomriError, match="do not suffice for a DICOM SEG"):
        write_segmentation(tmp_path / "seg.dcm", mask, volume.geometry, source)
    source.files[0].unlink()
    with pytest.raises(AnomriError, match="cannot be read as DICOM"):
        write_segmentation(tmp_path / "seg.dcm", mask, volume.geometry, source)
    assert not list(tmp_path.glob("*.dcm")) and not list(tmp_path.glob(".partial*"))


def test_an_error_quotes_no_patient(
    tmp_path: Path, scanned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, volume, _ = scanned("axial")
    for path in source.files:
        path.write_bytes(path.read_bytes().replace(b"19010203", b"MARKBORN"))
    arguments = tmp_path / "seg.dcm", volume.data[0] > 9, volume.geometry, source
    # A date that is none is left out.
    assert write_segmentation(*arguments) == ["PatientBirthDate"]
    assert b"MARKBORN" not in (tmp_path / "seg.dcm").read_bytes()
    (tmp_path / "seg.dcm").unlink()

    def fail(*_: object) -> None:
        raise ValueError("cannot read 'MARKBORN' as a date")

    monkeypatch.setattr("anomri.scans.dicom.seg._make_segmentation", fail)
    with pytest.raises(AnomriError, match="do not suffice for a DICOM SEG") as error:
        write_segmentation(*arguments)
    assert "MARK" not in str(error.value) and not list(tmp_path.glob("*.dcm"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, scanned: Any) -> None:
    source, volume, _ = scanned("axial")
    with pytest.raises(AnomriError, match=r"none/seg.dcm: cannot write"):
        write_segmentation(
            tmp_path / "none" / "seg.dcm", volume.data[0] > 9, volume.geometry, source
        )


def test_odd_header_values_neither_warn_nor_leak(tmp_path: Path) -> None:
    for path in write_series(tmp_path / "in", EchoTime="11111111", InversionTime="22222222"):
        path.write_bytes(
            path.read_bytes().replace(b"11111111", b"MARKER??").replace(b"22222222", b"MARKER??")
        )
    (found,) = find_series(tmp_path / "in")
    assert found.echo_time is None and found.inversion_time is None
    assert convert(tmp_path / "in", tmp_path / "out").channels


SERIES_NAMES = {
    "flair": (
        "Ax FLAIR",
        "sFLAIR/T",
        "FLAIR_longTR",
        "3D BRAIN VIEW FLAIR",
        "Sag CUBE FLAIR",
        "AX T2 FLAIR FS",
        "t2_space_dark-fluid_sag_p2_iso",
        "t2_tirm_tra_dark-fluid",
        "T2W_FLAIR_SPAIR",
        "3D_FLAIR_VISTA",
        "FLAIR  AX FC",
    ),
    "t1": (
        "t1_mprage_sag_p2_iso",
        "MPRAGE",
        "T1W_3D_TFE",
        "sT1W_3D_TFE",
        "Ax T1 SE",
        "SAG T1 FSE",
        "t1_se_tra",
        "3D BRAVO",
        "Ax 3D FSPGR",
        "T1 TSE SAG",
        "eT1W_SE",
        "t1_vibe_tra",
        "T1_3D_FFE",
    ),
    "t1ce": (
        "eT1 post gad",
        "t1_mprage_tra_KM",
        "AX T1 POST",
        "T1W_3D_TFE +C",
        "t1_se_tra_Gd",
        "SAG T1 CE",
    ),
    "t2": (
        "sT2/TSE/T",
        "t2_tse_tra_320",
        "Ax T2 FSE",
        "T2W_TSE",
        "AX T2 PROPELLER",
        "t2_blade_tra",
        "sT2W_TSE",
        "T2 FRFSE",
        "3D CUBE T2",
        "T2_SPACE_sag",
    ),
    None: (
        "localizer",
        "3-plane loc",
        "Survey",
        "ep2d_diff_3scan_trace_p2",
        "DWI_b1000",
        "dADC",
        "SWI_Images",
        "T2* GRE",
        "Ax T2 STAR",
        "3D TOF MRA",
        "t1_fl3d_tof",
        "PD_T2_TSE",
        "T2 MAP",
        "T1 FLAIR",
        "ASL perfusion",
        "T2 STIR SAG SPINE",
        "Phase contrast",
        "GRE_Field_Map",
        "BOLD_rest",
        "4D_DSC_PERF",
        "dti_64dir",
    ),
}


@pytest.mark.parametrize(
    ("name", "channel"),
    [(name, channel) for channel, names in SERIES_NAMES.items() for name in names],
)
def test_usual_names_of_series_say_their_channel(name: str, channel: str | None) -> None:
    series = Series("1", "2", name, "", "MR", (Path("1.dcm"),))
    assert guess_channel(series) == channel


def test_a_series_in_a_linked_folder_is_found_and_links_in_a_circle_end(tmp_path: Path) -> None:
    write_series(tmp_path / "study" / "1", "Ax FLAIR")
    write_series(tmp_path / "elsewhere" / "2", "Ax T1")
    (tmp_path / "study" / "linked").symlink_to(tmp_path / "elsewhere" / "2")
    (tmp_path / "study" / "circle").symlink_to(tmp_path / "study")
    assert holds_dicom(tmp_path / "study")
    found = find_series(tmp_path / "study")
    assert sorted(one.description for one in found) == ["Ax FLAIR", "Ax T1"]
    assert len({one.slices for one in found}) == 1


def strip_file(path: Path, layout: str) -> None:
    """Write a DICOM file again as old scanners and anonymisers do, without what ``layout`` says."""
    one = pydicom.dcmread(path)
    meta = one.file_meta
    options: dict[str, Any] = {"enforce_file_format": False}
    if layout == "no transfer syntax":
        whole = path.read_bytes()
        start = whole.index(b"\x02\x00\x10\x00UI")
        length = 8 + int.from_bytes(whole[start + 6 : start + 8], "little")
        path.write_bytes(whole[:start] + whole[start + length :])
        return
    if layout != "no preamble":
        one.file_meta = FileMetaDataset()
        options |= {"implicit_vr": "implicit" in layout, "little_endian": "big" not in layout}
    else:
        one.file_meta = meta
    one.preamble = None
    one.save_as(path, **options)
    content = path.read_bytes()
    if layout == "empty preamble without prefix":
        path.write_bytes(bytes(128) + content)
    elif layout == "prefix without preamble":
        path.write_bytes(b"DICM" + content)
    elif layout == "preamble and no meta":
        path.write_bytes(bytes(128) + b"DICM" + content)


LAYOUTS = (
    "implicit",
    "explicit",
    "no preamble",
    "no transfer syntax",
    "empty preamble without prefix",
    "prefix without preamble",
    "preamble and no meta",
    "preamble and no meta, implicit",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_without_meta_information_or_preamble_are_read(tmp_path: Path, layout: str) -> None:
    data = voxels()
    files = write_series(tmp_path / "in", data=data)
    whole = nib.load(convert(tmp_path / "in", tmp_path / "whole").channels["flair"])
    for path in files:
        strip_file(path, layout)
    assert holds_dicom(tmp_path / "in")
    image = nib.load(convert(tmp_path / "in", tmp_path / "out").channels["flair"])
    np.testing.assert_array_equal(image.get_fdata(), data)
    assert image.to_bytes() == whole.to_bytes()


def test_old_big_endian_files_without_meta_information_are_read(tmp_path: Path) -> None:
    data = voxels()
    for path in write_series(tmp_path / "in", data=data):
        one = pydicom.dcmread(path)
        one["PixelData"].value = data[:, :, int(one.InstanceNumber) - 1].T.astype(">i2").tobytes()
        one.preamble, one.file_meta = None, FileMetaDataset()
        pydicom.dcmwrite(path, one, implicit_vr=False, little_endian=False, force_encoding=True)
    image = nib.load(convert(tmp_path / "in", tmp_path / "out").channels["flair"])
    np.testing.assert_array_equal(image.get_fdata(), data)


@pytest.mark.parametrize(
    ("removed", "says"),
    [
        ("SOPClassUID", None),
        ("Modality", None),
        ("SOPInstanceUID", None),
        ("FrameOfReferenceUID", None),
        ("SeriesDescription", None),
        ("ImageType", None),
        ("StudyInstanceUID", "12 files without StudyInstanceUID, which say what belongs together"),
        ("SeriesInstanceUID", "12 files without SeriesInstanceUID, which say what belongs"),
        ("ImagePositionPatient", "no usable position, orientation or pixel size"),
        ("ImageOrientationPatient", "no usable position, orientation or pixel size"),
        ("PixelSpacing", "no usable position, orientation or pixel size"),
        ("Rows", "no usable position, orientation or pixel size"),
        ("Columns", "no usable position, orientation or pixel size"),
        ("PixelData", "it holds no pixels"),
        ("BitsAllocated", "cannot be"),
        ("SamplesPerPixel", "cannot be"),
        ("PhotometricInterpretation", "cannot be"),
        ("PixelRepresentation", "cannot be"),
    ],
)
@pytest.mark.parametrize("layout", ["as the standard says", "implicit"])
def test_what_a_header_lacks_is_not_needed_or_named(
    tmp_path: Path, removed: str, says: str | None, layout: str
) -> None:
    for path in write_series(tmp_path / "in", ProtocolName="FLAIR"):
        one = pydicom.dcmread(path)
        delattr(one, removed)
        one.save_as(path)
        if layout == "implicit":
            strip_file(path, layout)
    if says is None:
        image = nib.load(convert(tmp_path / "in", tmp_path / "out").channels["flair"])
        np.testing.assert_array_equal(np.sort(image.get_fdata().ravel()), np.sort(voxels().ravel()))
        return
    with pytest.raises(AnomriError, match=says) as error:
        convert(tmp_path / "in", tmp_path / "out")
    assert str(error.value).startswith(str(tmp_path / "in"))


def test_compressed_pixels_without_meta_information_are_refused(tmp_path: Path) -> None:
    for path in write_series(tmp_path / "in"):
        one = pydicom.dcmread(path)
        one.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        one.preamble, one.file_meta = None, FileMetaDataset()
        one.save_as(path, implicit_vr=False, little_endian=True, enforce_file_format=False)
    with pytest.raises(
        AnomriError, match="its pixels are compressed, and it has no meta information"
    ):
        convert(tmp_path / "in", tmp_path / "out")


def test_other_files_are_not_taken_for_dicom(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(200):
        content = rng.integers(0, 256, 3000, dtype=np.uint8).tobytes()
        # Also ones that begin as a data set does.
        start = (b"", b"\x08\x00", b"\x08\x00\x05\x00", b"\x08\x00\x05\x00CS\x0a\x00")[number % 4]
        (tmp_path / f"{number}.bin").write_bytes(start + content)
    (tmp_path / "raw").write_bytes(np.arange(8, 3000, dtype=np.uint16).tobytes())
    (tmp_path / "counted").write_bytes(np.repeat(np.uint16([8, 9, 10]), 500).tobytes())
    (tmp_path / "text").write_text("08 00 some text\n" * 50)
    (tmp_path / "zeros").write_bytes(bytes(4000))
    assert not holds_dicom(tmp_path)
    with pytest.raises(AnomriError, match="204 files that are not DICOM"):
        find_series(tmp_path)


def test_objects_without_an_image_are_left_out_and_named(tmp_path: Path) -> None:
    write_series(tmp_path / "in")
    objects = {
        "SR": "1.2.840.10008.5.1.4.1.1.88.33",
        "PR": "1.2.840.10008.5.1.4.1.1.11.1",
        "KO": "1.2.840.10008.5.1.4.1.1.88.59",
        "RTSTRUCT": "1.2.840.10008.5.1.4.1.1.481.3",
    }
    for modality, sop_class in objects.items():
        tags = {"SOPClassUID": sop_class, "Modality": modality}
        one = one_slice(voxels(), lps_affine(), 0, f"a {modality}", **tags)
        for keyword in ("PixelData", "Rows", "Columns", "ImagePositionPatient", "PixelSpacing"):
            delattr(one, keyword)
        strip_file(save(one, tmp_path / "in" / modality), "implicit")
    write_series(tmp_path / "in" / "ct", "CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    left_out: list[str] = []
    (found,) = find_series(tmp_path / "in", left_out.append)
    assert found.description == "Ax FLAIR" and len(left_out) == 5
    for modality in objects:
        assert any(f"(modality {modality}), not MR images" in text for text in left_out)


NAME = "MARKER^ANNA"


@pytest.mark.parametrize(
    "keyword",
    [
        *("EchoTime", "RepetitionTime", "InversionTime", "SliceThickness", "RescaleSlope"),
        *("PatientBirthDate", "StudyDate", "StudyTime", "PatientAge", "ImagingFrequency"),
        *("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"),
        *("InstanceNumber", "SeriesNumber", "PixelSpacing", "ImagePositionPatient"),
        *("ScanningSequence", "SOPClassUID", "NumberOfTemporalPositions", "ImageType"),
    ],
)
def test_a_name_in_a_wrong_header_is_nowhere_to_be_seen(
    tmp_path: Path, keyword: str, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("highdicom", reason="needs anomri[dicom]")
    with quiet():
        for path in write_series(tmp_path / "in"):
            one = pydicom.dcmread(path)
            place = "12345678901"
            one.add_new(keyword, "LO", place)
            one.save_as(path)
            vr = pydicom.datadict.dictionary_VR(keyword).encode()
            tag = pydicom.datadict.tag_for_keyword(keyword)
            start = (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little")
            content = path.read_bytes()
            assert content.count(start + b"LO") == 1
            content = content.replace(start + b"LO", start + vr)
            path.write_bytes(content.replace(place.encode(), NAME.encode()))
    notes: list[str] = []
    said = ""
    # Warnings are shown, not raised, and a logger prints, as in another program that uses anomri.
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        logging.basicConfig(level=logging.DEBUG, force=False)
        try:
            case = convert(tmp_path / "in", tmp_path / "out", on_skipped=notes.append)
            notes += case.notes
            volume = read_volume(case, ["flair"])
            mask, source = volume.data[0] > 1500, find_series(tmp_path / "in")[0]
            notes += write_segmentation(tmp_path / "seg.dcm", mask, volume.geometry, source)
        except AnomriError as error:
            said = "".join(traceback.format_exception(error))
    written = [path.read_bytes() for path in (tmp_path / "out").glob("*")]
    written += [gzip.decompress(one) for one in written if one.startswith(b"\x1f\x8b")]
    printed = "".join([*capfd.readouterr(), caplog.text, said, *notes])
    assert "MARKER" not in printed and "ANNA" not in printed
    assert not any(b"MARKER" in one for one in written)
    if keyword in ("EchoTime", "RepetitionTime", "NumberOfTemporalPositions"):
        assert any(f"holds no number in {keyword}" in note for note in notes)


TIMES: list[tuple[str, dict[str, Any], str | None]] = [
    # Siemens
    ("SE 5", {"EchoTime": 85, "RepetitionTime": 9000, "InversionTime": 2500}, "flair"),
    ("ax", {"EchoTime": 388, "RepetitionTime": 5000, "InversionTime": 1800}, "flair"),
    ("Unnamed", {"EchoTime": 100, "RepetitionTime": 5000}, "t2"),
    ("", {"EchoTime": 409, "RepetitionTime": 3200, "ScanningSequence": "SE"}, "t2"),
    ("head", {"EchoTime": 9, "RepetitionTime": 550}, "t1"),
    (
        "sag",
        {
            **{"EchoTime": 2.3, "RepetitionTime": 2300, "InversionTime": 900},
            **{"ScanningSequence": ["GR", "IR"], "SequenceName": "*tfl3d1_16ns"},
        },
        "t1",
    ),
    # GE counts the inversion of its prepared gradient echo from 400 ms, and writes 0 for none.
    (
        "1",
        {"EchoTime": 3, "RepetitionTime": 8, "InversionTime": 450, "ScanningSequence": "GR"},
        "t1",
    ),
    ("2", {"EchoTime": 102, "RepetitionTime": 6000, "InversionTime": 0}, "t2"),
    # Philips and Canon
    ("s", {"EchoTime": 120, "RepetitionTime": 11000, "InversionTime": 2800}, "flair"),
    ("c", {"EchoTime": 12, "RepetitionTime": 500, "ScanningSequence": "SE"}, "t1"),
    ("SE 6", {"EchoTime": 9, "RepetitionTime": 550, "ContrastBolusAgent": "Dotarem"}, "t1ce"),
    ("post gad", {"EchoTime": 9, "RepetitionTime": 550}, "t1ce"),
    ("SE 7", {"EchoTime": 9, "RepetitionTime": 550, "ContrastBolusAgent": "NONE"}, "t1"),
    # Neither T1, T2 nor FLAIR, or not known
    ("PDish", {"EchoTime": 15, "RepetitionTime": 3000}, None),
    ("fat", {"EchoTime": 60, "RepetitionTime": 4500, "InversionTime": 160}, None),
    ("SE 5", {"EchoTime": 100}, None),
    ("SE 5", {"RepetitionTime": 5000}, None),
    ("SE 5", {"EchoTime": 100, "RepetitionTime": 500}, None),
    ("SE 5", {"EchoTime": 100, "RepetitionTime": 9000, "InversionTime": 900}, None),
    ("x", {"EchoTime": 3.7, "RepetitionTime": 22, "ScanningSequence": "GR"}, None),
    ("x", {"EchoTime": 20, "RepetitionTime": 28, "ScanningSequence": "GR"}, None),
    ("x", {"EchoTime": 80, "RepetitionTime": 5000, "ScanningSequence": ["EP", "SE"]}, None),
    (
        "x",
        {"EchoTime": 80, "RepetitionTime": 5000, "ImageType": ["ORIGINAL", "PRIMARY", "ADC"]},
        None,
    ),
    ("x", {"EchoTime": 9, "RepetitionTime": 550, "AngioFlag": "Y"}, None),
    ("x", {"EchoTime": 80, "RepetitionTime": 5000, "DiffusionBValue": 1000.0}, None),
    ("x", {"EchoTime": 80, "RepetitionTime": 5000, "SequenceName": "ep_b1000#1"}, None),
    ("x", {"EchoTime": 100, "RepetitionTime": 5000, "BodyPartExamined": "KNEE"}, None),
    ("x", {"EchoTime": 9, "RepetitionTime": 550, "NumberOfTemporalPositions": 30}, None),
    ("b1000", {"EchoTime": 80, "RepetitionTime": 5000}, None),
    ("x", {"EchoTime": 100, "RepetitionTime": 9000, "ScanningSequence": ["SE", "IR"]}, None),
    ("3-plane", {"EchoTime": 80, "RepetitionTime": 5000}, None),
    ("IR", {"EchoTime": 12, "RepetitionTime": 2500, "InversionTime": 800}, None),
    ("x", {"EchoTime": 100, "RepetitionTime": 5000, "ProtocolName": "ep2d_diff"}, None),
    ("x", {"EchoTime": 100, "RepetitionTime": 5000, "ProtocolName": "t1_tse_tra"}, None),
    ("x", {"EchoTime": 100, "RepetitionTime": 5000, "ProtocolName": "t2_tse_tra"}, "t2"),
]


@pytest.mark.parametrize(("name", "tags", "channel"), TIMES)
def test_times_say_the_channel_of_a_series_whose_name_does_not(
    tmp_path: Path, name: str, tags: dict[str, Any], channel: str | None
) -> None:
    write_series(tmp_path / "1", "Ax FLAIR" if channel != "flair" else "Ax T2")
    known = "flair" if channel != "flair" else "t2"
    absent = {} if "RepetitionTime" in tags else {"RepetitionTime": None}
    write_series(tmp_path / "2", name or "none", SeriesDescription=name, **tags, **absent)
    notes: list[str] = []
    chosen = choose_series(tmp_path, on_skipped=notes.append)
    assert list(chosen) == sorted({known} | ({channel} if channel else set()))
    (note,) = notes
    if channel is None:
        assert "its channel is not known (" in note
    else:
        assert f"it is taken for {channel}, guessed from its " in note
        assert f"echo time {tags['EchoTime']} ms" in note and f"--series {channel}=" in note


def test_a_guess_does_not_displace_a_series_that_is_named(tmp_path: Path) -> None:
    write_series(tmp_path / "1", "Ax T2")
    for number in ("5", "6"):
        write_series(tmp_path / number, f"SE {number}", EchoTime=9, RepetitionTime=550)
    write_series(tmp_path / "7", "SE 7", EchoTime=100, RepetitionTime=5000)
    notes: list[str] = []
    assert list(choose_series(tmp_path, on_skipped=notes.append)) == ["t2"]
    assert sum("but 2 series look like t1" in note for note in notes) == 2
    assert sum("but another series is t2 by its name" in note for note in notes) == 1
    write_series(tmp_path / "other" / "5", "SE 8", EchoTime=9, RepetitionTime=550)
    write_series(tmp_path / "other" / "6", "SE 9", EchoTime=9, RepetitionTime=550)
    with pytest.raises(AnomriError, match="no series is known"):
        choose_series(tmp_path / "other")


def test_a_name_and_times_that_contradict_each_other_give_a_note(tmp_path: Path) -> None:
    write_series(tmp_path / "1", "Ax FLAIR", EchoTime=100, RepetitionTime=5000, InversionTime=0)
    write_series(tmp_path / "2", "Ax T1", EchoTime=100, RepetitionTime=5000)
    notes: list[str] = []
    assert list(choose_series(tmp_path, on_skipped=notes.append)) == ["flair"]
    assert "taken for flair by its name, but it has the times of t2 (echo time 100" in notes[0]
    assert "its channel is not known (its name and its times (echo time 100" in notes[1]


def test_two_echoes_or_three_orientations_in_a_series_are_not_guessed(tmp_path: Path) -> None:
    write_series(tmp_path / "1", "Ax FLAIR")
    for path in write_series(tmp_path / "2", "SE 5", EchoTime=100, RepetitionTime=5000)[::2]:
        one = pydicom.dcmread(path)
        one.EchoTime = 15
        save(one, path)
    for path in write_series(tmp_path / "3", "SE 6", EchoTime=100, RepetitionTime=5000)[::2]:
        one = pydicom.dcmread(path)
        one.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        save(one, path)
    notes: list[str] = []
    assert list(choose_series(tmp_path, on_skipped=notes.append)) == ["flair"]
    assert "it has several values of EchoTime" in notes[0]
    assert "its slices have several orientations" in notes[1]


def test_a_dicom_file_in_place_of_its_folder_is_named(tmp_path: Path) -> None:
    first, second, *_ = write_series(tmp_path / "in")
    strip_file(second, "implicit")
    for path in (first, second):
        with pytest.raises(AnomriError, match="is a DICOM file; give the folder that holds its"):
            find_cases(path)
        with pytest.raises(AnomriError, match="is a DICOM file; give the folder"):
            case_from_files({"flair": path})
        named = path.rename(path.with_suffix(".nii"))
        with pytest.raises(AnomriError, match="is a DICOM file"):
            read_volume(Case("p", {"flair": named}), ["flair"])


def test_what_was_guessed_is_noted_with_the_case(tmp_path: Path) -> None:
    write_series(tmp_path / "in" / "1", "MARKER 5", EchoTime=100, RepetitionTime=5000)
    case = convert(tmp_path / "in", tmp_path / "out")
    (note,) = case.notes
    assert note.startswith("which series is t2 is in doubt: guessed from its echo time 100 ms")
    assert "--series t2=" in note and "MARKER" not in note
    assert convert(tmp_path / "in", tmp_path / "out", {"t2": "MARKER 5"}).notes == ()


def item(**values: Any) -> Any:
    one = pydicom.Dataset()
    for keyword, value in values.items():
        setattr(one, keyword, value)
    return one


def write_enhanced(
    path: Path, data: np.ndarray, affine: np.ndarray, times: tuple[float, float, float], **tags: Any
) -> Path:
    """All slices in one file, in an order that says nothing, with echo, repetition, inversion."""
    one = one_slice(data, affine, 0, "SE 5", SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1")
    columns, rows, thickness = np.linalg.norm(affine[:3, :3], axis=0)
    turned = one.ImageOrientationPatient
    for keyword in (
        *("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SliceThickness"),
        *("RepetitionTime", "ScanningSequence"),
    ):
        delattr(one, keyword)
    one.EchoPulseSequence = "SPIN"
    one.SharedFunctionalGroupsSequence = [
        item(
            PixelMeasuresSequence=[
                item(PixelSpacing=[f"{rows:.10g}", f"{columns:.10g}"], SliceThickness=thickness)
            ],
            PlaneOrientationSequence=[item(ImageOrientationPatient=turned)],
            MREchoSequence=[item(EffectiveEchoTime=times[0])],
            MRTimingAndRelatedParametersSequence=[item(RepetitionTime=times[1])],
            MRModifierSequence=[item(InversionTimes=times[2])] if times[2] else [],
        )
    ]
    order = np.random.default_rng(2).permutation(data.shape[2])
    one.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[
                item(ImagePositionPatient=[f"{v:.10g}" for v in apply_affine(affine, [0, 0, k])])
            ],
            PixelValueTransformationSequence=[
                item(RescaleSlope=tags.get("slope", 1), RescaleIntercept=tags.get("intercept", 0))
            ],
        )
        for k in order
    ]
    one.NumberOfFrames = len(order)
    one.PixelData = np.ascontiguousarray(data[:, :, order].transpose(2, 1, 0)).tobytes()
    for keyword, value in tags.items():
        if keyword not in ("slope", "intercept"):
            setattr(one, keyword, value)
    return save(one, path)


@pytest.mark.parametrize("plane", ["axial", "oblique sagittal", "sagittal from the left"])
@pytest.mark.parametrize(
    ("times", "channel"),
    [((100, 9000, 2500), "flair"), ((100, 5000, 0), "t2"), ((9, 550, 0), "t1")],
)
def test_enhanced_multi_frame_series_are_read_where_they_were_scanned(
    tmp_path: Path, plane: str, times: tuple[float, float, float], channel: str
) -> None:
    data, affine = voxels(), lps_affine(PLANES[plane])
    write_enhanced(tmp_path / "in" / "one.dcm", data, affine, times)
    write_series(tmp_path / "slices", "t2_flair", data=data, affine=affine)
    (found,) = find_series(tmp_path / "in")
    assert found.slices == SLICES
    image = nib.load(convert(tmp_path / "in", tmp_path / "out").channels[channel])
    classic = nib.load(convert(tmp_path / "slices", tmp_path / "out").channels["flair"])
    np.testing.assert_array_equal(image.get_fdata(), classic.get_fdata())
    np.testing.assert_allclose(image.affine, classic.affine, atol=1e-5)
    assert image.get_data_dtype() == np.int16


def test_enhanced_series_are_rescaled_or_refused(tmp_path: Path) -> None:
    data, affine = voxels(), lps_affine()
    one = tmp_path / "in" / "one.dcm"
    write_enhanced(one, data, affine, (100, 5000, 0), slope=0.5, intercept=-3)
    image = nib.load(convert(tmp_path / "in", tmp_path / "out").channels["t2"])
    np.testing.assert_allclose(np.sort(image.get_fdata().ravel()), np.sort(data.ravel() * 0.5 - 3))
    source = find_series(tmp_path / "in")[0]
    volume = read_volume(Case("p", {"t2": tmp_path / "out" / image.get_filename()}), ["t2"])
    with pytest.raises(AnomriError, match="enhanced multi-frame MR, for which no DICOM SEG"):
        write_segmentation(tmp_path / "s.dcm", volume.data[0] > 9, volume.geometry, source)

    write_enhanced(one, data, affine, (100, 5000, 0), EchoPlanarPulseSequence="YES")
    with pytest.raises(AnomriError, match="no series is known"):
        convert(tmp_path / "in", tmp_path / "out")
    write_enhanced(one, np.concatenate([data, data], 2), affine, (100, 5000, 0))
    changed = pydicom.dcmread(one)
    groups = changed.PerFrameFunctionalGroupsSequence
    groups[3].PlanePositionSequence = groups[4].PlanePositionSequence
    changed.save_as(one)
    with pytest.raises(AnomriError, match=r"frame \d+ of one.dcm lie at one position"):
        convert(tmp_path / "in", tmp_path / "out")
    for group in groups:
        del group.PlanePositionSequence
    changed.save_as(one)
    with pytest.raises(AnomriError, match="enhanced multi-frame MR; convert it to NIfTI with dcm2"):
        convert(tmp_path / "in", tmp_path / "out")


def test_broken_links_in_a_study_are_named(tmp_path: Path) -> None:
    write_series(tmp_path)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    left_out: list[str] = []
    find_series(tmp_path, left_out.append)
    assert left_out == ["1 broken links or other entries that are not files (gone)"]


@pytest.mark.parametrize("keyword", ["SeriesInstanceUID", "StudyInstanceUID", "SOPClassUID"])
def test_a_birth_date_in_place_of_a_uid_is_not_shown(tmp_path: Path, keyword: str) -> None:
    with quiet():
        for path in write_series(tmp_path / "in"):
            one = pydicom.dcmread(path)
            setattr(one, keyword, "19010203")
            one.save_as(path)
    notes: list[str] = []
    (found,) = find_series(tmp_path / "in", notes.append)
    assert "19010203" not in f"{found!r} {found} {notes}"
    assert convert(tmp_path / "in", tmp_path / "out").channels
