"""Full disks, folders that cannot be written, files that vanish or rot, two runs at once: told,
and gone on from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import anomri
from anomri.cli import main
from anomri.errors import AnomriError
from anomri.files import PARTIAL
from anomri.methods.dae import DAE
from anomri.model.detector import Detector
from anomri.runtime.folders import sole_use
from anomri.scans.find import find_cases
from anomri.spec import Grid, Scaling
from anomri.training.packing import HealthySlices, pack_cohort
from anomri.training.train import Progress, train


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system in memory of so much room; skips where it may not be mounted."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a tmpfs may not be mounted here; test_cli has a full disk by a limit on files")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def nothing_half_written(folder: Path) -> None:
    assert not list(folder.rglob(f"{PARTIAL}*"))


@pytest.mark.slow
def test_a_training_stopped_by_a_full_disk_resumes_with_more_room(
    cohort: Path, cache: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "train",
        "-i",
        str(cohort),
        "--preset",
        "tiny",
        "--cache",
        str(cache),
        "--device",
        "cpu",
        "--resume",
    ]
    with small_disk(tmp_path / "disk", "4m") as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(3_900_000))
        assert main([*command, "-o", str(disk / "m")]) == 2
        assert "cannot write (No space left on device)" in " ".join(capsys.readouterr().err.split())
        nothing_half_written(disk)
        assert not (disk / "m" / "model.json").exists()
        filler.unlink()
        assert main([*command, "-o", str(disk / "m")]) == 0
        assert (disk / "m" / "weights.safetensors").read_bytes() == (
            model / "weights.safetensors"
        ).read_bytes()


def test_cases_failed_by_a_full_disk_are_done_once_there_is_room(
    cohort: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["detect", "-i", str(cohort), "-m", str(model), "--device", "cpu"]
    with small_disk(tmp_path / "disk", "600k") as disk:
        code = main([*command, "-o", str(disk / "out")])
        told = " ".join(capsys.readouterr().err.split())
        assert code in (1, 2) and "No space left on device" in told
        nothing_half_written(disk)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        done = {
            path: path.stat().st_mtime_ns
            for path in (disk / "out" / "logs").glob("*.json")
            if b'"error": null' in path.read_bytes()
        }
        assert main([*command, "-o", str(disk / "out")]) == 0
        assert all(path.stat().st_mtime_ns == time for path, time in done.items())
        assert len((disk / "out" / "cases.tsv").read_text().splitlines()) == 10
    with small_disk(tmp_path / "cache", "400k") as place:
        assert (
            main(["train", "-i", str(cohort), "-o", str(tmp_path / "m"), "--cache", str(place)])
            == 2
        )
        assert "cannot write (" in " ".join(capsys.readouterr().err.split())
        nothing_half_written(place)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    cohort: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        source = ["-i", str(cohort), "-o", str(disk / "out")]
        for command in (
            ["train", *source],
            ["detect", *source, "-m", str(model)],
            ["evaluate", *source, "-m", str(model)],
        ):
            assert main(command) == 2
            assert "cannot write to this folder (Read-only file system)" in " ".join(
                capsys.readouterr().err.split()
            )
        assert (
            main(["train", "-i", str(cohort), "-o", str(tmp_path / "m"), "--cache", str(disk)]) == 2
        )
        assert "Read-only file system" in " ".join(capsys.readouterr().err.split())


def test_a_case_that_vanishes_during_a_run_fails_alone(
    cohort: Path, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(cohort, tmp_path / "scans")
    cases = find_cases(tmp_path / "scans")

    def vanish(result: object, total: int) -> None:
        if not gone.exists():
            return
        shutil.rmtree(gone)

    gone = tmp_path / "scans" / "case4"
    results = anomri.detect_cohort(cases, tmp_path / "out", model, progress=vanish)
    assert [result.case for result in results if result.error] == ["case4"]
    assert "case4_flair.nii.gz" in str(results[4].error)
    shutil.copytree(cohort / "case4", gone)
    again = anomri.detect_cohort(cases, tmp_path / "out", model)
    assert not [result for result in again if result.error]


@pytest.mark.parametrize("damage", ["bits", "short", "gone", "sidecar"])
def test_a_damaged_cache_is_packed_again(cohort: Path, tmp_path: Path, damage: str) -> None:
    cases = find_cases(cohort)[:2]

    def pack() -> HealthySlices:
        return HealthySlices(pack_cohort(cases, ("flair",), Grid(), Scaling(), tmp_path))

    slices = pack()
    whole = slices.batch(range(len(slices)))
    packed = slices.cases[0]
    sound = packed.file.read_bytes()
    if damage == "bits":
        rotten = bytearray(sound)
        rotten[len(sound) // 2] ^= 1
        packed.file.write_bytes(bytes(rotten))
    elif damage == "short":
        packed.file.unlink()  # what is mapped already stays
        packed.file.write_bytes(sound[: len(sound) // 2])
    elif damage == "gone":
        packed.file.unlink()
    else:
        sidecar = packed.file.with_suffix(".json")
        sidecar.write_text(sidecar.read_text().replace('"healthy": [0', '"healthy": [1'))
    fresh = pack()
    assert torch.equal(fresh.batch(range(len(fresh))), whole)
    assert packed.file.read_bytes() == sound
    assert torch.equal(slices.batch(range(len(slices))), whole)  # a training under way reads on


def test_a_damaged_cache_whose_scan_is_gone_is_an_error(cohort: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort / "case0", tmp_path / "scans" / "case0")
    (packed,) = pack_cohort(
        find_cases(tmp_path / "scans"), ("flair",), Grid(), Scaling(), tmp_path / "cache"
    )
    packed.file.write_bytes(packed.file.read_bytes()[:-2] + b"xx")
    shutil.rmtree(tmp_path / "scans")
    with pytest.raises(AnomriError, match="case0_flair.nii.gz"):
        packed.read([packed.slices - 1])


HOLDER = """
import sys, time
from pathlib import Path
from anomri.runtime.folders import sole_use
with sole_use(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_used_by_one_run_at_a_time(
    cohort: Path, cache: Path, model: Path, tmp_path: Path
) -> None:
    refused = pytest.raises(AnomriError, match="another run is writing to this folder; wait for it")
    with sole_use(tmp_path):
        with refused:
            train(cohort, tmp_path, preset="tiny", cache=cache)
        with refused:
            anomri.detect_cohort(cohort, tmp_path, model)
        with refused:
            anomri.evaluate(cohort, tmp_path, model=model)
        with refused:
            anomri.compare(cohort, tmp_path, methods="thresholding")
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with refused:
        anomri.detect_cohort(cohort, tmp_path, model)
    process.kill()  # the lock goes with its process, however that ends
    process.communicate()
    (tmp_path / f"{PARTIAL}00000000-x").write_bytes(b"left")
    with sole_use(tmp_path):
        nothing_half_written(tmp_path)


@pytest.mark.slow
def test_detection_takes_smaller_batches_if_memory_is_short(
    cohort: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, reconstruct, sizes = find_cases(cohort)[7], DAE.reconstruct, []
    plenty = Detector.load(model, "cpu").detect(case)

    def cramped(method: DAE, x: torch.Tensor, box: object = None) -> torch.Tensor:
        sizes.append(len(x))
        if len(x) > 2:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
            )
        return reconstruct(method, x, box)  # type: ignore[arg-type]

    monkeypatch.setattr(DAE, "reconstruct", cramped)
    detector = Detector.load(model, "cpu")
    found = detector.detect(case)
    np.testing.assert_allclose(found.scores, plenty.scores, atol=1e-5)
    assert any("memory" in note and "2 slices at once" in note for note in found.volume.notes)
    sizes.clear()
    assert not detector.detect(case).volume.notes  # said once, remembered
    assert max(sizes) == 2
    monkeypatch.setattr(
        DAE, "reconstruct", lambda *given: (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        detector.detect(case)


@pytest.mark.slow
def test_a_training_stopped_during_validation_resumes_to_the_same_model(
    cohort: Path, cache: Path, model: Path, tmp_path: Path
) -> None:
    """A validation that is cut short is done first when the training goes on, so that the model
    is the same."""
    import signal

    from anomri.errors import Interrupted
    from anomri.training import train as training

    calls = []

    def told(state: Progress) -> None:
        calls.append(state.done)

    original = training.HealthySlices.batch

    def batch(slices: HealthySlices, numbers: list[int]) -> torch.Tensor:
        # The first batch of held-out slices after step 40.
        if len(slices.cases) == 2 and calls and calls[-1] == 39:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(slices, numbers)

    arguments = {"preset": "tiny", "cache": cache, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.HealthySlices, "batch", batch)
        with pytest.raises(Interrupted, match="stopped at step 40 of 60"):
            train(cohort, tmp_path / "m", progress=told, **arguments)  # type: ignore[arg-type]
    train(cohort, tmp_path / "m", resume=True, **arguments)  # type: ignore[arg-type]
    assert (tmp_path / "m" / "weights.safetensors").read_bytes() == (
        model / "weights.safetensors"
    ).read_bytes()
