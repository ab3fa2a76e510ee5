"""What is done to a scan before a model sees it: brain mask, skull, shading, space; and scaling
that holds."""

import os
import re
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from anomri.cli import main
from anomri.errors import AnomriError
from anomri.optional import install_command
from anomri.scans.find import find_cases
from anomri.scans.nifti import read_image
from anomri.scans.prepare import CEILING, Preparation, prepare
from anomri.scans.read import read_volume
from anomri.scans.register import register, rotation_degrees, template
from anomri.scans.skull import TOOLS, find_skull
from anomri.slices import slice_volume
from anomri.spec import Grid, Scaling
from anomri.training.packing import pack_cohort
from anomri.training.train import train
from phantom import LESION_MM, found_mm, places, scan, thresholding

SHAPE, AFFINE = (64, 72, 56), nib.affines.from_matvec(np.diag([-3.0, -3, 3]), [94, 106, -82])


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data.astype(np.float32), affine), path)
    return path


def head(*, air: bool, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """A head (x, y, z) made of the template's brain, dark bone and a bright scalp, in noisy or
    empty air; its affine."""
    image, _ = template()
    brain = np.pad(np.asanyarray(image.dataobj), 12)
    inside = ndimage.binary_fill_holes(ndimage.binary_closing(brain > 0, iterations=2))
    bone = ndimage.binary_dilation(inside, iterations=4)
    scalp = ndimage.binary_dilation(bone, iterations=4)
    rng = np.random.default_rng(0)
    data = 800 * brain + 60 * (bone & (brain == 0)) + 700 * (scalp & ~bone)
    noise = np.hypot(*rng.normal(0, 8, (2, *brain.shape)))
    affine = image.affine @ nib.affines.from_matvec(np.eye(3), [-12, -12, -12 + (rows.start or 0)])
    return (data + noise if air else np.where(scalp, data + noise, 0))[..., rows], affine


# Skull.


@pytest.mark.slow
def test_no_real_stripped_scan_is_mistaken_for_a_head(real_scans: Path) -> None:
    cases = [*find_cases(real_scans / "brats18"), *find_cases(real_scans / "stroke")]
    assert len(cases) == 29
    for case in cases:
        assert find_skull(read_volume(case, list(case.channels), with_label=False)) is None, (
            case.name
        )


@pytest.mark.parametrize("air", [True, False])
@pytest.mark.parametrize("rows", [slice(None), slice(45, 95)])
def test_a_head_is_refused_with_what_to_do(
    tmp_path: Path, air: bool, rows: slice, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "in" / "p_flair.nii.gz", *head(air=air, rows=rows))
    thresholding().save(tmp_path / "m")
    assert (
        main(["detect", "-i", str(path), "-o", str(tmp_path / "out"), "-m", str(tmp_path / "m")])
        == 1
    )
    said = capsys.readouterr().err
    assert "p_flair.nii.gz: p still has its skull" in said
    assert "hd-bet -i p_flair.nii.gz -o p_flair_brain.nii.gz" in said
    assert "mri_synthstrip -i p_flair.nii.gz -o p_flair_brain.nii.gz -m p_flair_mask.nii.gz" in said
    assert "--skull-strip" in said
    assert not (tmp_path / "out" / "p_anomaly.nii.gz").exists()


def test_a_brain_mask_lets_a_head_in(tmp_path: Path) -> None:
    data, affine = head(air=True)
    path = save(tmp_path / "p_flair.nii.gz", data, affine)
    image, _ = template()
    mask = save(tmp_path / "brain.nii.gz", np.pad(np.asanyarray(image.dataobj), 12) > 0, affine)
    volume = thresholding().read(path, Preparation(brain_mask=mask))
    np.testing.assert_array_equal(
        volume.geometry.native(volume.data[0]) > 0, read_image(mask).get_fdata() > 0
    )
    small = save(tmp_path / "small.nii.gz", np.ones((8, 8, 8)), affine + np.diag([0, 0, 0, 0.0]))
    with pytest.raises(AnomriError, match="no voxel is above zero|does not overlap"):
        thresholding().read(
            save(tmp_path / "q_flair.nii.gz", np.pad(data[40:], 20), affine),
            Preparation(brain_mask=small),
        )


@pytest.mark.slow
def test_the_skull_is_stripped_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepbet", reason="needs anomri[bet]")
    monkeypatch.setattr("anomri.scans.skull.TOOLS", ())
    data, affine = head(air=True)
    other = save(tmp_path / "p_flair.nii.gz", data / 2, affine)
    path = save(tmp_path / "p_t1.nii.gz", data, affine)
    volume = thresholding("t1", "flair").read(
        {"t1": path, "flair": other}, Preparation(skull_strip=True)
    )
    brain = np.pad(np.asanyarray(template()[0].dataobj), 12) > 0
    found = volume.geometry.native(volume.data[0]) > 0
    np.testing.assert_array_equal(volume.data[0] > 0, volume.data[1] > 0)
    assert 2 * (brain & found).sum() / (brain.sum() + found.sum()) > 0.9
    assert "the brain was found by deepbet in channel t1" in volume.notes[0]


def test_deepbet_looks_at_t1_and_beyond_its_field_at_the_first_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool's answer is the brightest part, so that each channel has a brain of its own."""
    monkeypatch.setattr("anomri.scans.skull.TOOLS", ())
    looked_at = []

    def brightest(image: nib.Nifti1Image, name: str) -> np.ndarray:
        data = np.asanyarray(image.dataobj)
        looked_at.append(float(data.max()))
        return data > 0.9 * data.max()

    monkeypatch.setattr("anomri.scans.skull._run_deepbet", brightest)
    flair, t1 = np.zeros((2, *SHAPE))
    flair[6:58, 6:66, 6:50], t1[6:58, 6:66, 6:50] = 10, 20
    flair[14:50, 14:58, 14:48], t1[12:52, 12:60, 10:46] = 100, 200
    # As in a scan, no two voxels are quite alike.
    texture = np.random.default_rng(0).normal(1, 0.02, SHAPE).clip(0.95, 1.05)
    flair, t1 = flair * texture, t1 * texture
    in_flair, in_t1 = flair > 90, t1 > 180
    files = {
        "flair": save(tmp_path / "p_flair.nii.gz", flair),
        "t1": save(tmp_path / "p_t1.nii.gz", t1),
    }

    def strip(channels: dict[str, Path]) -> tuple[np.ndarray, str]:
        looked_at.clear()
        volume = thresholding(*channels).read(channels, Preparation(skull_strip=True))
        (note,) = (note for note in volume.notes if "the brain was found" in note)
        return volume.geometry.native(volume.data[0]) > 0, note

    alone, note = strip({"flair": files["flair"]})
    np.testing.assert_array_equal(alone, in_flair)
    assert "in channel flair: 1,454 ml. deepbet was made for T1" in note
    both, note = strip(files)
    assert looked_at == pytest.approx([210])
    np.testing.assert_array_equal(both, in_t1)
    assert note == "the brain was found by deepbet in channel t1: 1,866 ml."
    t1[..., 42:] = 0  # the field of T1 ends here
    save(files["t1"], t1)
    joined, note = strip(files)
    assert looked_at == pytest.approx([210, 105])
    np.testing.assert_array_equal(joined, (t1 > 180) | ((t1 == 0) & in_flair))
    assert "in channel t1, and in flair where t1 does not reach (257 ml of it): 1,915 ml." in note


TOOL = f"""#!{sys.executable}
import sys, nibabel as nib, numpy as np
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
image = nib.load(options["-i"])
if image.shape[0] < 60: sys.exit("out of memory")
brain = np.zeros(image.shape, np.float32)
brain[30:80, 30:90, 30:70] = image.get_fdata()[30:80, 30:90, 30:70] + 1
nib.save(nib.Nifti1Image(brain, image.affine), options["-o"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_an_installed_skull_stripping_tool_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    (tmp_path / tool).write_text(TOOL)
    (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    data, affine = head(air=True)
    volume = thresholding().read(
        save(tmp_path / "p_flair.nii.gz", data, affine), Preparation(skull_strip=True)
    )
    assert tool in volume.notes[0]
    assert (volume.data[0] > 0).sum() == 50 * 60 * 40
    with pytest.raises(AnomriError, match=f"{tool} failed .*out of memory"):
        thresholding().read(
            save(tmp_path / "q_flair.nii.gz", data[:50], affine), Preparation(skull_strip=True)
        )
    (tmp_path / tool).write_text(TOOL.replace("image.affine)", "2 * image.affine)"))
    with pytest.raises(AnomriError, match=f"{tool} gives a mask on another grid than the scan's"):
        thresholding().read(tmp_path / "p_flair.nii.gz", Preparation(skull_strip=True))


def test_without_a_skull_stripping_tool_the_error_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anomri.scans.skull.TOOLS", ())
    path = save(tmp_path / "p_flair.nii.gz", scan(SHAPE, AFFINE))
    for module, option, extra in (
        ("deepbet.bet", {"skull_strip": True}, "bet"),
        ("SimpleITK", {"register": True}, "register"),
        ("SimpleITK", {"bias_correction": True}, "register"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(AnomriError, match=re.escape(install_command(extra))):
                thresholding().read(path, Preparation(**option))


# Space.


@pytest.mark.slow
def test_a_tilted_head_is_turned_and_its_map_turned_back(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK", reason="needs anomri[register]")
    image, grid = template()
    lesion = np.array([30.0, -20, 25])
    brain = np.asanyarray(image.dataobj) * 800
    where = places(image.shape, image.affine)
    bright = ((where - lesion) ** 2).sum(-1) < 14**2
    brain = np.where(bright & (brain > 0), 1000, 0.7 * brain)
    # The same head, 15 degrees tilted and 20 mm off, scanned with slices of 3 mm.
    turn = Rotation.from_rotvec(np.radians(15) * np.array([2, 1, 2]) / 3).as_matrix()
    truth = nib.affines.from_matvec(turn, np.array([12.0, -14.4, 7.2]))
    affine = nib.affines.from_matvec(np.diag([-2.0, -2, 3]), [110, 100, -90])
    shape = (116, 126, 64)
    back = np.linalg.inv(image.affine) @ np.linalg.inv(truth) @ affine
    tilted = ndimage.affine_transform(brain, back[:3, :3], back[:3, 3], shape, order=1)
    path = save(tmp_path / "p_flair.nii.gz", tilted, affine)
    brain_scan = thresholding().read(path)
    volume, transform = register(brain_scan)
    np.testing.assert_array_equal(register(brain_scan)[1], transform)  # the same every time
    assert rotation_degrees(np.linalg.inv(transform) @ truth) < 1.5
    middle = nib.affines.apply_affine(np.linalg.inv(transform) @ truth, [0, -17, 5])
    np.testing.assert_allclose(middle, [0, -17, 5], atol=2)
    assert volume.data.shape[1:] == grid.shape == (240, 240, 155)
    assert volume.geometry.spacing_mm == pytest.approx((1, 1, 1))
    detection = thresholding().detect(volume)
    anomaly, mask = detection.save(tmp_path / "out")[:2]
    expected = nib.affines.apply_affine(truth, lesion)
    np.testing.assert_array_less(np.abs(found_mm(mask) - expected), 3)
    np.testing.assert_array_less(np.abs(np.array(detection.lesions[0].centroid_mm) - expected), 3)
    assert nib.load(anomaly).shape == shape
    np.testing.assert_array_equal(nib.load(anomaly).affine, nib.load(path).affine)
    assert np.mean(nib.load(anomaly).get_fdata()[tilted == 0] > 0) < 0.01
    assert "turned into the model's space" in detection.summary()["notes"][-1]


def test_an_image_without_a_brain_is_not_registered(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK", reason="needs anomri[register]")
    data = np.zeros(SHAPE)
    data[30:34, 20:60, 20:24] = np.random.default_rng(0).uniform(10, 99, (4, 40, 4))
    with pytest.raises(AnomriError, match="to the template failed|cannot be registered"):
        thresholding().read(save(tmp_path / "p_flair.nii.gz", data), Preparation(register=True))


# Scaling.


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    inside = (a > 0) | (b > 0)
    return float(np.corrcoef(a[inside], b[inside])[0, 1])


def test_saturated_and_negative_voxels_do_not_move_the_map(tmp_path: Path, model: Path) -> None:
    from anomri.model.detector import Detector
    from conftest import AFFINE as BRAIN_AFFINE
    from conftest import brain

    detector = Detector.load(model, "cpu")
    channels, _ = brain(np.random.default_rng(7), lesion=True)
    rng = np.random.default_rng(1)
    spoilt = {}
    for name, data in channels.items():
        worse = data.copy()
        worse[tuple(rng.choice(np.argwhere(data > 0), 20).T)] = 32767 * 8
        rim = ndimage.binary_dilation(data > 0, iterations=1) & (data == 0)
        worse[rim] = -rng.uniform(0, 0.03, int(rim.sum())) * data.max()
        spoilt[name] = save(tmp_path / "spoilt" / f"p_{name}.nii.gz", worse, BRAIN_AFFINE)
    clean = {
        name: save(tmp_path / "clean" / f"p_{name}.nii.gz", one, BRAIN_AFFINE)
        for name, one in channels.items()
    }
    before, after = detector.detect(clean), detector.detect(spoilt)
    for one, other in zip(before.stack.scale, after.stack.scale, strict=True):
        assert other == pytest.approx(one, rel=0.01)
    assert correlation(before.anomaly_map, after.anomaly_map) > 0.9
    assert sum("negative voxels" in note for note in after.volume.notes) == 2
    assert sum("20 voxels above 6 times" in note for note in after.volume.notes) == 2
    assert before.volume.notes == ()


def test_only_spikes_are_replaced_and_a_saturated_patch_is_capped(tmp_path: Path) -> None:
    data = scan(SHAPE, AFFINE).astype(np.float32)
    data[30:35, 30:35, 30:35] = 1e6
    data[20, 36, 28] = 1e6
    volume = thresholding().read(save(tmp_path / "a_flair.nii.gz", data))
    changed = volume.geometry.canonical(data) != volume.data[0]
    np.testing.assert_array_equal(changed, volume.geometry.canonical(data == 1e6))
    high = CEILING * np.percentile(data[data > 0], 99)
    assert volume.data.max() == pytest.approx(high)
    assert volume.geometry.native(volume.data[0])[20, 36, 28] < 700


def test_a_training_sees_a_spiky_scan_as_detection_does(tmp_path: Path) -> None:
    data = scan(SHAPE, AFFINE).astype(np.float32)
    data[20, 36, 28] = 1e9  # more than a packed slice of float16 holds
    save(tmp_path / "scans" / "a" / "a_flair.nii.gz", data)
    (case,) = find_cases(tmp_path / "scans")
    (packed,) = pack_cohort([case], ("flair",), Grid(), Scaling(), tmp_path / "cache")
    seen = slice_volume(prepare(case, ("flair",)), Grid(), Scaling())
    assert torch.equal(packed.stack(Scaling()).x, seen.x.half().float())


@pytest.mark.slow
def test_bias_correction_brings_a_shaded_scan_back(tmp_path: Path) -> None:
    pytest.importorskip("SimpleITK", reason="needs anomri[register]")
    data = scan(SHAPE, AFFINE)
    where = places(SHAPE, AFFINE)
    shade = np.exp(0.6 * where[..., 1] / 82 + 0.4 * where[..., 0] / 65)
    clean = thresholding().detect(save(tmp_path / "a_flair.nii.gz", data))
    path = save(tmp_path / "b_flair.nii.gz", data * shade)
    shaded, corrected = (
        thresholding().detect(path, Preparation(bias_correction=on)) for on in (False, True)
    )
    left = [correlation(clean.anomaly_map, one.anomaly_map) for one in (shaded, corrected)]
    assert left[0] < 0.7
    assert left[1] > 0.8
    np.testing.assert_array_less(np.abs(np.array(corrected.lesions[0].centroid_mm) - LESION_MM), 3)
    assert "N4" in corrected.volume.notes[0]


def test_standardised_intensities_are_refused(tmp_path: Path) -> None:
    data = scan(SHAPE, AFFINE)
    inside = data > 0
    data[inside] = (data[inside] - data[inside].mean()) / data[inside].std()
    with pytest.raises(AnomriError, match="looks standardised"):
        thresholding().detect(save(tmp_path / "a_flair.nii.gz", data))


def test_a_scan_as_published_is_left_unchanged(real_scans: Path) -> None:
    case = find_cases(real_scans / "brats18" / "Brats18_2013_11_1")[0]
    plain, prepared = read_volume(case, ["flair", "t1"]), prepare(case, ["flair", "t1"])
    np.testing.assert_array_equal(plain.data, prepared.data)
    assert prepared.notes == ()


def test_a_head_in_any_channel_is_refused_also_for_training(tmp_path: Path) -> None:
    data, affine = head(air=True)
    brain = np.pad(np.asanyarray(template()[0].dataobj), 12)
    for name in ("a", "b"):
        save(tmp_path / f"{name}_flair.nii.gz", brain, affine)
        save(tmp_path / f"{name}_t1.nii.gz", data, affine)
    cases = find_cases(tmp_path)
    with pytest.raises(AnomriError, match="a_t1.nii.gz: a still has its skull"):
        thresholding("flair", "t1").read(cases[0])
    with pytest.raises(AnomriError, match="_t1.nii.gz: . still has its skull"):
        train(cases, tmp_path / "m", preset="tiny", cache=tmp_path / "cache")


# Background.


def scan_with_fluid() -> np.ndarray:
    """A brain whose darkest tissue is nearly as dark as the air, as in real scans."""
    data = scan(SHAPE, AFFINE)
    data[28:36, 32:40, 24:32] *= 0.05
    return data


def standardised(data: np.ndarray) -> np.ndarray:
    inside = data[data > 0]
    return (data - inside.mean()) / inside.std()


RESCALED = {
    "brain + 5": lambda data: data + 5,
    "z-scores of the whole image": lambda data: (data - data.mean()) / data.std(),
    "z-scores of the brain": standardised,
    "from -1 to 1": lambda data: 2 * data / data.max() - 1,
    "NaN around the brain": lambda data: np.where(data > 0, data, np.nan),
    "-1 around the brain": lambda data: np.where(data > 0, data, -1),
}


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize("name", RESCALED)
def test_a_constant_background_is_taken_for_background(
    tmp_path: Path, name: str, dtype: type
) -> None:
    data = scan_with_fluid()
    (tmp_path / "in").mkdir()
    plain = thresholding().detect(save(tmp_path / "a_flair.nii.gz", data))
    rescaled = RESCALED[name](data)
    if dtype == np.int16 and np.isnan(rescaled).any():
        pytest.skip("integers hold no NaN")
    image = nib.Nifti1Image(rescaled, AFFINE)
    image.set_data_dtype(dtype)  # nibabel adds a slope and an intercept
    nib.save(image, tmp_path / "in" / "a_flair.nii.gz")
    found = thresholding().detect(tmp_path / "in" / "a_flair.nii.gz")
    assert "a_flair.nii.gz has a background of " in found.volume.notes[0]
    np.testing.assert_array_equal(found.volume.foreground, plain.volume.foreground)
    step = 0 if dtype == np.float32 else 1e-3
    np.testing.assert_allclose(found.anomaly_map, plain.anomaly_map, atol=1e-4 + step)
    expected = plain.summary()["lesion_volume_mm3"]
    assert found.summary()["lesion_volume_mm3"] == pytest.approx(expected, rel=0.02)


def test_each_channel_has_a_background_of_its_own_also_for_training(tmp_path: Path) -> None:
    data = scan_with_fluid()
    save(tmp_path / "a_flair.nii.gz", data)
    save(tmp_path / "a_t1.nii.gz", data + 5)
    (case,) = find_cases(tmp_path)
    volume = read_volume(case, ["flair", "t1"])
    np.testing.assert_allclose(volume.data[1], volume.data[0], atol=1e-3)
    save(tmp_path / "a_mask.nii.gz", data > 0)
    (masked,) = find_cases(tmp_path)
    volume = read_volume(masked, ["flair", "t1"])
    np.testing.assert_allclose(volume.data[1], volume.data[0], atol=1e-3)
    assert sum("background" in note for note in volume.notes) == 1


def test_a_background_that_is_no_background_is_refused_with_its_own_advice(tmp_path: Path) -> None:
    data = scan_with_fluid()
    for filled, message in {
        -40.0: "the background is -40, far below the darkest tissue",
        20.0: "the background is 20, and .* of the voxels are darker",
    }.items():
        standard = np.where(data > 0, standardised(data), filled)
        with pytest.raises(AnomriError, match=message):
            thresholding().detect(save(tmp_path / "a_flair.nii.gz", standard))
    holes = np.where(data > 0, data, np.nan)
    holes[30:33, 30:33, 30:33] = np.nan
    with pytest.raises(AnomriError, match="27 of its .* voxels are NaN or infinite"):
        thresholding().detect(save(tmp_path / "a_flair.nii.gz", holes))


def test_the_air_around_a_head_is_no_background(tmp_path: Path) -> None:
    data, affine = head(air=True)
    whole = np.rint(data / 4)
    for end in np.ndindex(2, 2, 2):
        whole[tuple(-one for one in end)] = 2  # as many voxels of such air are
    with pytest.raises(AnomriError, match="still has its skull"):
        thresholding().detect(save(tmp_path / "a_flair.nii.gz", whole, affine))


def test_a_real_scan_after_standardisation_is_the_scan_before(
    real_scans: Path, tmp_path: Path
) -> None:
    (case,) = find_cases(real_scans / "brats18" / "Brats18_2013_11_1")
    before = read_volume(case, ["flair"], with_label=False)
    values = nib.load(case.channels["flair"]).get_fdata()
    image = nib.load(case.channels["flair"])
    nib.save(
        nib.Nifti1Image(standardised(values).astype(np.float32), image.affine),
        tmp_path / "a_flair.nii.gz",
    )
    after = thresholding().read(tmp_path / "a_flair.nii.gz")
    np.testing.assert_array_equal(after.foreground, before.foreground)
    rescaled = after.data * (before.data.max() / after.data.max())
    np.testing.assert_allclose(rescaled, before.data, atol=1e-3 * before.data.max())
