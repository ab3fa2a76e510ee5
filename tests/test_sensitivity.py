import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import anomri
from anomri.cli import main
from anomri.errors import AnomriError
from anomri.model.lesions import find_edge, shares_at_edge, smallest_edge_distances
from anomri.model.sensitivity import choose_threshold, confidence, false_positive_words
from anomri.spec import HealthyScores, ModelSpec, Thresholds

HEALTHY = HealthyScores((0.1, 0.2, 0.3), (9.0, 1.5, 0.0), (0.25, 0.3, 0.3), (5, 1), 0.3)
THRESHOLDS = Thresholds((0.05, 0.01, 0.005, 0.001), (1.0, 2.0, 3.0, 4.0), 0.01, 10, 3, HEALTHY)


@pytest.mark.parametrize(
    ("asked", "value"),
    [
        ("highest", 1),
        ("high", 1),
        ("default", 2),
        ("LOW", 3),
        ("lowest", 4),
        ("0.1%", 4),
        ("0.005", 3),
        (0.05, 1),
    ],
)
def test_a_sensitivity_is_given_by_name_or_rate(asked: str | float, value: float) -> None:
    chosen = choose_threshold(THRESHOLDS, asked)
    assert chosen is not None and chosen.threshold == value and chosen.voxel_rate is not None


def test_a_printed_rate_can_be_given_back_and_each_step_changes_the_threshold() -> None:
    own = replace(
        THRESHOLDS, false_positive_rate=(0.01, 0.005, 0.0012345, 0.001), default_rate=0.0012345
    )
    for asked in ("0.12%", "0.0012", 0.0012345):
        assert choose_threshold(own, asked).threshold == 3.0  # type: ignore[union-attr]
    assert "0.12 % of healthy" in false_positive_words(own.voxel_rate, own.asked_ml)
    assert choose_threshold(own, "high").threshold == 2.0  # type: ignore[union-attr]
    with pytest.raises(AnomriError, match="the default is the least sensitive"):
        choose_threshold(own, "low")  # 0.001 is nearly the same
    assert choose_threshold(own, "0.001").threshold == 4.0  # type: ignore[union-attr]


def test_a_false_positive_volume_selects_the_lowest_threshold_within_it() -> None:
    for most, threshold in ((9.0, 0.1), (8.9, 0.2), (1.5, 0.2), (1.0, 0.3), (0.0, 0.3)):
        chosen = choose_threshold(THRESHOLDS, false_positive_ml=most)
        assert chosen is not None and chosen.threshold == threshold and chosen.voxel_rate is None
    assert choose_threshold(chosen, "high").threshold == 1.0  # type: ignore[union-attr]  # the later wish counts


def test_rates_that_the_model_does_not_store_are_refused() -> None:
    with pytest.raises(
        AnomriError,
        match=r"no sensitivity '2%'; there are .*0.05, 0.01, 0.005, 0.001 \(default: 0.01\)",
    ):
        choose_threshold(THRESHOLDS, "2%")
    with pytest.raises(
        AnomriError, match="the default is the most sensitive threshold that the model stores"
    ):
        choose_threshold(replace(THRESHOLDS, default_rate=0.05), "high")
    for most in (9.1, -1.0, float("nan")):
        with pytest.raises(AnomriError, match="from 0 to 9 ml"):
            choose_threshold(THRESHOLDS, false_positive_ml=most)
    with pytest.raises(AnomriError, match="earlier anomri"):
        choose_threshold(replace(THRESHOLDS, healthy=None), false_positive_ml=1)
    with pytest.raises(AnomriError, match="stores no thresholds"):
        choose_threshold(None, "high")
    with pytest.raises(AnomriError, match="give one of them"):
        choose_threshold(THRESHOLDS, "high", 1.0)
    assert choose_threshold(None) is None


def test_confidence_is_a_rank_among_healthy_scans() -> None:
    assert [confidence(peak, HEALTHY) for peak in (0.2, 0.25, 0.26, 0.3, 0.31)] == [
        0,
        0,
        0.25,
        0.25,
        0.75,
    ]
    assert confidence(1.0, None) is None


def test_distance_from_the_brains_edge_respects_the_voxel_size_and_ignores_holes() -> None:
    spacing = (1.0, 2.0, 5.0)
    place = np.stack(np.meshgrid(*map(np.arange, (30, 20, 9)), indexing="ij"))
    brain = (
        ((place - np.reshape([15, 10, 4], (3, 1, 1, 1))) / np.reshape([13, 8, 5], (3, 1, 1, 1)))
        ** 2
    ).sum(0) < 1
    outside = np.pad(~brain, 1, constant_values=True)
    expected = ndimage.distance_transform_edt(~outside, sampling=spacing)[1:-1, 1:-1, 1:-1]
    components = np.zeros(brain.shape, np.uint32)
    components[13:16, 9:11, 4], components[4:8, 10, 4] = 1, 2
    # One alone, a cuboid and one voxel: what is around it is no part of the box that it fills.
    alone, voxel, capped = (np.zeros_like(components) for _ in range(3))
    alone[6:12, 8:12, 3:6], voxel[9, 9, 4], capped[6:12, 8:12, 3:6] = 1, 1, 1
    capped[6, 8, 3] = capped[8, 9, 5] = 0
    holed = brain.copy()
    holed[15, 12, 4] = False
    for some in (components, alone, voxel, capped):
        edge = find_edge(some > 0, holed, spacing)
        found = smallest_edge_distances(some, edge, spacing)
        assert found == pytest.approx(
            [expected[some == number].min() for number in range(1, some.max() + 1)], rel=1e-5
        )
        assert (found > 0).all()
        near = expected <= max(5, *spacing) + 1e-6
        assert shares_at_edge(some, edge, spacing) == pytest.approx(
            [near[some == number].mean() for number in range(1, some.max() + 1)]
        )


def test_healthy_scores_are_saved_with_the_model(model: Path, tmp_path: Path) -> None:
    thresholds = anomri.load(model).spec.thresholds
    assert thresholds is not None and thresholds.healthy is not None
    healthy = thresholds.healthy
    assert list(healthy.threshold) == sorted(healthy.threshold)
    assert list(healthy.false_positive_ml) == sorted(healthy.false_positive_ml, reverse=True)
    assert healthy.false_positive_ml[-1] == 0 < healthy.false_positive_ml[0]
    assert (
        len(healthy.scan_peaks) == thresholds.healthy_cases
        and healthy.scan_peaks[-1] == healthy.threshold[-1]
    )
    # The brain of the fixture's scans holds less than a litre, and one tenth of it lies above the
    # first threshold.
    assert healthy.false_positive_ml[0] < 200
    # An older model.json knows none of this.
    facts = json.loads((model / "model.json").read_text())
    for name in ("healthy", "asked_rate", "asked_ml"):
        facts["thresholds"].pop(name)
    (tmp_path / "model.json").write_text(json.dumps(facts))
    old = ModelSpec.read(tmp_path / "model.json").thresholds
    assert old is not None and old.healthy is None and old.threshold == thresholds.threshold


def test_detect_takes_a_sensitivity_and_prints_json(
    cohort: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["detect", "-i", str(cohort / "case7"), "-m", str(model), "--format", "json", "-o"]
    volumes = []
    for sensitivity in ("highest", "default", "lowest"):
        assert main([*arguments, str(tmp_path / sensitivity), "--sensitivity", sensitivity]) == 0
        document = json.loads(capsys.readouterr().out)
        (case,) = document["cases"]
        volumes.append(case["lesion_volume_mm3"])
        assert case["status"] == "done"
        assert set(case["files"]) == {"anomaly", "mask", "lesions", "summary"}
        written = json.loads(Path(case["files"]["summary"]).read_text())
        assert written == {key: case[key] for key in written}
        assert np.asarray(nib.load(case["files"]["mask"]).dataobj).any() == bool(case["lesions"])
    assert volumes[0] > volumes[1] >= volumes[2]
    first = json.loads((tmp_path / "highest" / "case7.json").read_text())["lesions"][0]
    assert 0 <= first["confidence"] <= 2 / 3 and first["edge_distance_mm"] > 0
    header, row = (tmp_path / "highest" / "lesions.tsv").read_text().splitlines()[:2]
    assert (
        dict(zip(header.split("\t"), row.split("\t"), strict=True))["edge_distance_mm"]
        == f"{first['edge_distance_mm']:.4g}"
    )
    assert main([*arguments, str(tmp_path / "ml"), "--false-positive-ml", "0"]) == 0
    case = json.loads(capsys.readouterr().out)["cases"][0]
    healthy = anomri.load(model).spec.thresholds.healthy  # type: ignore[union-attr]
    assert (
        healthy is not None
        and case["threshold"] == healthy.threshold[healthy.false_positive_ml.index(0)]
    )
    assert case["voxel_false_positive_rate"] is None and case["false_positive_ml"] == 0
    assert main([*arguments, str(tmp_path / "no"), "--sensitivity", "2%"]) == 2


def test_evaluate_takes_a_sensitivity(cohort: Path, model: Path, tmp_path: Path) -> None:
    thresholds = anomri.load(model).spec.thresholds
    assert thresholds is not None
    assert (
        anomri.evaluate(cohort, model=model, sensitivity="lowest").threshold == thresholds.value[-1]
    )
    assert (
        main(
            [
                "evaluate",
                "-i",
                str(cohort),
                "-m",
                str(model),
                "-o",
                str(tmp_path),
                "--sensitivity",
                "0.05",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "metrics.json").read_text())["threshold"] == thresholds.value[0]
    with pytest.raises(AnomriError, match="give no threshold or maps"):
        anomri.evaluate(cohort, model=model, sensitivity="low", threshold=0.1)
