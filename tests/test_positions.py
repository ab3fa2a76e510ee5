"""Statistics by place in the brain."""

from __future__ import annotations

import pytest
import torch

from anomri.scoring.positions import (
    CELLS,
    interpolate_cells,
    pack_maps,
    statistics_by_position,
    unpack_maps,
)
from anomri.scoring.scores import raw_score
from anomri.slices import Position, SliceStack, Window
from anomri.spec import Score


def brain(n: int = 24, size: int = 40, first: int = 4) -> torch.Tensor:
    inside = torch.zeros(n, size, size, dtype=torch.bool)
    inside[:, first : first + 32, first : first + 32] = True
    return inside


def test_a_cell_has_the_mean_and_spread_of_its_own_tissue() -> None:
    """The left half of the brain leaves residuals of 0.1 +- 0.02, the right half of 0.4 +- 0.1."""
    inside, generator = brain(), torch.Generator().manual_seed(0)
    noise = torch.randn(24, 1, 40, 40, generator=generator)
    residual = torch.where(torch.arange(40)[:, None] < 20, 0.1 + 0.02 * noise, 0.4 + 0.1 * noise)
    counted = torch.ones(24, dtype=torch.bool)
    mean, spread = statistics_by_position([(residual, inside, counted)] * 2)
    assert mean.shape == (1, CELLS, CELLS, CELLS)
    torch.testing.assert_close(mean[0, :, 0], torch.full((CELLS, CELLS), 0.1), atol=0.01, rtol=0)
    torch.testing.assert_close(mean[0, :, -1], torch.full((CELLS, CELLS), 0.4), atol=0.02, rtol=0)
    assert spread[0, 4, 0, 4] == pytest.approx(0.02, rel=0.2)
    assert spread[0, 4, -1, 4] == pytest.approx(0.1, rel=0.2)


def test_slices_that_do_not_count_are_ignored() -> None:
    """Only the lower half of a scan is looked at, and cells without a healthy slice take the mean
    of all."""
    inside = brain()
    residual = torch.full((12, 2, 40, 40), 0.2)
    mean, spread = statistics_by_position([(residual, inside, torch.arange(24) < 12)])
    torch.testing.assert_close(mean, torch.full_like(mean, 0.2))
    assert float(spread.max()) < 1e-3


def test_cells_follow_the_brain_wherever_it_is() -> None:
    """A brain in another place, of another size, in more slices, gets the same values at the
    same relative place."""
    cells = torch.linspace(0, 1, CELLS)[None, None, :, None].expand(1, CELLS, CELLS, CELLS)
    here = interpolate_cells(cells, Position.from_foreground(brain(first=0)), (40, 40))[:, 0]
    there = interpolate_cells(cells, Position.from_foreground(brain(48, 40, 8)), (40, 40))[:, 0]
    torch.testing.assert_close(here[0, 0:32], there[0, 8:40])
    assert float(there[0, 0, 0]) == 0.0  # what lies outside takes the edge's
    assert float(there[0, -1, 0]) == 1.0


def test_some_slices_of_a_brain_keep_their_positions() -> None:
    """Slices taken out of a stack have the values that they had among the others."""
    inside = brain()
    inside[12:, 4:20] = False  # the upper half of this brain is narrower
    window = Window(0, 0, 40, 40)
    stack = SliceStack(inside[:, None].float(), inside, range(24), (), None, window)
    part = stack.take([20, 3]).take([0])
    cells = torch.rand(2, CELLS, CELLS, CELLS)
    among = interpolate_cells(cells, stack.position, (40, 40))[[20]]
    torch.testing.assert_close(interpolate_cells(cells, part.position, (40, 40)), among)


def test_position_maps_survive_packing_as_text() -> None:
    """Base64 of float16: exact to three digits; anything else is refused."""
    mean, spread = torch.rand(2, 3, CELLS, CELLS, CELLS)
    text = pack_maps(mean, spread)
    for there, here in zip(unpack_maps(text, 3), (mean, spread), strict=True):
        torch.testing.assert_close(there, here, atol=1e-3, rtol=1e-3)
    for wrong, channels in ((text, 4), ("!", 3), (text[:-8], 3)):
        with pytest.raises(ValueError, match=r".+"):
            unpack_maps(wrong, channels)


def test_the_score_divides_a_residual_by_what_is_usual_at_its_position() -> None:
    """The same residual counts for less where healthy tissue leaves as much."""
    x = torch.where(brain()[:, None], 1.0, 0.0).expand(-1, 2, -1, -1)
    cells = torch.full((2, CELLS, CELLS, CELLS), 0.1)
    usual = cells.clone()
    usual[:, :, CELLS // 2 :] = 0.5
    score = Score("standardised_by_position", healthy_maps=pack_maps(usual, cells))
    found = raw_score(x, x - 0.5, ("flair", "t1"), score)
    assert float(found[12, 6, 20]) == pytest.approx(4.0, abs=0.02)
    assert float(found[12, 34, 20]) == 0.0
    alone = raw_score(x * torch.tensor([1.0, 0.0])[:, None, None], x - 0.5, ("flair", "t1"), score)
    assert float(alone[12, 6, 20]) == pytest.approx(4.0, abs=0.02)
