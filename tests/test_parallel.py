"""Parts of some work side by side: threads of torch divided among them and given back, results
the same."""

from __future__ import annotations

import threading

import pytest
import torch

import anomri.model.inference as module
from anomri.methods import registry as methods
from anomri.model.inference import Inference
from anomri.runtime.threads import worker_threads
from anomri.spec import ModelSpec


def test_threads_are_divided_and_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with worker_threads(2) as outer:
            assert list(outer.map(lambda _: torch.get_num_threads(), range(4))) == [2] * 4
            with worker_threads(4) as inner:
                assert inner.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 4
        with pytest.raises(ValueError, match="wrong"), worker_threads(8) as pool:
            pool.submit(int, "wrong").result()
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_parallel_threads_flush_subnormal_numbers_to_zero() -> None:
    half = torch.full((64,), 2.0**-126)  # the smallest normal number
    with worker_threads(2) as pool:
        assert not pool.submit(lambda: (half / 2).any()).result()
    assert bool((half / 2).all())


def test_parallel_batches_give_the_results_of_serial_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inference = Inference(methods.build(ModelSpec(("flair", "t1"), settings={"widths": [8, 16]})))
    x, before, used = torch.rand(20, 2, 32, 32), torch.get_num_threads(), set()
    reconstruct = inference.method.reconstruct

    def watched(*arguments: object) -> torch.Tensor:
        used.add(threading.get_ident())
        assert not torch.is_grad_enabled()
        found: torch.Tensor = reconstruct(*arguments)
        return found

    monkeypatch.setattr(inference.method, "reconstruct", watched)
    torch.set_num_threads(2)
    try:
        beside = inference(x, (0, 24, 4, 32))
        assert threading.get_ident() not in used
        used.clear()
        monkeypatch.setattr(module, "MOST_WORKERS", 1)
        torch.testing.assert_close(inference(x, (0, 24, 4, 32)), beside, rtol=1e-5, atol=1e-6)
        assert used == {threading.get_ident()}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("method", "settings", "box", "expected"),
    [
        ("dae", {"widths": [8, 16]}, None, 2),
        ("dae", {"widths": [8, 16]}, (0, 16, 0, 32), 4),
        (
            "diffusion",
            {"widths": [8, 16], "start": 20},
            None,
            8,
        ),  # a slice's noise depends on those beside it
    ],
)
def test_batch_sizes_follow_the_processor_cache_if_the_method_allows(
    method: str,
    settings: dict[str, object],
    box: tuple[int, int, int, int] | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CACHED", 2 * 8 * 32 * 32)
    inference = Inference(methods.build(ModelSpec(("flair",), method=method, settings=settings)))
    sizes = []
    reconstruct = inference.method.reconstruct

    def watched(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        sizes.append(len(x))
        found: torch.Tensor = reconstruct(x, *arguments)
        return found

    monkeypatch.setattr(inference.method, "reconstruct", watched)
    assert inference(torch.rand(20, 1, 32, 32), box).shape == (20, 1, 32, 32)
    assert max(sizes) == expected
