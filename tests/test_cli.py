import gc
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from rich.console import Console

import anomri
from anomri.cli import main
from anomri.cli.facts import extras, libraries_of_extra
from anomri.cli.options import CALM_THREADS, app, quick_imports
from anomri.cli.progress import Stage, _bars
from anomri.errors import AnomriError
from anomri.methods import registry as methods
from anomri.methods.dae import DAE
from anomri.model.released import import_checkpoint
from anomri.runtime.devices import resolve_precision
from anomri.scoring import registry as scores

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    "statement", ["import anomri", "from anomri.cli import main; main(['--help'])"]
)
def test_import_and_help_need_no_torch(statement: str) -> None:
    heavy = ("torch", "nibabel", "matplotlib", "cv2", "nilearn", "lightning_fabric", "pydantic")
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_quick_imports_leave_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with quick_imports():
        assert not gc.isenabled()
        chosen = {name: os.environ[name] for name in CALM_THREADS}
        assert chosen == {"OPENBLAS_NUM_THREADS": "3", "OMP_WAIT_POLICY": "passive"}
    assert gc.isenabled()
    assert os.environ["OPENBLAS_NUM_THREADS"] == "3" and "OMP_WAIT_POLICY" not in os.environ


COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_of_every_command_fits_in_80_columns(
    command: str,
    option: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command.split(), option]) == 0
    shown = capsys.readouterr()
    assert "Usage" in shown.out and not shown.err
    assert max(map(len, shown.out.splitlines())) <= 80
    assert "…" not in shown.out  # no name is cut short
    # Flags take no value, so no type stands beside them.
    assert "<bool>" not in re.sub("--(install|show)-completion.*", "", shown.out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_two_examples_that_parse(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    group = typer.main.get_command(app)
    one = group.commands[command]  # type: ignore[attr-defined]
    _, *shown = (one.epilog or "").split("\n\n")
    assert len(shown) == 2
    for line in shown:
        words = shlex.split(line)
        assert words[:2] == ["anomri", command]
        assert len(line) <= 78  # one line of a terminal of 80 columns
        # Raises for an option that the command does not have; nothing is run.
        one.make_context(command, words[2:])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_and_argument_has_help(command: str) -> None:
    one = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    for parameter in one.params:
        if parameter.name != "help":
            about = parameter.help or ""
            assert about and about[0].isupper() | about.startswith(NAMES), parameter.name
            assert about.endswith("."), parameter.name


NAMES = ("auto ", "dae ", "json:", "model:", "participant:")
"""Help that begins with the first of the values to choose from."""


def test_help_lists_what_is_registered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # so that no name is broken in two
    assert main(["train", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    presets = set(DAE.PRESETS) - {"demo", "tiny"}
    for name in (*methods.names(), *scores.names(), *presets):
        assert re.search(rf"\b{name}\b", shown), name
    assert main(["compare", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in (*presets, "demo"):
        assert re.search(rf"\b{name}\b", shown), name


@pytest.mark.parametrize(
    ("option", "value", "wrong"),
    [
        ("--steps", "0", "0 is not at least 1"),
        ("--learning-rate", "-0.5", "-0.5 is not at least 0"),
        ("--seed", "2147483648", "2147483648 is not at most 2147483647"),
    ],
)
def test_numbers_outside_their_range_are_refused(
    option: str, value: str, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "-i", "cohort", "-o", "model", option, value]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert option in said and wrong in said


def test_anomri_alone_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr()
    assert "Usage" in shown.out and "detect" in shown.out and not shown.err


def test_the_command_prints_the_version_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"anomri {version('anomri')}\n"
    assert anomri.__version__ == version("anomri")


def test_info_shows_the_machine_and_the_model(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--device", "cpu"]) == 0
    shown = re.sub("  +", " ", capsys.readouterr().out)
    assert f" torch {version('torch')}\n" in shown
    assert " device cpu\n" in shown
    assert f" precision {resolve_precision('auto', 'cpu')}\n" in shown
    assert " channels flair, t1, t1ce, t2 (or some of them)\n" in shown
    assert all(name in shown for name in scores.names())
    assert "1,467 healthy slices of 20 cases; 3 cases held out" in shown
    assert "BraTS 2018 training set" in shown and "Kascenas" in shown
    assert main(["info", str(model), "--device", "cpu"]) == 0
    assert " channels flair, t1\n" in re.sub("  +", " ", capsys.readouterr().out)
    assert main(["info", "nothing-here"]) == 2
    assert main(["info", "--device", "cuda:77"]) == 2


def test_info_names_the_libraries_that_an_extra_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(libraries_of_extra("dicom")) == ["dicom2nifti", "highdicom", "pydicom"]
    assert dict(extras())["bids"] == "BIDS datasets: found"
    monkeypatch.setattr("anomri.cli.facts._is_installed", lambda name: name != "highdicom")
    found = dict(extras())["dicom"]
    assert found.startswith("DICOM in and out: no highdicom; pip install ") and "[dicom]" in found


@pytest.mark.slow
def test_threads_limit_torch_and_the_threads_beside_it() -> None:
    code = (
        "from anomri.cli import main; main(['info', '--threads', '1', '--device', 'cpu']);"
        "import torch; from anomri.runtime.launch import usable_processors;"
        "print(torch.get_num_threads(), usable_processors())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1 1"
    assert main(["info", "--threads", "0"]) == 2


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("in out participant --participant-label 01 02", "01 02"),
        ("in out participant --participant_label 01 sub-02 --skip_bids_validation", "01 sub-02"),
        ("in out participant --participant-label 01 --participant-label 02", "01 02"),
        # Before the level, what follows the first label may be a folder.
        ("--participant-label 01 in out participant", "01"),
        ("in out participant --participant-label=01 -m built-in", "01"),
    ],
)
def test_participant_labels_are_given_as_for_other_bids_apps(given: str, parsed: str) -> None:
    command = typer.main.get_command(app).commands["bids"]  # type: ignore[attr-defined]
    values = command.make_context("bids", given.split()).params
    assert values["participant_label"] == parsed.split()
    assert (str(values["bids_dir"]), str(values["out_dir"])) == ("in", "out")
    assert values["level"] == "participant"
    assert values["skip_bids_validation"] == ("skip" in given)


def shown_by(console: Console, *updates: tuple[float, int, int]) -> list[str]:
    """The lines that a stage prints for updates (seconds, done, total)."""
    now = 0.0
    with _bars(console) as bars:
        stage = Stage("cases", bars, lambda: now)
        for now, done, total in updates:  # noqa: B007  # the clock
            stage.show(done, total)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_progress_in_a_file_is_a_line_for_each_case_with_an_honest_estimate() -> None:
    lines = shown_by(Console(file=StringIO()), (0, 0, 0), (10, 1, 4), (20, 2, 4), (30, 4, 4))
    assert lines == [
        "cases ...",
        "cases 1/4 (about 30 s left)",
        "cases 2/4 (about 20 s left)",
        "cases 4/4",
    ]


def test_cases_of_an_earlier_run_do_not_count_in_the_time_estimate() -> None:
    finished = [(0.0, done, 100) for done in range(1, 91)]
    lines = shown_by(Console(file=StringIO()), *finished, (60, 91, 100), (60, 92, 101))
    assert lines[-3:] == ["cases 90/100", "cases 91/100 (about 9 min left)", "cases 92/101"]


def test_a_terminal_shows_the_time_left_only_once_it_is_known() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=100)
    shown = ANSI.sub("", "\n".join(shown_by(console, (0, 0, 0))))
    assert "elapsed" in shown and "left" not in shown and "?" not in shown
    console = Console(file=StringIO(), force_terminal=True, width=100)
    shown = ANSI.sub("", "\n".join(shown_by(console, (0, 0, 0), (100, 2, 4))))
    assert "2/4" in shown and "elapsed, about 2 min left" in shown


ANSI = re.compile(r"\x1b\[[?\d;]*[a-zA-Z]")
"""What colours and moves the cursor of a terminal."""


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


def test_train_detect_and_evaluate_run_from_the_command_line(
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


def test_exit_codes_are_1_for_a_case_that_fails_and_2_for_wrong_usage(
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


def test_an_output_folder_that_cannot_be_written_is_refused(
    cohort: Path, model: Path, tmp_path: Path
) -> None:
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


@pytest.mark.slow
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


def test_damaged_and_dangerous_checkpoints_are_refused(released: Path, tmp_path: Path) -> None:
    state = torch.load(released, weights_only=True)["model_state_dict"]
    bad = tmp_path / "bad.pt"

    def refused(content: object, message: str, **arguments: object) -> None:
        torch.save(content, bad)
        with pytest.raises(AnomriError, match=message):
            import_checkpoint(bad, tmp_path / "m", **arguments)  # type: ignore[arg-type]
        assert not (tmp_path / "m").exists()

    refused({"model_state_dict": Evil()}, "cannot be read as a checkpoint of tensors only")
    assert not Path("/tmp/anomri-was-here").exists()
    refused({"weights": state}, "has no ")
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
    refused({"model_state_dict": state}, "has 4 channels, but 1 are given", channels=["flair"])
    refused(
        {"model_state_dict": state},
        "two of the channels .* are the same",
        channels=["flair", "t1", "t1", "t2"],
    )
    for text in (b"nothing", b"hello world"):
        bad.write_bytes(text)
        with pytest.raises(AnomriError, match=r"bad.pt: cannot be read"):
            import_checkpoint(bad, tmp_path / "m")


@pytest.mark.slow
def test_the_demo_shows_a_first_look_and_writes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(DAE.PRESETS, "demo", DAE.PRESETS["tiny"])
    monkeypatch.setattr("anomri.demo.run.HEALTHY", 3)
    monkeypatch.setattr("anomri.demo.run.LESIONED", 1)
    out = tmp_path / "demo"
    assert main(["demo", "-o", str(out), "--keep"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    picture = out / "first-look" / "previews" / "synthetic_lesion_001.planes.jpg"
    assert "The model in the package looked at a synthetic scan" in printed
    assert str(picture) in printed and picture.is_file()
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
