"""Synthetic anomalies and augmentation: what they change, what they leave, and that their
randomness is the seed's."""

from __future__ import annotations

import cc3d
import pytest
import torch
from torch import Generator, Tensor

from anomri.errors import AnomriError
from anomri.methods.anomalies import (
    plant_anomalies,
    random_depths,
    segmentation_loss,
    typical_shifts,
)
from anomri.methods.augmentation import Augmentation, augment
from anomri.methods.dae import DAE
from anomri.methods.draws import PartGenerator
from anomri.methods.noise import Noise

CHANNELS = ("flair", "t1", "t1ce", "t2")


def slices(n: int = 32) -> tuple[Tensor, Tensor]:
    """Round brains of a little texture, and their foreground."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(72.0), indexing="ij")
    inside = ((rows - 32) ** 2 + (columns - 36) ** 2) < 28**2
    texture = 0.05 * torch.randn((n, 4, 64, 72), generator=Generator().manual_seed(1))
    return (0.6 + texture) * inside, inside.expand(n, -1, -1).clone()


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def blobs(foreground: Tensor) -> Tensor:
    """One blob in each slice."""
    return (random_depths(foreground, seeded())[0] > 0) & foreground


def test_planted_anomalies_change_the_brain_only_where_their_label_is() -> None:
    x, foreground = slices()
    changed, where = plant_anomalies(x, foreground, torch.ones(32, 4, 1, 1), CHANNELS, seeded())
    assert torch.equal(
        changed[~foreground[:, None].expand_as(x)], x[~foreground[:, None].expand_as(x)]
    )
    assert not (where & ~foreground).any()
    assert 0.6 < float(where.any(2).any(1).float().mean()) < 1.0  # some slices stay healthy
    difference = (changed - x).abs().amax(1)
    assert difference[where].mean() > 0.2
    far = (
        ~torch.nn.functional.max_pool2d(where[:, None].float(), 31, 1, 15)[:, 0].bool() & foreground
    )
    assert difference[far].mean() < 0.05
    # Lesions hold water: bright on FLAIR and T2, dark on T1.
    shift = torch.stack([(changed - x)[:, k][where].mean() for k in range(4)])
    assert shift[0] > 0.1 and shift[3] > 0.1 and shift[1] < -0.02


def test_small_anomalies_are_as_frequent_as_large_ones() -> None:
    _, foreground = slices(600)
    depth, radius = random_depths(foreground, seeded())
    assert depth.shape == foreground.shape
    octaves = torch.histc(radius.log2(), 4, 0.6, 4.8)
    assert octaves.min() > 0.7 * octaves.max()
    areas = blobs(foreground).sum((1, 2))
    assert int(areas.min()) < 20 and int(areas.max()) > 1000


def test_some_slices_get_several_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomri.methods.anomalies.CHANCES", ())
    x, foreground = slices(400)
    _, where = plant_anomalies(x, foreground, torch.ones(400, 4, 1, 1), CHANNELS, seeded())
    counts = torch.tensor(
        [int(cc3d.connected_components(one.numpy(), return_N=True)[1]) for one in where]
    )
    assert (
        0.15 < float((counts > 0).float().mean()) < 0.3
    )  # a share of those drawn is too faint to ask for
    assert int(counts.max()) >= 6
    areas = where.flatten(1).sum(1)[counts == 1]
    assert int(areas.min()) >= 1 and int(areas.max()) < 40


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_slices_gets_small_ones(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr("anomri.methods.anomalies.CHANCES", ())
    x, foreground = slices(400)
    dae = DAE(CHANNELS, widths=[8, 16], anomalies=True, plaques=share)
    changed, _ = plant_anomalies(
        x, foreground, torch.ones(400, 4, 1, 1), CHANNELS, seeded(), plaques=dae.plaques
    )
    touched = float(((changed - x).abs().amax((1, 2, 3)) > 0.1).float().mean())
    # Some slices draw few places, or little contrast.
    assert 0.6 * share <= touched <= share + 0.05


def test_every_part_of_the_foreground_may_hold_an_anomaly() -> None:
    _, foreground = slices(400)
    foreground[:, :32] = False
    depth, _ = random_depths(foreground, seeded())
    deepest = depth.flatten(1).argmax(1) // 72
    assert int((deepest < 30).sum()) < 40  # the centre lies in what is left; ragged edges reach out
    empty = torch.zeros_like(foreground[:2])
    assert not blobs(empty).any()


def test_an_unknown_channel_gets_brighter_or_darker() -> None:
    shifts = typical_shifts(4000, ("flair", "adc"), seeded(), typical=1.0)
    assert float((shifts[:, 0] > 0).float().mean()) > 0.95
    assert 0.45 < float((shifts[:, 1] > 0).float().mean()) < 0.55


def test_half_of_the_subsets_show_a_channel_that_people_often_have_alone() -> None:
    x, _ = slices(600)
    kept = (
        DAE(CHANNELS, [4, 8, 16, 32], channel_dropout=0.5, alone=["flair", "swi"])
        .train()
        ._kept_channels(x, seeded())
    )
    alone = kept[:, 0].flatten().bool() & (kept.flatten(1).sum(1) == 1)
    assert 0.22 < float(alone.float().mean()) < 0.33
    assert float((kept.flatten(1).sum(1) == 4).float().mean()) > 0.48
    assert bool(kept.flatten(1).any(1).all())


def test_an_anomaly_that_no_kept_channel_shows_has_no_label() -> None:
    x, foreground = slices(300)
    shown = torch.zeros(300, 4, 1, 1)
    assert not plant_anomalies(x, foreground, shown, CHANNELS, seeded())[1].any()
    shown[:, 1] = 1
    changed, where = plant_anomalies(x, foreground, shown, CHANNELS, seeded())
    everything = plant_anomalies(x, foreground, torch.ones(300, 4, 1, 1), CHANNELS, seeded())[1]
    assert 0.3 < where.sum() / everything.sum() < 0.8 and not (where & ~everything).any()
    assert (changed - x)[:, 1].abs()[where].mean() > 0.1


@pytest.mark.parametrize("work", ["anomalies", "augmentation", "noise"])
def test_a_part_of_a_batch_draws_the_rows_of_the_whole_batch(work: str) -> None:
    x, foreground = slices(6)
    how = Augmentation(True, 10, 0.1, 0.05, 0.2, 0.1, 0.02, 0.02, 1.0)
    noise = Noise([8, 16], [0.1, 0.3], share=0.5)
    does = {
        "anomalies": lambda x, f, g: plant_anomalies(
            x, f, torch.ones(len(x), 4, 1, 1), CHANNELS, g
        )[0],
        "augmentation": lambda x, f, g: augment(x, f, how, g)[0],
        "noise": lambda x, f, g: noise.draw(x.shape, g),
    }[work]
    part = PartGenerator(torch.device("cpu"), 2, 6)
    part.manual_seed(5)
    whole = does(x, foreground, seeded(5))
    assert torch.allclose(does(x[2:5], foreground[2:5], part), whole[2:5], atol=1e-6)
    assert not torch.equal(whole, does(x, foreground, seeded(6)))


@pytest.mark.parametrize(
    "field", ["turn", "zoom", "shift", "gain", "contrast", "brightness", "shading", "blur"]
)
def test_each_augmentation_changes_the_brain_and_nothing_else(field: str) -> None:
    x, foreground = slices(8)
    x = x * torch.linspace(0.8, 1.2, 72)
    x[:, 2] = 0  # a channel that the scan lacks
    strength = {"turn": 10.0, "blur": 1.0}.get(field, 0.1)
    varied, inside = augment(x, foreground, Augmentation(**{field: strength}), seeded())
    assert not torch.allclose(varied, x, atol=1e-3)
    assert not varied[~inside[:, None].expand_as(varied)].any()
    assert not varied[:, 2].any()
    assert float(varied[:, 0][inside].mean()) == pytest.approx(
        float(x[:, 0][foreground].mean()), rel=0.15
    )
    same, there = augment(x, foreground, Augmentation(), seeded())
    assert torch.equal(same, x) and torch.equal(there, foreground)


def test_noise_may_have_several_sizes_and_strengths() -> None:
    noise = Noise([8, 16], [0.1, 0.3], share=0.5).draw((64, 4, 64, 72), seeded())
    strengths = noise.flatten(1).std(1)
    assert 16 < int((strengths == 0).sum()) < 48
    drawn = strengths[strengths > 0]
    assert float(drawn.min()) < 0.12 and float(drawn.max()) > 0.15


def test_a_right_segmentation_costs_least() -> None:
    _, foreground = slices(4)
    where = blobs(foreground)
    right = torch.where(where, 8.0, -8.0)
    assert (
        segmentation_loss(right, where, foreground)
        < 0.05
        < segmentation_loss(torch.zeros_like(right), where, foreground)
    )
    assert segmentation_loss(-right, where, foreground) > segmentation_loss(
        torch.zeros_like(right), where, foreground
    )
    outside = torch.where(foreground, right, 8.0)
    assert torch.equal(
        segmentation_loss(outside, where, foreground), segmentation_loss(right, where, foreground)
    )


def test_a_voxel_of_a_small_anomaly_counts_more_than_one_of_a_large_anomaly() -> None:
    _, foreground = slices(1)
    small, large = torch.zeros_like(foreground), torch.zeros_like(foreground)
    small[0, 32:35, 32:35] = True
    large[0, 20:44, 24:48] = True
    missed = torch.where(small, -8.0, 0.0)
    both = [torch.where(truth, 8.0, -8.0) for truth in (small, large)]
    cost_small = segmentation_loss(both[0] + 2 * missed, small, foreground) - segmentation_loss(
        both[0], small, foreground
    )
    cost_large = segmentation_loss(both[1] + 2 * missed, large, foreground) - segmentation_loss(
        both[1], large, foreground
    )
    assert float(cost_small) > 2 * float(cost_large)


def test_anomalies_have_the_same_size_in_mm_on_a_finer_grid() -> None:
    x, foreground = slices(300)
    fine = foreground.repeat_interleave(2, 1).repeat_interleave(2, 2)
    shown = torch.ones(300, 4, 1, 1)
    _, where = plant_anomalies(x, foreground, shown, CHANNELS, seeded())
    _, finer = plant_anomalies(
        torch.nn.functional.interpolate(x, scale_factor=2),
        fine,
        shown,
        CHANNELS,
        seeded(),
        pixel=0.5,
    )
    assert float(finer.float().mean()) == pytest.approx(float(where.float().mean()), rel=0.15)
    logits = torch.where(where, 1.0, -2.0)
    expected = segmentation_loss(logits, where, foreground)
    truth, fine_logits = (
        one.repeat_interleave(2, 1).repeat_interleave(2, 2) for one in (where, logits)
    )
    assert float(segmentation_loss(fine_logits, truth, fine, pixel=0.5)) == pytest.approx(
        float(expected), rel=0.02
    )


def test_channel_dropout_keeps_at_least_one_and_leaves_the_rest_out_of_the_loss() -> None:
    x, foreground = slices(64)
    method = DAE(CHANNELS, [4, 8, 16, 32], noise_std=0.0, channel_dropout=1.0)
    seen = []

    def network(given: Tensor) -> Tensor:
        seen.append(given)
        return torch.where(given > 0, given, torch.full_like(given, 9.0))

    method.network.forward = network  # type: ignore[method-assign]
    assert float(method(x, foreground, seeded())) < 1e-6
    kept = seen[0].flatten(2).any(2)
    assert bool(kept.any(1).all())
    assert 0.4 < float(kept.float().mean()) < 0.8
    assert method.takes_subsets and not DAE(CHANNELS, [4, 8, 16, 32]).takes_subsets
    with pytest.raises(AnomriError, match="segmentation_head needs anomalies"):
        DAE(CHANNELS, [4, 8, 16, 32], segmentation_head=True)
