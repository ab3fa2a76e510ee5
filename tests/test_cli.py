import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import anomri
from anomri.cli import main
from anomri.errors import AnomriError
from anomri.methods.dae import DAE
from anomri.model.released import import_checkpoint

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    "statement", ["import anomri", "from anomri.cli import main; main(['--help'])"]
)
def test_neither_the_import_nor_help_need_torch(statement: str) -> None:
    code = f"import sys; {statement}; print([m for m in ('torch', 'nibabel', 'matplotlib', 'cv2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command",
    [
        "",
        "train",
        "detect",
        "evaluate",
        "merge",
        "compare",
        "bids",
        "view",
        "demo",
        "import-checkpoint",
    ],
)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def test_every_public_name_has_help() -> None:
    for name in anomri.__all__:
        assert (getattr(anomri, name).__doc__ or "").strip(), name
    assert set(anomri.__all__) <= set(dir(anomri))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = anomri.nothing
    # Names stay functions after the modules behind them are imported.
    assert callable(anomri.train)
    assert callable(anomri.report)
    assert callable(anomri.compare)


def test_train_detect_evaluate(
    cohort: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    command = [
        "train",
        "-i",
        str(cohort),
        "-o",
        str(model),
        "--preset",
        "tiny",
        "--cache",
        str(cache),
        "--device",
        "cpu",
    ]
    options = [
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--learning-rate",
        "0.002",
        "--seed",
        "3",
        "--precision",
        "32-true",
    ]
    options += [
        "--validate-every",
        "2",
        "--noise-resolution",
        "8",
        "--noise-std",
        "0.3",
        "--set",
        'augmentation={"flip": true, "gain": 0.2}',
        "--channels",
        "t1,flair",
        "--data-licence",
        "ours",
    ]
    assert main([*command, *options]) == 0
    assert "slices with a labelled lesion were left out" in " ".join(
        capsys.readouterr().out.split()
    )
    spec = anomri.load(model).spec
    assert spec.training is not None
    assert (spec.channels, spec.data_licence) == (("t1", "flair"), "ours")
    assert (spec.training.steps, spec.training.batch_size, spec.training.seed) == (4, 4, 3)
    assert (spec.training.learning_rate, spec.training.validate_every) == (0.002, 2)
    assert (spec.settings["noise_resolution"], spec.settings["noise_std"]) == (8, 0.3)
    assert spec.settings["augmentation"] == {"flip": True, "gain": 0.2}

    assert (
        main(
            [
                "detect",
                "-i",
                str(cohort / "case7"),
                "-o",
                str(out),
                "-m",
                str(model),
                "--reconstruction",
            ]
        )
        == 0
    )
    assert (out / "case7_reconstruction.nii.gz").is_file()
    assert (
        main(
            [
                "evaluate",
                "-i",
                str(cohort),
                "-o",
                str(tmp_path / "ev"),
                "-m",
                str(model),
                "--grid",
                "input",
            ]
        )
        == 0
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "AUPRC, pooled" in printed
    assert "intervals: 95 %" in printed
    assert (
        main(
            [
                "evaluate",
                "-i",
                str(cohort / "case7"),
                "-o",
                str(tmp_path / "e2"),
                "--maps",
                str(out),
            ]
        )
        == 0
    )


def test_exit_codes(
    cohort: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cohort / "case7", tmp_path / "scans" / "case7")
    (tmp_path / "scans" / "case7" / "case7_t1.nii.gz").write_bytes(b"")
    arguments = ["-i", str(tmp_path / "scans"), "-o", str(tmp_path / "out"), "-m", str(model)]
    assert main(["detect", *arguments]) == 1
    assert "case7_t1.nii.gz: the file is empty" in capsys.readouterr().err
    assert (
        main(
            ["detect", "-i", str(tmp_path / "gone"), "-o", str(tmp_path / "out"), "-m", str(model)]
        )
        == 2
    )
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["detect", "--frobnicate"]) == 2
    assert main(["train", "-i", str(cohort), "-o", str(model)]) == 2
    assert (
        main(
            [
                "evaluate",
                "-i",
                str(cohort),
                "-o",
                str(tmp_path / "out"),
                "-m",
                str(model),
                "--grid",
                "moon",
            ]
        )
        == 2
    )
    assert main(["train", "-i", str(cohort), "-o", str(tmp_path / "m"), "--device", "abacus"]) == 2
    assert main(["detect", *arguments, "--device", "abacus"]) == 2


def test_an_output_folder_that_cannot_be_written(cohort: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/anomri")):
        with pytest.raises(
            AnomriError, match=re.escape(str(out)) + ": cannot write to this folder"
        ):
            anomri.detect_cohort(cohort / "case7", out, model)


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # every larger file fails part-way
from anomri.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_leaves_no_half_file(cohort: Path, model: Path, tmp_path: Path) -> None:
    command = ["detect", "-i", str(cohort / "case7"), "-o", str(tmp_path), "-m", str(model)]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *command], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(path.stat().st_size < 20_000 for path in tmp_path.rglob("*") if path.is_file())
    assert not list(tmp_path.rglob("*.nii.gz"))
    assert not list(tmp_path.rglob(".partial-*"))


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A checkpoint as the released program writes it, of the golden network."""
    golden = np.load(GOLDEN / "network.npz")
    state = {
        name.removeprefix("param:"): torch.from_numpy(golden[name])
        for name in golden
        if ":" in name
    }
    state = {
        f"module.{name}": value for name, value in state.items()
    }  # as after training on several GPUs
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "released.pt")
    return tmp_path / "released.pt"


def test_import_checkpoint_gives_the_golden_reconstruction(released: Path, tmp_path: Path) -> None:
    assert main(["import-checkpoint", str(released), "-o", str(tmp_path / "m")]) == 0
    detector = anomri.load(tmp_path / "m", precision="32-true")  # the processor may have bfloat16
    golden = np.load(GOLDEN / "network.npz")
    assert detector.spec.channels == ("flair", "t1", "t1ce", "t2")
    with torch.no_grad():
        reconstruction = detector.method.reconstruct(torch.from_numpy(golden["x"])).numpy()
    np.testing.assert_allclose(reconstruction, golden["reconstruction"], atol=1e-4, rtol=0)
    with pytest.raises(AnomriError, match="already holds a model"):
        import_checkpoint(released, tmp_path / "m")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (Path("/tmp/anomri-was-here"),)  # type: ignore[return-value]


def test_checkpoints_that_are_refused(released: Path, tmp_path: Path) -> None:
    state = torch.load(released, weights_only=True)["model_state_dict"]
    bad = tmp_path / "bad.pt"

    def refused(content: object, message: str, **arguments: object) -> None:
        torch.save(content, bad)
        with pytest.raises(AnomriError, match=message):
            import_checkpoint(bad, tmp_path / "m", **arguments)  # type: ignore[arg-type]
        assert not (tmp_path / "m").exists()

    refused({"model_state_dict": Evil()}, "cannot be read as a checkpoint of tensors alone")
    assert not Path("/tmp/anomri-was-here").exists()
    refused({"weights": state}, "holds no")
    refused(
        {"model_state_dict": {"fc.weight": torch.zeros(2)}},
        "fc.weight is not a parameter of the released U-Net",
    )
    for odd in ("down_path.x.block.1.weight", 3):
        refused({"model_state_dict": {odd: torch.zeros(2)}}, "is not of the released U-Net")
    refused(
        {"model_state_dict": {**state, "last.weight": torch.zeros(())}},
        "is not of the released U-Net",
    )
    refused(
        {"model_state_dict": dict(list(state.items())[3:])},
        "is not of the released U-Net|do not form",
    )
    refused({"model_state_dict": state}, "has 4 channels, but 1 are named", channels=["flair"])
    refused(
        {"model_state_dict": state},
        "two of the channels .* are the same",
        channels=["flair", "t1", "t1", "t2"],
    )
    for text in (b"nothing", b"hello world"):
        bad.write_bytes(text)
        with pytest.raises(AnomriError, match=r"bad.pt: cannot be read"):
            import_checkpoint(bad, tmp_path / "m")


def test_the_demo_runs_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(DAE.PRESETS, "demo", DAE.PRESETS["tiny"])
    monkeypatch.setattr("anomri.demo.run.HEALTHY", 3)
    monkeypatch.setattr("anomri.demo.run.LESIONED", 1)
    out = tmp_path / "demo"
    assert main(["demo", "-o", str(out), "--keep"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Synthetic cohort" in printed
    assert "thresholding" in printed
    page = (out / "report.html").read_text()
    assert "SYNTHETIC" in page
    assert page.count("data:image/jpeg;base64,") == 4 and page.count("<svg") == 2
    assert (out / "maps" / "synthetic_lesion_001_anomaly.nii.gz").is_file()
    assert (out / "cohort" / "synthetic_lesion_001").is_dir()
    (out / "my-results").mkdir()
    assert main(["demo", "-o", str(out)]) == 0  # an earlier demo's folder is used again
    assert (out / "my-results").is_dir()
    assert not (out / "cohort").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert main(["demo", "-o", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_folders_with_brackets_are_printed_as_they_are(
    cohort: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study[old]" / "x[" / "b]"
    assert main(["detect", "-i", str(cohort / "case7"), "-m", str(model), "-o", str(out)]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
