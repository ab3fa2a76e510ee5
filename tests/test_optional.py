"""The advice to install an extra works for the installation at hand."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from anomri import optional
from anomri.cli import main
from anomri.errors import AnomriError
from anomri.runs.bids import run_participant
from anomri.runs.detect import detect_cohort
from anomri.scans import prepare, register, skull
from anomri.scans.prepare import Preparation
from phantom import scan, thresholding


def test_a_missing_library_is_reported_with_the_command_that_installs_it() -> None:
    with pytest.raises(AnomriError) as caught:
        optional.import_extra("anomri_no_such_library", "bet", "--skull-strip")
    assert str(caught.value) == (
        "--skull-strip needs a library that is not installed (No module named "
        f"'anomri_no_such_library'). Install it with: {optional.install_command('bet')}"
    )


def test_an_extra_is_installed_from_the_source_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "a checkout" / "src" / "anomri" / "optional.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(optional, "__file__", str(module))
    url: dict[str, str] = {}

    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return json.dumps(url) if url else None

    monkeypatch.setattr(optional, "distribution", lambda name: Installed())
    assert optional.install_command("bet") == "pip install 'anomri[bet]'"
    wheel = tmp_path / "anomri-1.0-py3-none-any.whl"
    url["url"] = wheel.as_uri()
    assert optional.install_command("bet") == "pip install 'anomri[bet]'"  # it is gone
    wheel.touch()
    assert optional.install_command("bet") == f"pip install '{wheel}[bet]'"
    checkout = module.parents[2]
    url["url"] = checkout.as_uri()
    assert optional.install_command("bet") == f"pip install '{checkout}[bet]'"
    (checkout / "pyproject.toml").touch()
    assert optional.install_command("bet") == f"pip install -e '{checkout}[bet]'"
    url["url"] = "https://example.org/anomri.whl"
    (checkout / "pyproject.toml").unlink()
    assert optional.install_command("bet") == "pip install 'anomri[bet]'"


# A library that is missing is noticed before the first scan is read.

STEPS = {
    "--skull-strip": "deepbet",
    "--bias-correction": "SimpleITK",
    "--register": "SimpleITK",
    "--dicom-seg": "highdicom",
}


@pytest.fixture
def no_scan_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """No extra is installed, and reading a scan fails the test."""

    def without_extras(name: str) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}")

    def read(*_: object, **__: object) -> None:
        pytest.fail("a scan was read")

    monkeypatch.setattr(optional, "import_module", without_extras)
    monkeypatch.setattr(prepare, "read_volume", read)
    monkeypatch.setattr(skull, "TOOLS", ())
    register.template.cache_clear()


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for name in "abc":
        data = scan((64, 72, 56), np.diag([3, 3, 3, 1])).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.diag([3, 3, 3, 1])), tmp_path / f"{name}_flair.nii.gz")
    thresholding().save(tmp_path / "model")
    return tmp_path


@pytest.mark.usefixtures("no_scan_is_read")
@pytest.mark.parametrize("option", STEPS)
def test_a_missing_extra_is_reported_once_before_the_first_scan(
    scans: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = scans / "out"
    arguments = ["-i", str(scans), "-o", str(out), "-m", str(scans / "model"), option]
    assert main(["detect", *arguments]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(f"{option} needs a library that is not installed") == 1
    assert STEPS[option] in said and "pip install" in said
    assert not out.exists()


@pytest.mark.usefixtures("no_scan_is_read")
@pytest.mark.parametrize("step", ["skull_strip", "bias_correction", "register"])
def test_a_missing_extra_is_an_error_of_the_api_before_anything_is_read(
    scans: Path, step: str
) -> None:
    preparation = Preparation(**{step: True})
    with pytest.raises(AnomriError, match="needs a library that is not installed"):
        detect_cohort(scans, scans / "out", thresholding(), preparation=preparation)
    with pytest.raises(AnomriError, match="needs a library that is not installed"):
        thresholding().detect(scans / "a_flair.nii.gz", preparation=preparation)
    with pytest.raises(AnomriError, match="needs a library that is not installed"):
        run_participant(scans, scans / "out", thresholding(), preparation=preparation)


@pytest.mark.usefixtures("no_scan_is_read")
def test_bids_and_dicom_without_their_extras_are_an_error_before_anything_is_read(
    scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    anat = scans / "bids" / "sub-1" / "anat"
    anat.mkdir(parents=True)
    (scans / "bids" / "dataset_description.json").write_text("{}")
    (scans / "a_flair.nii.gz").rename(anat / "sub-1_FLAIR.nii.gz")
    (scans / "dicom").mkdir()
    (scans / "dicom" / "1").write_bytes(bytes(128) + b"DICM" + bytes(100))
    for source, what in (("bids", "BIDS"), ("dicom", "DICOM")):
        arguments = ["-i", str(scans / source), "-o", str(scans / "out")]
        assert main(["detect", *arguments, "-m", str(scans / "model")]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert said.count(f"{what} needs a library that is not installed") == 1
    data_set = [str(scans / "bids"), str(scans / "out"), "participant"]
    assert main(["bids", *data_set, "-m", str(scans / "model"), "--skip-bids-validation"]) == 2
    assert "BIDS needs a library that is not installed" in capsys.readouterr().err.replace(
        "\n", " "
    )
