"""What a header says of voxel size and place: no repair of a library changes volumes in silence."""

import logging
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

import anomri
from anomri.cli.progress import comparison_progress
from anomri.errors import AnomriError
from anomri.evaluation.evaluate import evaluate
from anomri.scans.case import Case
from anomri.scans.nifti import read_image, read_noted_image, write_image
from anomri.scans.prepare import prepare
from anomri.scans.read import read_label, read_volume
from anomri.scans.volume import Volume
from anomri.training.train import Progress
from phantom import LESION_MM, found_mm, places, scan, thresholding

SHAPE = (64, 80, 40)
AFFINE = nib.affines.from_matvec(np.diag([-2.2, -2.2, 3]), [69, 87, -58])
MM3 = 2.2 * 2.2 * 3
BRAIN = scan(SHAPE, AFFINE).astype(np.float32)
LESION = BRAIN.astype(bool) & (((places(SHAPE, AFFINE) - LESION_MM) ** 2).sum(-1) < 14**2)
KINDS: dict[str, np.ndarray] = {
    "flair": BRAIN,
    "t1": BRAIN,
    "mask": (BRAIN > 0).astype(np.uint8),
    "seg": LESION.astype(np.uint8),
}
Edit = Callable[[bytearray, bool], None]


def pixdim(*values: float, first: int = 1) -> Edit:
    """Write pixdim from ``first`` on; 0 is qfac."""

    def edit(content: bytearray, two: bool) -> None:
        start, width = (104, "d") if two else (76, "f")
        offset = start + first * (8 if two else 4)
        struct.pack_into(f"<{len(values)}{width}", content, offset, *values)

    return edit


def number(one: int, two_offset: int, value: int, narrow: str) -> Edit:
    def edit(content: bytearray, two: bool) -> None:
        struct.pack_into("<i" if two else narrow, content, two_offset if two else one, value)

    return edit


def qform_code(value: int) -> Edit:
    return number(252, 344, value, "<h")


def sform_code(value: int) -> Edit:
    return number(254, 348, value, "<h")


def unit(value: int) -> Edit:
    return number(123, 500, value, "<B")


def qform(affine: np.ndarray) -> Edit:
    """Write another place in the qform than in the sform."""

    def edit(content: bytearray, two: bool) -> None:
        kind = nib.Nifti2Header if two else nib.Nifti1Header
        header = kind(bytes(content[: kind.sizeof_hdr]))
        header.set_qform(affine, 1)
        content[: kind.sizeof_hdr] = header.binaryblock

    return edit


def write(
    path: Path, values: np.ndarray = BRAIN, edits: Sequence[Edit] = (), *, two: bool = False
) -> Path:
    image = (nib.Nifti2Image if two else nib.Nifti1Image)(values, AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    content = bytearray(image.to_bytes())
    for edit in edits:
        edit(content, two)
    path.write_bytes(bytes(content))
    return path


def read(path: Path) -> Volume:
    return read_volume(Case("a", {"flair": path}), ["flair"], resampled=True)


def long_quaternion(content: bytearray, two: bool) -> None:
    struct.pack_into("<3d" if two else "<3f", content, 352 if two else 256, 2, 2, 2)


NO_SFORM = sform_code(0)
OTHER_UNIT = "its header gives sizes in"
NO_SIZE = "its header gives no size of a voxel: pixdim is"
TWO_SIZES = r"its header has two voxel sizes: 2.2 x 2.2 x 3 mm \(14.52 mm3\) by the sform, "
REFUSED: dict[str, tuple[list[Edit], str]] = {
    "pixdim 0": ([pixdim(0, 0, 0), NO_SFORM], f"{NO_SIZE} 0 x 0 x 0"),
    "one pixdim 0": ([pixdim(0, first=3), NO_SFORM], f"{NO_SIZE} 2.2 x 2.2 x 0"),
    "negative pixdim": ([pixdim(-2.2), NO_SFORM], f"{NO_SIZE} -2.2 x 2.2 x 3"),
    "pixdim NaN": ([pixdim(np.nan), NO_SFORM], f"{NO_SIZE} nan x 2.2 x 3"),
    "pixdim infinite": ([pixdim(np.inf), NO_SFORM], f"{NO_SIZE} inf x 2.2 x 3"),
    "no form and no pixdim": ([pixdim(0, 0, 0), NO_SFORM, qform_code(0)], f"{NO_SIZE} 0 x 0 x 0"),
    "a quaternion longer than one": ([long_quaternion, NO_SFORM], "no usable position"),
    "half": ([pixdim(1.1, 1.1, 1.5)], TWO_SIZES + r"1.1 x 1.1 x 1.5 mm \(1.815 mm3\) by pixdim"),
    "12 % in mm3": ([pixdim(2.29, 2.29, 3.12)], TWO_SIZES + r"2.29 x 2.29 x 3.12 mm \(16.36 mm3\)"),
    "4 % of one side": ([pixdim(3.12, first=3)], TWO_SIZES),
    "2.7 % in mm3": ([pixdim(2.22, 2.22, 3.027)], TWO_SIZES),
    "sides exchanged": ([pixdim(2.2, 3, 2.2)], TWO_SIZES),
    "another size behind a sign": ([pixdim(-1.1)], TWO_SIZES),
    "0 beside another size": ([pixdim(0, 1.1, 3)], TWO_SIZES),
    "an unknown code": ([pixdim(1, 1, 1), sform_code(9), qform_code(0)], TWO_SIZES),
    "micrometres": ([unit(3)], f"{OTHER_UNIT} micrometres"),
    "metres": ([unit(1 + 8)], f"{OTHER_UNIT} metres"),
    "numbers in metres": ([pixdim(2.2e-3, 2.2e-3, 3e-3), NO_SFORM], "voxels of 0.0022 x 0.0022"),
    "numbers in micrometres": ([pixdim(2200, 2200, 3000), NO_SFORM], "voxels of 2.2e.03 x 2.2e.03"),
}


@pytest.mark.parametrize("two", [False, True], ids=["NIfTI-1", "NIfTI-2"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_mm3_is_refused_with_the_name_of_the_file(
    tmp_path: Path, name: str, two: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    edits, message = REFUSED[name]
    path = write(tmp_path / "a_flair.nii", BRAIN, edits, two=two)
    with pytest.raises(AnomriError, match=rf"a_flair.nii: .*{message}"):
        read(path)
    assert capfd.readouterr() == ("", "")


SILENT: dict[str, list[Edit]] = {
    "sound": [],
    "rounded": [pixdim(2.19, 2.21, 3.01)],
    "no unit": [unit(0)],
    "mm and seconds": [unit(10)],
    "sform alone": [qform_code(0)],
    "qform alone": [NO_SFORM],
    "an odd qfac without a qform": [pixdim(0, first=0), qform_code(0)],
}
NOTED: dict[str, tuple[list[Edit], str]] = {
    "pixdim 0": (
        [pixdim(0, 0, 0)],
        "a_flair.nii has a pixdim of 0 x 0 x 0, which is not a size; that of the sform is used "
        "(2.2 x 2.2 x 3 mm).",
    ),
    "pixdim NaN": ([pixdim(np.nan)], "has a pixdim of nan x 2.2 x 3, which is not a size;"),
    "negative": ([pixdim(-2.2)], "has a pixdim of -2.2 x 2.2 x 3, which is not a size;"),
    "unknown unit": ([unit(5)], "has an unknown unit of length (xyzt_units 5); mm is used."),
    "unknown sform code": ([sform_code(9)], "an unknown sform_code 9; the sform is taken for"),
    "sform code below zero": ([sform_code(-3)], "an unknown sform_code -3; the sform is not used"),
    "qfac": ([pixdim(5, first=0), NO_SFORM], "has a qfac (pixdim[0]) of 5, which has to be 1 or"),
    "no code": (
        [NO_SFORM, qform_code(0)],
        "a_flair.nii does not say how it lies (sform and qform code 0): left may be right. Its "
        "axes are taken to run to the left, to the front and up, with voxels of 2.2 x 2.2 x 3 mm "
        "by pixdim.",
    ),
}


@pytest.mark.parametrize("two", [False, True], ids=["NIfTI-1", "NIfTI-2"])
@pytest.mark.parametrize("name", [*SILENT, *(f"noted: {name}" for name in NOTED)])
def test_what_is_understood_gives_the_right_volume_and_is_noted(
    tmp_path: Path, name: str, two: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    edits, expected = SILENT.get(name, []), ""
    if name not in SILENT:
        edits, expected = NOTED[name.removeprefix("noted: ")]
    volume = read(write(tmp_path / "a_flair.nii", BRAIN, edits, two=two))
    assert volume.geometry.voxel_mm3 == pytest.approx(MM3, rel=1e-5)
    affine = read_image(tmp_path / "a_flair.nii").affine
    np.testing.assert_array_equal(affine, volume.geometry.affine)
    assert volume.foreground.sum() == (BRAIN > 0).sum()
    assert len(volume.notes) == bool(expected)
    assert expected in " ".join(volume.notes)
    assert capfd.readouterr() == ("", "")


def damage(content: bytearray, two: bool) -> None:
    """Write a quaternion that is not a number into the header."""
    struct.pack_into("<f", content, 256, np.nan)


def moved(x_mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += x_mm
    return affine


def turned(degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return nib.affines.from_matvec(np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])) @ AFFINE


PLACES: dict[str, tuple[np.ndarray, str]] = {
    "30 mm": (moved(30), "place it up to 30 mm apart; the sform is used."),
    "3 mm": (moved(3), "place it up to 3 mm apart; the sform is used."),
    "a turn": (turned(20), "mm apart and turned by 20 degrees; the sform is used."),
    "mirrored": (
        np.diag([-1.0, 1, 1, 1]) @ AFFINE,
        "mm apart and mirrored: left in one is right in the other; the sform is used.",
    ),
    "damaged": (np.full((4, 4), np.nan), "has a qform that is damaged; the sform is used."),
}


@pytest.mark.parametrize("name", PLACES)
def test_forms_that_disagree_on_place_are_noted_and_the_result_lies_on_the_scan(
    tmp_path: Path, name: str
) -> None:
    affine, expected = PLACES[name]
    path = write(tmp_path / "a_flair.nii", BRAIN, [damage if name == "damaged" else qform(affine)])
    detection = thresholding().detect(path)
    (note,) = [note for note in detection.volume.notes if "form" in note]
    assert expected in note
    assert detection.volume.geometry.voxel_mm3 == pytest.approx(MM3, rel=1e-5)
    _, mask = detection.save(tmp_path / "out")[:2]
    np.testing.assert_allclose(detection.lesions[0].centroid_mm, LESION_MM, atol=3)
    np.testing.assert_allclose(found_mm(mask), LESION_MM, atol=3)
    before, after = nib.load(path).header, nib.load(mask).header
    for field in ("qoffset_x", "quatern_b", "quatern_c", "quatern_d", "srow_x", "pixdim"):
        np.testing.assert_array_equal(before[field], after[field], err_msg=field)


@pytest.mark.parametrize("mm", [0.0, 0.5, 2.0])
def test_forms_that_differ_by_less_than_a_voxel_are_not_noted(tmp_path: Path, mm: float) -> None:
    assert read(write(tmp_path / "a_flair.nii", BRAIN, [qform(moved(mm))])).notes == ()


def test_slices_run_as_the_sign_of_qfac_says(tmp_path: Path) -> None:
    for qfac, up in ((-7.0, -1), (7.0, 1), (0.0, 1)):
        path = write(tmp_path / "a_flair.nii", BRAIN, [pixdim(qfac, first=0), NO_SFORM])
        volume = read(path)
        assert np.sign(volume.geometry.affine[2, 2]) == up
        assert f"qfac (pixdim[0]) of {qfac:g}" in volume.notes[0]
        write_image(tmp_path / "out.nii", volume.geometry.to_image(volume.data[0]))
        assert nib.load(tmp_path / "out.nii").header["pixdim"][0] == up


def test_results_of_a_scan_without_pixdim_have_the_size_of_its_sform(tmp_path: Path) -> None:
    path = write(tmp_path / "a_flair.nii", BRAIN, [pixdim(0, 0, 0)])
    detection = thresholding().detect(path)
    assert detection.mask is not None
    found = sum(lesion.volume_mm3 for lesion in detection.lesions)
    assert found == pytest.approx(detection.mask.sum() * MM3, rel=1e-5)
    for result in detection.save(tmp_path / "out")[:3]:
        sizes = nib.load(result).header["pixdim"][1:4]
        np.testing.assert_allclose(sizes, [2.2, 2.2, 3], rtol=1e-6)
        assert read_noted_image(result)[1] == []


def files(folder: Path, edited: str, edits: Sequence[Edit]) -> Case:
    paths = {
        kind: write(folder / f"a_{kind}.nii", values, edits if kind == edited else [])
        for kind, values in KINDS.items()
    }
    channels = {kind: paths[kind] for kind in ("flair", "t1")}
    return Case("a", channels, label=paths["seg"], mask=paths["mask"])


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_checked(tmp_path: Path, kind: str, resampled: bool) -> None:
    noted = read_volume(
        files(tmp_path, kind, [qform(moved(30))]), ["flair", "t1"], resampled=resampled
    )
    assert [note for note in noted.notes if f"a_{kind}.nii has an sform and a qform" in note]
    assert noted.label is not None and noted.label.sum() * MM3 == pytest.approx(786 * MM3)
    refused = files(tmp_path, kind, [pixdim(1.1, 1.1, 1.5)])
    if kind == "seg" and resampled:
        left_out = read_volume(refused, ["flair", "t1"], resampled=True)
        assert left_out.label is None and "two voxel sizes" in left_out.notes[-1]
        return
    with pytest.raises(AnomriError, match=rf"a_{kind}.nii: {TWO_SIZES}"):
        read_volume(refused, ["flair", "t1"], resampled=resampled)


@pytest.mark.parametrize("kind", ["label", "map"])
def test_evaluation_of_maps_checks_maps_and_labels(tmp_path: Path, kind: str) -> None:
    def make(edits: Sequence[Edit]) -> Case:
        own = {"label": [], "map": [], kind: list(edits)}
        write(tmp_path / "a_anomaly.nii", BRAIN / 1000, own["map"])
        return Case("a", {}, label=write(tmp_path / "a_seg.nii", KINDS["seg"], own["label"]))

    name = "a_seg.nii" if kind == "label" else "a_anomaly.nii"
    evaluation = evaluate([make([qform(moved(30))])], maps=tmp_path, threshold=0.8)
    row = evaluation.protocol["labels" if kind == "label" else "scans"]
    assert row.startswith(f"a: {name} has an sform and a qform that place it up to 30 mm apart")
    with pytest.raises(AnomriError, match=f"{name}: its header gives no size of a voxel"):
        evaluate([make([pixdim(0, 0, 0), NO_SFORM])], maps=tmp_path, threshold=0.8)


def test_an_evaluation_of_a_model_shows_notes_on_headers(tmp_path: Path) -> None:
    case = files(tmp_path, "flair", [qform(moved(30))])
    evaluation = evaluate([case], model=thresholding())
    assert evaluation.protocol["scans"].startswith("a: a_flair.nii has an sform and a qform")


def test_a_label_read_alone_is_noted_if_it_does_not_say_how_it_lies(tmp_path: Path) -> None:
    path = write(tmp_path / "a_seg.nii", KINDS["seg"], [NO_SFORM, qform_code(0)])
    label, geometry = read_label(Case("a", {}, label=path))
    assert geometry.voxel_mm3 == pytest.approx(MM3, rel=1e-5)
    assert label.notes[0].startswith("a_seg.nii does not say how it lies")


# Images without a position.


def test_a_scan_without_a_position_takes_that_of_another_channel(tmp_path: Path) -> None:
    silent = [NO_SFORM, qform_code(0)]
    case = files(tmp_path, "flair", silent)
    # The axes of the file run forward, to the left and up.
    affine = AFFINE[:, [1, 0, 2, 3]]
    data = scan((80, 64, 40), affine).astype(np.float32)
    for kind in ("flair", "t1"):
        image = nib.Nifti1Image(data, affine)
        if kind == "flair":
            image.set_sform(None, 0)
            image.set_qform(None, 0)
        nib.save(image, case.channels[kind])
    volume = read_volume(Case("a", case.channels), ["flair", "t1"], resampled=True)
    np.testing.assert_array_equal(volume.data[0], volume.data[1])
    np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-5)
    assert volume.notes == (
        "a_flair.nii does not say how it lies (sform and qform code 0): it was taken to lie as "
        "a_t1.nii, which has as many voxels.",
    )
    written = volume.geometry.to_image(volume.data[0])
    assert written.header["sform_code"] == written.header["qform_code"] == 0
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), data)


def test_a_label_without_a_position_lies_on_the_scan_without_one_beside_a_channel_with_one(
    tmp_path: Path,
) -> None:
    silent = [NO_SFORM, qform_code(0)]
    flair = write(tmp_path / "a_flair.nii", BRAIN, silent)
    t1, seg = write(tmp_path / "a_t1.nii"), write(tmp_path / "a_seg.nii", KINDS["seg"], silent)
    case = Case("a", {"flair": flair, "t1": t1}, label=seg)
    volume = read_volume(case, ["flair", "t1"], resampled=True)
    assert volume.label is not None and volume.label.sum() == LESION.sum()
    assert (volume.data[0][volume.label] > 700).mean() > 0.9
    with pytest.raises(AnomriError, match=r"a_t1.nii \(a_seg.nii does not say how it lies: sform"):
        read_volume(Case("a", {"t1": t1}, label=seg), ["t1"])


def test_a_scan_without_a_position_must_have_the_voxel_size_of_the_others(tmp_path: Path) -> None:
    made_up = [pixdim(1, 1, 1), NO_SFORM, qform_code(0)]
    case = files(tmp_path, "flair", made_up)
    with pytest.raises(AnomriError, match=r"voxels have 1 x 1 x 1 mm, those of a_t1.nii 2.2 x 2.2"):
        read_volume(case, ["flair", "t1"], resampled=True)
    with pytest.raises(AnomriError, match=r"those of a_mask.nii 2.2 x 2.2 x 3 mm"):
        read_volume(Case("a", {"flair": case.channels["flair"]}, mask=case.mask), ["flair"],
                    resampled=True)  # fmt: skip


def test_nothing_is_resampled_between_two_places_that_are_made_up(tmp_path: Path) -> None:
    silent = [NO_SFORM, qform_code(0)]
    flair = write(tmp_path / "a_flair.nii", BRAIN, silent)
    t1 = write(tmp_path / "a_t1.nii", BRAIN[:, :, :-4].copy(), silent)
    with pytest.raises(AnomriError, match=r"a_t1.nii: has \(64, 80, 36\) voxels"):
        read_volume(Case("a", {"flair": flair, "t1": t1}), ["flair", "t1"], resampled=True)


# Sizes that no brain has.


def scaled(folder: Path, factor: float) -> Case:
    affine = np.diag([factor, factor, factor, 1]) @ AFFINE
    nib.save(nib.Nifti1Image(BRAIN, affine), folder / "a_flair.nii")
    return Case("a", {"flair": folder / "a_flair.nii"})


@pytest.mark.parametrize(("factor", "noted"), [(0.1, True), (0.5, False), (1, False)])
def test_a_brain_that_is_too_short_is_noted(tmp_path: Path, factor: float, noted: bool) -> None:
    notes = prepare(scaled(tmp_path, factor), ["flair"]).notes
    assert len(notes) == noted
    if noted:
        assert notes[0] == (
            "a_flair.nii: what is above zero is 16 mm long, with voxels of 0.22 x 0.22 x 0.3 mm; if "
            "the voxel size in the header is wrong, so are volumes in mm3."
        )


def test_a_brain_that_is_longer_than_any_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        AnomriError, match="a_flair.nii: what is above zero is 1,628 mm long, .* header"
    ):
        prepare(scaled(tmp_path, 10), ["flair"])


# nibabel's own messages.


def test_nibabel_says_nothing_in_threads_and_its_own_users_still_hear_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a_flair.nii", BRAIN, [pixdim(0, 0, 0)])
    threads = [threading.Thread(target=read_image, args=(path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read_volume(Case("a", {"flair": path, "t1": path}), ["flair", "t1"], resampled=True)
    assert capfd.readouterr() == ("", "") and not caplog.records
    with caplog.at_level(logging.WARNING):
        nib.load(path)
    assert "should be non-zero" in caplog.text


def test_the_command_prints_the_note_and_no_line_of_nibabel(tmp_path: Path) -> None:
    write(tmp_path / "a_flair.nii", BRAIN, [pixdim(0, 0, 0)])
    thresholding().save(tmp_path / "model")
    command = [sys.executable, "-m", "anomri", "detect", "-m", str(tmp_path / "model")]
    command += ["-i", str(tmp_path / "a_flair.nii"), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "a_flair.nii has a pixdim of 0 x 0 x 0, which is not a size" in said
    assert "should be non-zero" not in said


def test_an_image_that_nibabel_repaired_on_loading_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a_flair.nii", BRAIN, [pixdim(0, 0, 0), NO_SFORM])
    image = nib.load(path)
    assert nib.affines.voxel_sizes(image.affine) == pytest.approx(1)
    with pytest.raises(AnomriError, match=f"a_flair.nii: {NO_SIZE} 0 x 0 x 0"):
        thresholding().detect(image)
    mended = nib.Nifti1Image(np.asanyarray(image.dataobj), AFFINE)
    assert thresholding().detect(mended).volume.geometry.voxel_mm3 == pytest.approx(MM3, rel=1e-5)


def test_a_unit_that_is_corrected_in_memory_counts(tmp_path: Path) -> None:
    image = nib.load(write(tmp_path / "a_flair.nii", BRAIN, [unit(3)]))
    with pytest.raises(AnomriError, match="a_flair.nii: its header gives sizes in micrometres"):
        thresholding().detect(image)
    image.header.set_xyzt_units("mm")
    assert thresholding().detect(image).volume.geometry.voxel_mm3 == pytest.approx(MM3, rel=1e-5)


# Training.


def test_training_shows_notes_on_scans_once_also_from_the_cache(
    cohort: Path, tmp_path: Path, tiny_preset: None
) -> None:
    cases = anomri.find_cases(cohort)
    case = next(case for case in cases if case.split == "train")
    channel, source = next(iter(case.channels.items()))
    content = nib.load(source)
    place = content.affine.copy()
    place[0, 3] += 30
    image = nib.Nifti1Image(np.asanyarray(content.dataobj), content.affine)
    image.set_sform(content.affine, 1)
    image.set_qform(place, 1)
    nib.save(image, tmp_path / source.name)
    case.channels[channel] = tmp_path / source.name
    expected = f"{case.name}: {source.name} has an sform and a qform that place it up to 30 mm"
    for number in range(2):
        notes: list[str] = []
        anomri.train(
            cases,
            tmp_path / f"model{number}",
            preset="tiny",
            training={"steps": 2, "validate_every": 2},
            cache=tmp_path / "cache",
            device="cpu",
            progress=lambda state, notes=notes: notes.append(state.note),
        )
        assert sum(note.startswith(expected) for note in notes) == 1


def test_a_comparison_shows_each_note_once() -> None:
    text = StringIO()
    with comparison_progress(Console(file=text)) as show:
        for job in ("dae", "vae"):
            show(job, Progress("pack", 1, 1, note="a: a_flair.nii has an sform"))
    assert text.getvalue().count("note: a: a_flair.nii has an sform") == 1


def test_training_refuses_a_scan_whose_header_gives_no_voxel_size(
    cohort: Path, tmp_path: Path, tiny_preset: None
) -> None:
    cases = anomri.find_cases(cohort)
    for case in cases:
        (channel, source), *_ = case.channels.items()
        if case.split == "val":
            content = bytearray(nib.load(source).to_bytes())
            pixdim(0, 0, 0)(content, False)
            NO_SFORM(content, False)
            qform_code(1)(content, False)
            (tmp_path / "b_flair.nii").write_bytes(bytes(content))
            case.channels[channel] = tmp_path / "b_flair.nii"
            break
    with pytest.raises(AnomriError, match=f"(?s)1 of 7 cases .*b_flair.nii: {NO_SIZE} 0 x 0 x 0"):
        anomri.train(cases, tmp_path / "model", preset="tiny", cache=tmp_path / "cache")
