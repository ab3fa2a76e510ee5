import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

import anomri
from anomri.errors import AnomriError
from anomri.model.detection import Detection
from anomri.model.detector import Detector
from anomri.reporting.pictures import COLUMNS, PANEL, preview
from anomri.runs.detect import detect_cohort
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.volume import Volume
from anomri.spec import ModelSpec, Score
from conftest import AFFINE, write


@pytest.fixture
def lesioned(cohort: Path) -> Case:
    return find_cases(cohort)[7]


def test_the_lesion_is_found_in_the_scans_own_grid(
    model: Path, lesioned: Case, tmp_path: Path
) -> None:
    detection = anomri.load(model).detect(lesioned)
    written = detection.save(tmp_path, reconstruction=True)
    kinds = ("anomaly", "mask", "lesions", "reconstruction")
    names = [*(f"case7_{kind}.nii.gz" for kind in kinds), "case7.json"]
    assert [path.name for path in written] == names
    source = nib.load(lesioned.channels["flair"])
    label = np.asarray(nib.load(lesioned.label).dataobj) > 0
    images = anomaly, mask, numbered, healthy = [nib.load(path) for path in written[:4]]
    for image, dtype in zip(images, (np.float32, np.uint8, np.uint8, np.float32), strict=True):
        assert image.shape[:3] == source.shape
        assert image.get_data_dtype() == dtype
        np.testing.assert_array_equal(image.affine, source.affine)
    assert healthy.shape[3] == 2
    scores = anomaly.get_fdata()
    summary = json.loads(written[-1].read_text())
    assert scores[label].mean() > 3 * scores[~label].mean()
    assert anomaly.header["cal_max"] > anomaly.header["cal_min"] > 0
    found = np.asarray(mask.dataobj) > 0
    assert 0 < found.sum() <= (scores > summary["threshold"]).sum()
    assert (scores[found] > summary["threshold"]).all()
    # The image of lesions has the numbers of the table as values.
    labels = np.asarray(numbered.dataobj)
    np.testing.assert_array_equal(labels > 0, found)
    voxel_mm3 = 3.75 * 3.75 * 8
    for lesion in summary["lesions"]:
        inside = labels == lesion["lesion"]
        assert inside.sum() * voxel_mm3 == pytest.approx(lesion["volume_mm3"])
        assert scores[inside].max() == pytest.approx(lesion["peak"])
    assert labels.max() == len(summary["lesions"])
    # The reconstruction is in the scan's own intensities.
    inside = ndimage.binary_erosion(source.get_fdata() > 0, iterations=3) & ~label
    ratio = healthy.get_fdata()[..., 0][inside] / source.get_fdata()[inside]
    assert np.median(ratio) == pytest.approx(1, abs=0.15)
    assert summary["lesions"][0]["volume_mm3"] == pytest.approx(
        np.bincount(ndimage.label(found, np.ones((3, 3, 3)))[0][found])[1:].max() * 3.75 * 3.75 * 8
    )


def test_lesion_rows_give_the_place_in_scanner_mm(model: Path, lesioned: Case) -> None:
    detection = Detector.load(model).detect(lesioned)
    assert detection.mask is not None
    components, _ = ndimage.label(detection.mask, np.ones((3, 3, 3)))
    first = detection.lesions[0]
    inside = components == np.argmax(np.bincount(components[detection.mask]))
    centre = nib.affines.apply_affine(
        detection.volume.geometry.canonical_affine, ndimage.center_of_mass(inside)
    )
    np.testing.assert_allclose(first.centroid_mm, centre, atol=0.01)
    assert first.peak == pytest.approx(float(detection.anomaly_map[inside].max()))
    assert first.mean == pytest.approx(float(detection.anomaly_map[inside].mean()), rel=1e-5)
    volumes = [lesion.volume_mm3 for lesion in detection.lesions]
    assert volumes == sorted(volumes, reverse=True)


def test_saving_and_loading_gives_the_same_map_bit_for_bit(
    model: Path, lesioned: Case, tmp_path: Path
) -> None:
    detector = Detector.load(model)
    before = detector.detect(lesioned)
    detector.save(tmp_path / "copy")
    after = anomri.load(tmp_path / "copy").detect(lesioned)
    np.testing.assert_array_equal(before.anomaly_map, after.anomaly_map)
    assert ModelSpec.read(tmp_path / "copy" / "model.json") == detector.spec


def test_maps_are_not_rescaled_per_image(model: Path, lesioned: Case, tmp_path: Path) -> None:
    brighter = {}
    for channel, path in lesioned.channels.items():
        image = nib.load(path)
        brighter[channel] = write(
            tmp_path / f"b_{channel}.nii.gz", (7 * image.get_fdata()).astype(np.float32), AFFINE
        )
    detector = Detector.load(model, precision="32-true")  # bfloat16 rounds each scan in its own way
    first, second = detector.detect(lesioned), detector.detect(Case("b", brighter))
    np.testing.assert_allclose(first.anomaly_map, second.anomaly_map, atol=1e-4)
    assert first.display_range == second.display_range


def test_a_brain_larger_than_the_training_crop_is_seen_whole(model: Path, lesioned: Case) -> None:
    detector = Detector.load(model)
    assert detector.spec.crop is not None
    detector.spec = replace(detector.spec, crop=(56, 72, 56, 72))
    detection = detector.detect(lesioned)
    seen = detection.reconstructed.abs().sum(dim=1) > 0
    assert torch.equal(seen, detection.stack.foreground)


def test_a_model_of_one_channel_takes_one_file(cohort: Path, cache: Path, tmp_path: Path) -> None:
    arguments = {"preset": "tiny", "training": {"steps": 2}, "channels": ["flair"]}
    detector = anomri.train(cohort, tmp_path / "m", cache=cache, **arguments)
    scan = shutil.copy(cohort / "case7" / "case7_flair.nii.gz", tmp_path / "any-name.nii.gz")
    assert detector.detect(scan).anomaly_map.max() > 0
    assert detect_cohort(scan, tmp_path / "out", detector)[0].error is None
    # A name that says another channel is no longer one file without a name: folders and tables name
    # theirs.
    folder = tmp_path / "p"
    folder.mkdir()
    shutil.copy(scan, folder / "p_t1.nii.gz")
    with pytest.raises(AnomriError, match="flair is missing"):
        detector.detect(folder)


def test_other_channels_are_refused_with_what_to_do(
    model: Path, cohort: Path, tmp_path: Path
) -> None:
    only = Case(
        "p",
        {
            "t2": cohort / "case7" / "case7_flair.nii.gz",
            "flair": cohort / "case7" / "case7_flair.nii.gz",
        },
    )
    with pytest.raises(
        AnomriError,
        match="p: this model was trained on flair, t1, but the scan has .*t1 is missing",
    ):
        Detector.load(model).detect(only)
    with pytest.raises(AnomriError, match="holds 9 cases; name one"):
        Detector.load(model).detect(cohort)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.json", None, "has no model.json"),
        ("model.json", b"{", "model.json: not a model description"),
        ("model.json", b'{"method": "dae"}', "model.json: .*channels: Field required"),
        ("weights.safetensors", None, "weights.safetensors: cannot be read .No such file"),
        (
            "weights.safetensors",
            b"\x80\x04pickle",
            "weights.safetensors: does not contain the weights",
        ),
    ],
)
def test_a_damaged_model_is_named(
    model: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / file).unlink()
    if content is not None:
        (tmp_path / "m" / file).write_bytes(content)
    with pytest.raises(AnomriError, match=message):
        Detector.load(tmp_path / "m")


def test_weights_of_another_network_are_refused(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "m")
    description = json.loads((model / "model.json").read_text())
    description["settings"]["widths"] = [8, 16, 32, 64]
    (tmp_path / "m" / "model.json").write_text(json.dumps(description))
    with pytest.raises(AnomriError, match="does not contain the weights that model.json describes"):
        Detector.load(tmp_path / "m")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A GPU's network does not depend on how many threads its processor has; this one would round by it.
@pytest.mark.usefixtures("one_thread")
def test_scans_detected_in_parallel_give_the_same_files(
    model: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scans"
    for name in ("case3", "case6", "case7", "case8"):
        shutil.copytree(cohort / name, folder / name)
    (folder / "case6" / "case6_flair.nii.gz").write_bytes(b"no image")
    detect_cohort(folder, tmp_path / "alone", model)
    # As beside a GPU with eight processors.
    monkeypatch.setattr(Detector, "device", property(lambda detector: torch.device("cuda")))
    monkeypatch.setattr("anomri.runs.pipeline.usable_processors", lambda: 8)
    at_once, most = set[int](), list[int]()
    detect = Detector.detect

    def counted(detector: Detector, volume: Volume) -> Detection:
        at_once.add(threading.get_ident())
        most.append(len(at_once))
        time.sleep(0.2)
        try:
            return detect(detector, volume)
        finally:
            at_once.discard(threading.get_ident())

    monkeypatch.setattr(Detector, "detect", counted)
    results = detect_cohort(folder, tmp_path / "beside", Detector.load(model, "cpu"))
    assert max(most) > 1
    assert [result.case for result in results] == ["case3", "case6", "case7", "case8"]
    assert [result.error is None for result in results] == [True, False, True, True]
    maps = sorted(path.name for path in (tmp_path / "alone").glob("*.nii.gz"))
    assert maps == sorted(path.name for path in (tmp_path / "beside").glob("*.nii.gz"))
    for name in maps:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes()


def test_a_cohort_run_continues_after_a_bad_case(model: Path, cohort: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    for name in ("case6", "case7", "case8"):
        shutil.copytree(cohort / name, folder / name)
    broken = folder / "case7" / "case7_t1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:500])
    results = detect_cohort(folder, tmp_path / "out", model)
    assert [result.error is None for result in results] == [True, False, True]
    assert "case7_t1.nii.gz" in (results[1].error or "")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "case6_anomaly.nii.gz",
        "case8_mask.nii.gz",
        "cases.tsv",
        "lesions.tsv",
        "run.json",
        "report.html",
    } <= written
    assert not {name for name in written if name.startswith(("case7", ".partial"))}
    rows = [line.split("\t") for line in (tmp_path / "out" / "cases.tsv").read_text().splitlines()]
    assert [row[:2] for row in rows] == [
        ["case", "status"],
        ["case6", "done"],
        ["case7", "failed"],
        ["case8", "done"],
    ]
    assert rows[1][2:4] == ["flair,t1", f"{results[0].summary['threshold']:.5g}"]  # type: ignore[index]
    lesions = (tmp_path / "out" / "lesions.tsv").read_text().splitlines()
    assert lesions[0].split("\t")[:3] == ["case", "lesion", "volume_mm3"]
    assert sum(line.startswith("case8") for line in lesions) == int(rows[3][4])


def test_detecting_again_in_the_folder_of_the_scans_gives_the_same(
    model: Path, cohort: Path, tmp_path: Path
) -> None:
    shutil.copytree(cohort / "case7", tmp_path / "case7")
    first = detect_cohort(tmp_path / "case7", tmp_path / "case7", model)
    second = detect_cohort(tmp_path / "case7", tmp_path / "case7", model)
    assert first[0].summary == second[0].summary
    assert len(second) == 1


def test_an_error_of_torch_fails_only_its_case(
    model: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Detector.score

    def out_of_memory(self: Detector, stack: object) -> object:
        if len(calls) == 0:
            calls.append(1)
            raise RuntimeError("can't allocate memory: you tried to allocate\n99 bytes")
        return score(self, stack)  # type: ignore[arg-type]

    calls: list[int] = []
    monkeypatch.setattr(Detector, "score", out_of_memory)
    cases = [case for case in find_cases(cohort) if case.split == "test"]
    results = detect_cohort(cases, tmp_path, model)
    assert (
        results[0].error
        == "case7: RuntimeError: can't allocate memory: you tried to allocate 99 bytes"
    )
    assert results[1].error is None


def test_pictures_without_a_threshold_keep_their_titles(model: Path, lesioned: Case) -> None:
    detector = Detector.load(model)
    detector.spec = replace(detector.spec, thresholds=None)
    picture = preview(detector.detect(lesioned), 0)
    assert picture is not None and picture.shape == (PANEL, PANEL * len(COLUMNS), 3)


def test_a_model_of_a_newer_format_is_refused(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "m")
    text = (model / "model.json").read_text()
    (tmp_path / "m" / "model.json").write_text(
        text.replace('"format_version": 1', '"format_version": 2')
    )
    with pytest.raises(AnomriError, match="written by a newer version of anomri"):
        Detector.load(tmp_path / "m")


@pytest.mark.slow
def test_only_a_few_volumes_are_in_memory_at_once(
    model: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many cases there are, only a few volumes live at once."""
    import gc
    import weakref

    alive: list[weakref.ref[object]] = []
    most = 0
    read = Detector.read

    def watched(self: Detector, *scan: object) -> object:
        nonlocal most
        volume = read(self, *scan)  # type: ignore[arg-type]
        alive.append(weakref.ref(volume.inside))
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return volume

    monkeypatch.setattr(Detector, "read", watched)
    case = find_cases(cohort)[7]
    cases = [Case(f"c{k}", case.channels) for k in range(6)]
    assert all(result.error is None for result in detect_cohort(cases, tmp_path, model))
    assert len(alive) == 6
    assert most <= 4


def test_small_lesions_are_dropped_by_volume_whatever_the_slice_thickness(
    model: Path, cohort: Path
) -> None:
    score = Score()
    assert score.max_dropped((1.0, 1.875, 1.875)) == 20  # as in the paper
    assert score.max_dropped((5.0, 1.875, 1.875)) == 4
    assert (
        score.max_dropped((1.0, 1.875, 1.875), 1.0)
        == 70
        == 5 * score.max_dropped((5.0, 1.875, 1.875), 5.0)
    )
    least = replace(score, min_volume_mm3=10.0)
    assert [least.max_dropped((1.0, 1.0, 1.0), mm3) for mm3 in (1.0, 3.0, 5.0, 20.0)] == [
        9,
        3,
        1,
        0,
    ]
    detector, case = Detector.load(model), find_cases(cohort)[7]
    voxel = detector.detect(case).volume.geometry.voxel_mm3
    all_of_them = detector.with_min_volume(0).detect(case).lesions
    for least in (3 * voxel, 20 * voxel):
        kept = detector.with_min_volume(least).detect(case).lesions
        assert [one.volume_mm3 for one in kept] == [
            o.volume_mm3 for o in all_of_them if o.volume_mm3 >= least - 1e-3
        ]


def test_images_in_memory_are_taken_and_returned(model: Path, cohort: Path, tmp_path: Path) -> None:
    detector, case = Detector.load(model), find_cases(cohort)[7]
    images = {name: nib.load(path) for name, path in case.channels.items()}
    turned = {name: nib.as_closest_canonical(image) for name, image in images.items()}
    found = detector.detect(case)
    for given in (images, turned, {**images, "flair": case.channels["flair"]}):
        assert np.array_equal(detector.detect(given).anomaly_map, found.anomaly_map)
    found.save(tmp_path, reconstruction=True)
    for kind in ("anomaly", "mask", "lesions", "reconstruction"):
        image, written = found.image(kind), nib.load(tmp_path / f"{found.name}_{kind}.nii.gz")  # type: ignore[arg-type]
        assert (
            np.array_equal(image.affine, images["flair"].affine)
            and image.shape[:3] == images["flair"].shape
        )
        assert np.array_equal(np.asanyarray(image.dataobj), np.asanyarray(written.dataobj))  # type: ignore[attr-defined]
    back = nib.as_closest_canonical(detector.detect(turned).image())
    assert np.array_equal(
        np.asanyarray(back.dataobj), np.asanyarray(nib.as_closest_canonical(found.image()).dataobj)
    )
    with pytest.raises(AnomriError, match="t1 is missing"):
        detector.detect(images["flair"])
    with pytest.raises(AnomriError, match="name it in letters and digits"):
        detector.detect({"../x": images["flair"]})
    assert detector.detect(images, name="p7").name == "p7"
    with pytest.raises(
        AnomriError,
        match="no image 'foo'; the images are anomaly, mask, lesions, reconstruction",
    ):
        found.image("foo")  # type: ignore[arg-type]
    with pytest.raises(AnomriError, match="has no threshold, so there is no mask"):
        detector.with_score(median=0).detect(case).image("mask")
