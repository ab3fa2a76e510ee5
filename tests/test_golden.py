"""Inputs and outputs as the program released with the paper computed them (float32, CPU)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from anomri.methods.networks.unet import (
    UNet,
    fold_weight_standardisation,
    rename_released_parameters,
)
from anomri.methods.noise import add_on_foreground, upsample_noise
from anomri.scans.geometry import Geometry
from anomri.scans.volume import Volume
from anomri.scoring.filters import anomaly_score
from anomri.scoring.metrics import dice, drop_small_components, precision_recall
from anomri.scoring.scores import mean_absolute_residual
from anomri.slices import find_foreground, slice_volume
from anomri.spec import Grid, Scaling, Score

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def network_file() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "network.npz"))


@pytest.mark.parametrize("folded", [False, True])
def test_the_network_gives_the_released_reconstruction(
    network_file: dict[str, np.ndarray], folded: bool
) -> None:
    state = {
        name.removeprefix("param:"): torch.from_numpy(v)
        for name, v in network_file.items()
        if ":" in name
    }
    network = UNet(4, (8, 16, 32, 64))
    network.load_state_dict(rename_released_parameters(state))
    if folded:
        fold_weight_standardisation(network)
    with torch.no_grad():
        reconstruction = network(torch.from_numpy(network_file["x"])).numpy()
    np.testing.assert_allclose(reconstruction, network_file["reconstruction"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("median", "key"), [(0, "score_without_median"), (5, "score")])
def test_the_score_is_that_of_the_released_program(
    network_file: dict[str, np.ndarray], median: int, key: str
) -> None:
    x, reconstruction = (torch.from_numpy(network_file[name]) for name in ("x", "reconstruction"))
    raw = mean_absolute_residual(x, reconstruction)
    score = anomaly_score(raw, find_foreground(x, Scaling()), Score(median=median))
    np.testing.assert_allclose(score, network_file[key][:, 0], atol=1e-4, rtol=0)


def test_the_noise_is_that_of_the_released_program() -> None:
    golden = np.load(GOLDEN / "noise.npz")
    x = torch.from_numpy(golden["x"])
    rows, columns = golden["shift"].tolist()
    noise = upsample_noise(
        torch.from_numpy(golden["low_resolution_noise"]), (128, 128), (rows, columns)
    )
    noisy = add_on_foreground(x, noise, find_foreground(x, Scaling())[:, None])
    np.testing.assert_allclose(noisy.numpy(), golden["noisy"], atol=1e-5, rtol=0)


def test_the_slices_are_those_of_the_released_program() -> None:
    golden = np.load(GOLDEN / "preprocessing.npz")
    channels = ("flair", "t1", "t1ce", "t2")
    geometry = Geometry(golden["flair"].shape, np.eye(4), np.array([[0, 1], [1, 1], [2, 1]]), None)
    volume = Volume.from_array(
        "golden", channels, np.stack([golden[c] for c in channels]), golden["label"] > 0, geometry
    )
    stack = slice_volume(volume, Grid(field_of_view_mm=None))
    assert list(stack.index) == golden["slice_index"].tolist()
    np.testing.assert_allclose(stack.x.numpy(), golden["slices"], atol=1e-5, rtol=0)
    assert stack.label is not None
    np.testing.assert_array_equal(stack.label.numpy(), golden["masks"])


def test_metrics_on_the_released_thresholds_equal_the_released_figures() -> None:
    golden = np.load(GOLDEN / "evaluation.npz")
    scores, label = (
        golden["score"][:, 0].astype(np.float16).astype(np.float32),
        golden["label"][:, 0],
    )
    curve = precision_recall(scores, label, np.arange(1000, dtype=np.float32) / 1000)
    assert precision_recall(scores, label).average_precision == pytest.approx(
        float(golden["average_precision"]), abs=5e-4
    )
    assert curve.ceil_dice == pytest.approx(float(golden["ceil_dice"]), abs=5e-4)
    assert curve.best_threshold == pytest.approx(float(golden["threshold"]), abs=1e-6)
    volumes = np.split(scores >= curve.best_threshold, np.cumsum(golden["volume_lengths"])[:-1])
    filtered = np.concatenate([drop_small_components(volume, 20) for volume in volumes])
    assert dice(filtered, label) == pytest.approx(
        float(golden["ceil_dice_after_components"]), abs=5e-4
    )


def test_exact_metrics_are_close_to_the_half_precision_originals() -> None:
    golden = np.load(GOLDEN / "evaluation.npz")
    curve = precision_recall(golden["score"][:, 0], golden["label"][:, 0])
    assert curve.average_precision == pytest.approx(float(golden["average_precision"]), abs=5e-4)
    assert curve.ceil_dice == pytest.approx(float(golden["ceil_dice"]), abs=5e-4)
    assert curve.ceil_dice >= float(
        golden["ceil_dice"]
    )  # more thresholds can only find a better one
