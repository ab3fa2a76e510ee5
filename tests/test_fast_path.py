"""What is done for speed changes no map: against the method as its description reads, and
bfloat16 against float32."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import plain
from anomri.errors import AnomriError
from anomri.methods import registry as methods
from anomri.methods.networks.unet import (
    TINY,
    ConvBlock,
    UNet,
    fold_weight_standardisation,
    halve,
)
from anomri.model.detector import Detector, load
from anomri.runtime.devices import resolve_precision
from anomri.scans.find import find_cases
from anomri.scans.read import read_volume
from anomri.scoring.metrics import precision_recall
from anomri.slices import slice_volume
from anomri.spec import ModelSpec

WIDTHS = (4, 8, 16, 32)
LAYERS = {"0": "conv1", "2": "norm1", "3": "conv2", "5": "norm2"}
PARTS = {"down": "encoder", "up": "upsample", "join": "decoder", "last": "head"}


def renamed(name: str) -> str:
    """A parameter of the plain network under the name that it has here."""
    name = re.sub(
        r"^(down|join)\.(\d)\.(\d)", lambda found: f"{found[1]}.{found[2]}.{LAYERS[found[3]]}", name
    )
    part, _, rest = name.partition(".")
    return f"network.{PARTS[part]}.{rest}"


def pair(precision: str = "32-true") -> tuple[plain.Network, Detector]:
    """The plain network, and a detector with the same weights."""
    torch.manual_seed(0)
    network = plain.Network(WIDTHS)
    spec = ModelSpec(plain.CHANNELS, settings={"widths": list(WIDTHS)})
    method = methods.build(spec)
    method.load_state_dict({renamed(name): value for name, value in network.state_dict().items()})
    return network, Detector(spec, method, precision=precision)


@pytest.mark.slow
def test_a_real_scan_gets_the_same_map_as_from_the_plain_program(
    real_scans: Path, tmp_path: Path
) -> None:
    case = find_cases(real_scans / "brats18")[0]
    network, detector = pair()
    plain.detect(network, case.channels["flair"].parent, tmp_path / "plain.nii.gz")
    detector.detect(case).save(tmp_path)
    expected, found = (
        nib.load(tmp_path / name).get_fdata(dtype=np.float32)
        for name in ("plain.nii.gz", f"{case.name}_anomaly.nii.gz")
    )
    assert expected.max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_bfloat16_only_rounds() -> None:
    x = torch.rand((3, 4, 32, 32), generator=torch.Generator().manual_seed(0))
    exact, rounded = pair()[1].inference(x), pair("bf16-mixed")[1].inference(x)
    assert (
        rounded.dtype == torch.float32
        and rounded.is_contiguous()
        and not torch.equal(exact, rounded)
    )
    assert float((rounded - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("size", [(2, 5, 16, 24), (9, 5, 8, 8)])
def test_swish_fused_into_the_convolution_gives_the_same(size: tuple[int, ...]) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    block = ConvBlock(5, 8)
    expected = block(x)
    fold_weight_standardisation(block)
    with_gradient = block(x.requires_grad_())
    with_gradient.square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    with torch.no_grad():
        fused = block(x)
        turned = block(x.contiguous(memory_format=torch.channels_last))
    for found in (with_gradient, fused, turned):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_halved_maps_are_those_of_average_pooling_to_the_byte(layout: torch.memory_format) -> None:
    x = torch.randn((3, 5, 12, 20), generator=torch.Generator().manual_seed(0)) * 10
    x = x.to(memory_format=layout)
    expected = torch.nn.functional.avg_pool2d(x, 2)
    with torch.no_grad():
        assert torch.equal(halve(x), expected)
        odd = x[..., :11, :19].contiguous()
        assert torch.equal(halve(odd), torch.nn.functional.avg_pool2d(odd, 2))
    with_gradient = x.clone().requires_grad_()
    halve(with_gradient).sum().backward()
    assert with_gradient.grad is not None and bool((with_gradient.grad == 0.25).all())


def test_methods_are_computed_in_float32_unless_they_allow_bfloat16() -> None:
    spec = ModelSpec(("flair",), method="thresholding")
    assert not Detector(spec, methods.build(spec), precision="bf16-mixed").inference.half


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(
        AnomriError, match="unknown precision 'half'; choose one of auto, 32-true, bf16-mixed"
    ):
        load(precision="half")


@pytest.mark.slow
@pytest.mark.skipif(
    resolve_precision("auto") != "bf16-mixed", reason="no bfloat16 instructions here"
)
def test_bfloat16_keeps_the_average_precision(real_scans: Path) -> None:
    found = []
    for precision in ("32-true", "bf16-mixed"):
        detector = load(precision=precision)
        cases = [
            case
            for case in find_cases(real_scans / "brats18")
            if detector.splits[case.name] == "test"
        ]
        scores, labels = [], []
        for case in cases:
            volume = read_volume(case, detector.channels)
            whole = slice_volume(volume, detector.spec.grid, detector.spec.scaling)
            assert whole.label is not None
            every_third = range(0, len(whole.x), 3)
            scores.append(detector.score(whole.take(every_third))[0].ravel())
            labels.append(whole.label[list(every_third)].numpy().ravel())
        found.append(
            precision_recall(np.concatenate(scores), np.concatenate(labels)).average_precision
        )
    assert abs(found[0] - found[1]) <= 0.002


def test_subnormal_parameters_become_zero_without_changing_the_output() -> None:
    """A long training with weight decay leaves them; a scan took twice as long with them."""
    torch.manual_seed(0)
    network = UNet(2, (4, 8, 16)).eval()
    with torch.no_grad():
        network.encoder[2].norm2.weight.mul_(1e-38)
        network.encoder[2].norm2.bias.fill_(1e-40)
        network.upsample[1].weight.mul_(1e-40)
        x = torch.rand(2, 2, 32, 32)
        before = network(x)
        after = fold_weight_standardisation(network)(x)
    assert torch.allclose(before, after, atol=1e-5)
    for parameter in network.parameters():
        assert not ((parameter != 0) & (parameter.abs() < TINY)).any()
    assert not network.upsample[1].weight.any()
