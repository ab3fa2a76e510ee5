"""`anomri export`: the ONNX file gives what torch gives, and what cannot be exported is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anomri import optional
from anomri.cli import main
from anomri.errors import AnomriError
from anomri.methods import registry as methods
from anomri.model import export
from anomri.model.detector import Detector
from anomri.model.export import METADATA, export_onnx
from anomri.slices import slice_volume
from anomri.spec import ModelSpec
from phantom import thresholding

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytestmark = pytest.mark.slow
WIDTHS = [4, 8, 16]
HEAD = {"widths": WIDTHS, "anomalies": True, "segmentation_head": True}
PLAIN = {
    "dae": ("dae", HEAD, [(32, 48), (64, 36)]),
    "dae_without_head": ("dae", {"widths": WIDTHS}, [(32, 48), (64, 36)]),
    "dae_of_more_channels": (
        "dae",
        {**HEAD, "network_channels": ["t2", "t1", "flair"]},
        [(32, 48), (64, 36)],
    ),
    "ae": ("ae", {"widths": WIDTHS, "bottleneck": 4}, [(32, 48), (64, 36)]),
    "vae": ("vae", {"widths": [2, 4, 8, 16], "latent": 4}, [(128, 128)]),
    "fanogan": ("fanogan", {"width": 1, "latent": 4}, [(128, 128)]),
}


def untrained(folder: Path, method: str, settings: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    spec = ModelSpec(("flair", "t1"), method, settings)
    Detector(spec, methods.build(spec)).save(folder)
    return folder


@pytest.mark.parametrize("name", PLAIN)
def test_the_file_gives_what_torch_gives_for_any_number_and_size_of_slices(
    name: str, tmp_path: Path
) -> None:
    method, settings, sizes = PLAIN[name]
    model = untrained(tmp_path / "model", method, settings)
    detector = export_onnx(model, tmp_path / "sub" / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "sub" / "model.onnx"))
    head = detector.method.segmentation_head
    assert [one.name for one in session.get_inputs()] == ["slices"]
    assert [one.name for one in session.get_outputs()] == [
        "reconstruction",
        *["anomaly_probability"] * head,
    ]
    for count, size in zip((1, 5), sizes, strict=False):
        x = torch.rand((count, 2, *size), generator=torch.Generator().manual_seed(count))
        expected = detector.inference(x).numpy()
        reconstruction, *rest = session.run(None, {"slices": x.numpy()})
        assert np.ptp(expected[:, :2]) > 0.01  # no constant
        np.testing.assert_allclose(reconstruction, expected[:, :2], atol=1e-4, rtol=0)
        for probability in rest:
            np.testing.assert_allclose(probability, expected[:, 2], atol=1e-4, rtol=0)


def test_the_built_in_model_is_exported_and_agrees_on_a_real_scan(
    real_scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "built-in", "-o", str(tmp_path / "m.onnx")]) == 0
    said = capsys.readouterr()
    assert "slices (channels flair, t1, t1ce, t2) -> reconstruction, anomaly_prob" in said.out
    assert not said.err
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    detector = Detector.load("built-in", "cpu", "32-true")
    facts = session.get_modelmeta().custom_metadata_map[METADATA]
    assert json.loads(facts) == json.loads(detector.spec.to_json())
    volume = detector.read(real_scans / "brats18" / "Brats18_2013_11_1")
    stack = slice_volume(volume, detector.spec.grid, detector.spec.scaling)
    for box in (None, detector.spec.crop):
        expected = detector.inference(stack.x[60:66], box).numpy()
        top, bottom, left, right = box or (0, 128, 0, 128)
        x = stack.x[60:66, :, top:bottom, left:right].numpy()
        reconstruction, probability = session.run(None, {"slices": x})
        expected = expected[:, :, top:bottom, left:right]
        np.testing.assert_allclose(reconstruction, expected[:, :4], atol=1e-4, rtol=0)
        np.testing.assert_allclose(probability, expected[:, 4], atol=1e-4, rtol=0)


def test_a_method_that_is_not_one_forward_pass_is_refused(tmp_path: Path) -> None:
    thresholding("flair").save(tmp_path / "thresholding")
    restoring = {"widths": [2, 4, 8, 16], "latent": 4, "restoration_steps": 3}
    untrained(tmp_path / "vae", "vae", restoring)
    untrained(tmp_path / "diffusion", "diffusion", {"widths": WIDTHS, "strides": 2})
    for name in ("thresholding", "vae", "diffusion"):
        with pytest.raises(AnomriError, match=f"{name} cannot be exported .* one forward pass"):
            export_onnx(tmp_path / name, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_file_that_exists_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.onnx").write_text("mine")
    assert main(["export", "built-in", "-o", str(tmp_path / "model.onnx")]) == 2
    assert "model.onnx: exists already; remove it, or" in capsys.readouterr().err
    assert (tmp_path / "model.onnx").read_text() == "mine"


def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(optional, "import_module", missing)
    assert main(["export", "built-in", "-o", str(tmp_path / "model.onnx")]) == 2
    said = capsys.readouterr().err
    assert "anomri export needs a library" in said and "[onnx]" in said


def test_a_file_that_does_not_agree_with_torch_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = untrained(tmp_path / "model", "dae", HEAD)
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(AnomriError, match="another result than torch .* no file was wr"):
        export_onnx(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
