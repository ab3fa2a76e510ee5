import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import anomri
from anomri.errors import AnomriError, Interrupted
from anomri.methods.base import Objective
from anomri.methods.dae import DAE
from anomri.model.detector import Detector
from anomri.runtime.interruption import StopRequest
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.splits import split_cases
from anomri.spec import Grid, ModelSpec, Scaling, Training
from anomri.training.cohort import cases_with_images, collect_notes
from anomri.training.packing import HealthySlices, cohort_fingerprint, pack_cohort
from anomri.training.state import TrainingState
from anomri.training.steps import load_optimizer, make_optimizer
from anomri.training.train import batch_numbers, learning_rate, train
from conftest import write


def log(model: Path) -> list[dict[str, float]]:
    with (model / "log.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def weights(model: Path) -> bytes:
    return (model / "weights.safetensors").read_bytes()


def test_the_loss_falls_and_the_model_describes_itself(model: Path) -> None:
    rows = log(model)
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[-1]["validation_loss"] < 0.5 * rows[0]["validation_loss"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert list((model / "tensorboard").iterdir())
    assert not (model / TrainingState.NAME).exists()
    spec = ModelSpec.read(model / "model.json")
    assert spec.channels == ("flair", "t1")
    assert spec.cohort is not None and spec.thresholds is not None
    assert (spec.cohort.training_cases, spec.cohort.validation_cases) == (5, 2)
    assert spec.cohort.left_out_slices > 0
    assert spec.thresholds.value == tuple(sorted(spec.thresholds.value))
    splits = (model / "splits.csv").read_text()
    assert "case0,train" in splits and "case6,val" in splits and "case8,test" in splits


def test_slices_with_lesion_are_left_out(cohort: Path, cache: Path) -> None:
    cases = find_cases(cohort)
    packed = pack_cohort(cases, ("flair", "t1"), Grid(), Scaling(), cache)
    for case, pack in zip(cases, packed, strict=True):
        assert (len(pack.healthy) < pack.slices) == (case.label is not None)
        assert pack.memory_map.shape == (pack.slices, 2, 128, 128)
    whole = HealthySlices(packed)
    assert len(whole) == sum(len(pack.healthy) for pack in packed)
    assert whole.batch([0, len(whole) - 1]).shape == (2, 2, 128, 128)


def test_packing_happens_once_and_again_when_a_file_changes(cohort: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort, tmp_path / "cohort")
    cases = find_cases(tmp_path / "cohort")[:2]
    first = pack_cohort(cases, ("flair",), Grid(), Scaling(), tmp_path / "cache")
    times = [pack.file.stat().st_mtime_ns for pack in first]
    second = pack_cohort(cases, ("flair",), Grid(), Scaling(), tmp_path / "cache")
    assert [pack.file.stat().st_mtime_ns for pack in second] == times
    assert cohort_fingerprint(first) == cohort_fingerprint(second[::-1])
    os.utime(cases[0].channels["flair"])
    third = pack_cohort(cases, ("flair",), Grid(), Scaling(), tmp_path / "cache")
    assert third[0].file != first[0].file
    assert cohort_fingerprint(third) == cohort_fingerprint(first)  # same content


def test_one_error_names_all_unusable_cases(cohort: Path, tmp_path: Path) -> None:
    cases = find_cases(cohort)
    with pytest.raises(AnomriError) as caught:
        pack_cohort(cases, ("flair", "t2"), Grid(), Scaling(), tmp_path)
    assert str(caught.value).startswith("9 of 9 cases cannot be used")
    assert all(case.name in str(caught.value) for case in cases)


def test_notes_before_packing_name_cases_without_label_split_or_image(cohort: Path) -> None:
    cases = split_cases(find_cases(cohort), {}, 0)
    unlabelled = "no label, so all slices are taken for healthy: 5 of 7 cases (case0, case1, case3, case4, case5)."
    assert collect_notes(cases) == [unlabelled]
    beside = [replace(case, split=None) if case.name == "case0" else case for case in cases]
    assert collect_notes(beside) == [
        unlabelled.replace("5 of 7", "4 of 6").replace("case0, ", ""),
        "in no split, not used: 1 of 9 cases (case0).",
    ]
    # What a name that is not known leaves of a case: its label, by itself.
    assert collect_notes([case for case in cases if not case.label]) == [
        "no label, so all slices are taken for healthy: every case."
    ]
    alone = Case("x2", {}, label=cases[2].label)
    with pytest.raises(
        AnomriError, match=r"case2_seg.nii.gz: is a label, but no image is called x2. "
    ):
        cases_with_images([*cases, alone])
    labelled = [case for case in cases if case.label]
    assert cases_with_images([*labelled, alone]) == (
        labelled,
        ["no image, not used: 1 of 5 cases (x2)."],
    )
    assert cases_with_images([*cases, replace(alone, split="test")])[0] == cases


class StopAt:
    """A progress callback that asks for a stop as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, state: object) -> None:
        if getattr(state, "stage", "") == "train" and state.done == self.step:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 40, 47])
def test_resuming_gives_the_model_that_was_never_stopped(
    cohort: Path, cache: Path, model: Path, tmp_path: Path, step: int
) -> None:
    arguments = {"preset": "tiny", "cache": cache, "device": "cpu"}
    with pytest.raises(
        Interrupted, match=f"stopped at step {step + 1} of 60; continue with --resume"
    ):
        train(cohort, tmp_path / "m", progress=StopAt(step), **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "m" / "model.json").exists()
    with pytest.raises(AnomriError, match="did not finish; use --resume"):
        train(cohort, tmp_path / "m", **arguments)  # type: ignore[arg-type]
    train(cohort, tmp_path / "m", resume=True, **arguments)  # type: ignore[arg-type]
    assert weights(tmp_path / "m") == weights(model)
    names = ("step", "loss", "validation_loss", "learning_rate")
    assert [[row[n] for n in names] for row in log(tmp_path / "m")] == [
        [row[n] for n in names] for row in log(model)
    ]


def test_a_bfloat16_training_is_resumed_and_saved_like_any_other(
    cohort: Path, cache: Path, tmp_path: Path
) -> None:
    schedule = {"steps": 6, "precision": "bf16-mixed"}
    arguments = {"preset": "tiny", "cache": cache, "device": "cpu", "training": schedule}
    whole = train(cohort, tmp_path / "whole", **arguments)  # type: ignore[arg-type]
    with pytest.raises(Interrupted):
        train(cohort, tmp_path / "m", progress=StopAt(3), **arguments)  # type: ignore[arg-type]
    train(cohort, tmp_path / "m", resume=True, **arguments)  # type: ignore[arg-type]
    assert weights(tmp_path / "m") == weights(tmp_path / "whole")
    whole.save(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "m")


def test_an_optimizer_state_fits_another_memory_layout() -> None:
    schedule, networks = Training(), [torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(4, 8, 3)]
    before = make_optimizer(Objective(networks[0]), schedule, torch.device("cpu"))
    networks[0](torch.rand(1, 4, 5, 5)).sum().backward()
    before.step()
    networks[1].to(memory_format=torch.channels_last)
    after = make_optimizer(
        Objective(networks[1]), replace(schedule, learning_rate=0.5), torch.device("cpu")
    )
    load_optimizer(after, before.state_dict())
    assert after.param_groups[0]["lr"] == 0.5
    for old, new in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert after.state[new][name].stride() == new.stride()
            assert torch.equal(after.state[new][name], before.state[old][name])


@pytest.mark.slow
def test_a_killed_training_resumes_from_the_last_save(
    cohort: Path, cache: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(state: object) -> None:
        if getattr(state, "stage", "") == "train" and state.done == 34:  # type: ignore[attr-defined]
            raise MemoryError("as good as killed")

    arguments = {"preset": "tiny", "cache": cache, "device": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr("anomri.training.state.SAVE_EVERY_S", 0.0)
        with pytest.raises(MemoryError):
            train(cohort, tmp_path / "m", progress=killed, **arguments)  # type: ignore[arg-type]
    assert TrainingState.load(tmp_path / "m", {}).step == 34
    train(cohort, tmp_path / "m", resume=True, **arguments)  # type: ignore[arg-type]
    assert weights(tmp_path / "m") == weights(model)


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(cohort: Path, cache: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "anomri",
        "train",
        "-i",
        str(cohort),
        "-o",
        str(tmp_path / "m"),
    ]
    command += [
        "--steps",
        "100000",
        "--cache",
        str(cache),
        "--device",
        "cpu",
        "--precision",
        "32-true",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (tmp_path / "m" / "log.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1)
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "continue with --resume" in errors
    state = TrainingState.load(tmp_path / "m", {})
    assert state.step >= 1


def test_resuming_another_task_is_refused(cohort: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(cohort, tmp_path, preset="tiny", cache=cache, progress=StopAt(3))  # type: ignore[arg-type]
    with pytest.raises(AnomriError, match="begun with another training"):
        train(cohort, tmp_path, preset="tiny", cache=cache, training={"seed": 1}, resume=True)
    swapped = tmp_path / "swapped.csv"
    swapped.write_text(
        "case,split\ncase0,val\ncase1,train\ncase2,train\ncase3,train\ncase4,train\ncase5,train\n"
    )
    with pytest.raises(AnomriError, match="begun with another training cases, validation cases"):
        train(cohort, tmp_path, preset="tiny", cache=cache, splits=swapped, resume=True)
    assert "case0,train" in (tmp_path / "splits.csv").read_text()
    with pytest.raises(AnomriError, match="begun with another method"):
        train(cohort, tmp_path, method="thresholding", cache=cache, resume=True)
    (tmp_path / TrainingState.NAME).write_bytes(b"no state")
    with pytest.raises(AnomriError, match=r"training.pt: is damaged"):
        train(cohort, tmp_path, preset="tiny", cache=cache, resume=True)


def test_a_loss_that_is_not_finite_stops(
    cohort: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "anomri.methods.noise.Noise.draw", lambda self, shape, *others: torch.full(shape, torch.nan)
    )
    with pytest.raises(
        AnomriError,
        match=r"the loss of step 1 is nan; its batch has slices of case\d, .*from step 0",
    ):
        train(cohort, tmp_path, preset="tiny", cache=cache)


@pytest.mark.slow
def test_a_training_resumes_from_before_its_loss_became_nan(
    cohort: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"preset": "tiny", "cache": cache, "device": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr(
            "anomri.training.train.learning_rate",
            lambda training, step: float("nan") if step == 28 else 1e-3,
        )
        with pytest.raises(AnomriError, match=r"loss of step 30 is nan; .* continue from step 20"):
            train(cohort, tmp_path / "m", progress=StopAt(33), **arguments)  # type: ignore[arg-type]
    assert TrainingState.load(tmp_path / "m", {}).step == 20
    # Another rate is the way out, and no other training.
    slower = train(
        cohort, tmp_path / "m", resume=True, training={"learning_rate": 1e-3}, **arguments
    )  # type: ignore[arg-type]
    assert all(np.isfinite(row["loss"]) for row in log(tmp_path / "m"))
    assert slower.spec.training is not None and slower.spec.training.learning_rate == 1e-3


class Cramped:
    """The method's loss with memory for so many slices only."""

    def __init__(self, room: int) -> None:
        self.room, self.original, self.sizes = room, DAE.forward, set[int]()

    def __call__(self, method: DAE, x: torch.Tensor, *arguments: object) -> torch.Tensor:
        if method.training:
            self.sizes.add(len(x))
            if len(x) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.original(method, x, *arguments)  # type: ignore[arg-type]


@pytest.mark.slow
def test_with_little_memory_a_batch_is_split_and_the_model_is_the_same(
    cohort: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"preset": "tiny", "cache": cache, "device": "cpu", "training": {"steps": 6}}
    whole = train(cohort, tmp_path / "whole", **arguments)  # type: ignore[arg-type]
    cramped, notes = Cramped(3), list[str]()
    monkeypatch.setattr(DAE, "forward", lambda *given: cramped(*given))
    train(cohort, tmp_path / "m", progress=lambda state: notes.append(state.note), **arguments)  # type: ignore[arg-type]
    assert cramped.sizes == {8, 4, 2}
    assert [note for note in notes if note][1:] == [
        "memory does not hold a batch at once; it is taken in 4 parts, with the same result."
    ]
    parted = train(
        cohort,
        tmp_path / "asked",
        accumulate=3,
        **{**arguments, "training": {"steps": 6, "seed": 0}},
    )  # type: ignore[arg-type]
    for name, value in anomri.load(tmp_path / "m")._state.items():
        # Adam divides by the gradient's size, so that the order of a sum shows where there is next
        # to no gradient.
        torch.testing.assert_close(value, whole._state[name], atol=1e-3, rtol=0)
        torch.testing.assert_close(parted._state[name], whole._state[name], atol=1e-3, rtol=0)
    cramped.room = 0
    with pytest.raises(
        AnomriError,
        match=r"memory does not hold a batch .CUDA out of memory.*a smaller --batch-size",
    ):
        train(cohort, tmp_path / "none", **arguments)  # type: ignore[arg-type]
    with pytest.raises(AnomriError, match="networks that take turns are trained by one process"):
        train(cohort, tmp_path / "gan", method="fanogan", cache=cache, accumulate=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "huge"}, "dae has no preset 'huge'; it has paper"),
        (
            {"method": "magic"},
            "no method 'magic'; the methods are ae, dae, diffusion, fanogan, thresholding, vae",
        ),
        ({"settings": {"depth": 3}}, "dae has no setting depth; it has widths, noise_resolution"),
        ({"settings": {"widths": 3}}, "the setting widths of dae: input should be .*; found 3"),
        ({"score": {"kind": "best"}}, "no score 'best'; the scores are own, auto, .*positive"),
        (
            {"score": {"kind": "anomaly_probability"}},
            "the score anomaly_probability needs a segmentation head, which the model does not have",
        ),
        (
            {"score": {"channels": ["FLAIR"]}},
            "the score looks at FLAIR; the model's channels are flair, t1",
        ),
        ({"score": {"median": 7}}, "a median filter of a slice can be 0, 3, 5 wide, not 7"),
        ({"training": {"depth": 3}}, "training settings .* do not fit"),
        ({"training": {"precision": "16-mixed"}}, "training.precision: .*found '16-mixed'"),
        ({"training": {"steps": 0}}, "training.steps: .*greater than or equal to 1"),
        (
            {"training": {"validate_every": 0}},
            "training.validate_every: .*greater than or equal to 1",
        ),
        ({"training": {"average": 1.0}}, "training.average: .*less than 1"),
        ({"settings": {"widths": []}}, "settings .* do not fit the method dae"),
        (
            {"settings": {"plaques": 1.5}},
            "channel_dropout and plaques are from 0 to 1; found .*1.5",
        ),
        (
            {"settings": {"noise_resolution": 0}},
            "the noise's resolution is one number from 1 on, or several; found 0",
        ),
        ({"settings": {"noise_std": []}}, "the noise's std is one number from 0 on"),
        (
            {"method": "thresholding", "training": {"steps": 3}},
            "is not trained; steps would change nothing",
        ),
        ({"device": "abacus"}, "the device 'abacus' cannot be used"),
        ({"channels": ["flair", "t2"]}, "no file for channel t2"),
        ({"channels": ["t1", "T1w"]}, "two of the channels t1, t1 are the same"),
    ],
)
def test_bad_arguments_of_train_are_refused(
    cohort: Path, cache: Path, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(AnomriError, match=message):
        train(cohort, tmp_path / "m", cache=cache, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content"), [("splits.csv", "case,split,age\ncase0,train,9\n"), ("log.csv", "a,b\n")]
)
def test_a_splits_or_log_table_of_others_is_not_replaced(
    cohort: Path, cache: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(
        AnomriError, match=f"{name}: was not written by anomri and would be overwritten"
    ):
        train(cohort, tmp_path, preset="tiny", training={"steps": 1}, cache=cache)
    assert (tmp_path / name).read_text() == content


def test_the_given_splits_may_lie_in_the_model_folder(
    cohort: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "splits.csv").write_text("case,split\ncase2,val\ncase0,train\n")
    cases = [replace(case, split=None) for case in find_cases(cohort)]
    train(cases, tmp_path, method="thresholding", splits=tmp_path / "splits.csv", cache=cache)
    assert (tmp_path / "splits.csv").read_text() == "case,split\ncase0,train\ncase2,val\n"


def test_a_damaged_training_state_is_not_resumed(tmp_path: Path) -> None:
    state = TrainingState(task={"steps": 2})
    state.best = {"w": torch.arange(20_000, dtype=torch.float32)}
    state.save(tmp_path)
    content = (tmp_path / TrainingState.NAME).read_bytes()
    assert torch.equal(TrainingState.load(tmp_path, {"steps": 2}).best["w"], state.best["w"])
    broken = bytearray(content)
    broken[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    for damaged in (bytes(broken), b"hello world", b"\x80\x02}q\xff.", content[:-100]):
        (tmp_path / TrainingState.NAME).write_bytes(damaged)
        with pytest.raises(AnomriError, match="is damaged .* delete it to train from the start"):
            TrainingState.load(tmp_path, {"steps": 2})


def test_a_finished_model_is_not_overwritten(cohort: Path, cache: Path, model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    with pytest.raises(AnomriError, match="already holds a finished model"):
        train(cohort, model, preset="tiny", cache=cache)
    fewer = [case for case in find_cases(cohort) if case.name != "case0"]
    for cases, changed in (
        (cohort, {"training": {"steps": 61}}),
        (cohort, {"score": {"median": 3}}),
        (fewer, {}),
    ):
        with pytest.raises(AnomriError, match="already holds another finished model"):
            train(cases, model, preset="tiny", cache=cache, resume=True, **changed)  # type: ignore[arg-type]
    assert train(cohort, model, preset="tiny", cache=cache, resume=True).spec == ModelSpec.read(
        model / "model.json"
    )
    assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_a_finished_training_is_recognised_however_its_settings_are_written(
    cohort: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = {"preset": "tiny", "settings": {"widths": (4, 8)}, "cache": cache, "resume": True}
    score = {"kind": "positive", "channels": ["flair"]}
    for rate in (5e-3, 1e-3):  # which a training may be resumed with another of
        training = {"steps": 2, "learning_rate": rate}
        detector = train(cohort, tmp_path / "m", training=training, score=score, **arguments)  # type: ignore[arg-type]
    assert detector.spec.settings["widths"] == [4, 8] and detector.spec.score.channels == ("flair",)
    assert detector.spec.training is not None and detector.spec.training.learning_rate == 5e-3


def test_the_smallest_labelled_lesion_leaves_its_slice_out(tmp_path: Path) -> None:
    image = np.zeros((240, 240, 6), np.float32)
    image[60:180, 60:180] = np.random.default_rng(0).normal(1, 0.1, (120, 120, 6)).clip(0.5, 1.5)
    label = np.zeros(image.shape, np.uint8)
    label[121, 121, 3] = 1
    scan, drawn = (
        write(tmp_path / f"a_{name}.nii.gz", data, np.eye(4))
        for name, data in (("t1", image), ("seg", label))
    )
    case = Case("a", {"flair": scan}, drawn)
    (pack,) = pack_cohort(
        [case], ("flair",), Grid(field_of_view_mm=None), Scaling(), tmp_path / "cache"
    )
    assert pack.slices == 6 and pack.healthy == (0, 1, 2, 4, 5)


def test_a_validation_loss_of_nan_is_an_error(
    cohort: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anomri.training.train.validation_loss", lambda *_: float("nan"))
    with pytest.raises(
        AnomriError,
        match=r"the validation loss was NaN or infinite every time; look at .*case5, case6",
    ):
        train(cohort, tmp_path / "m", preset="tiny", training={"steps": 2}, cache=cache)


def test_given_splits_and_channel_order_are_kept(cohort: Path, cache: Path, tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    table.write_text(
        "case,split\n" + "\n".join(f"case{k},{'val' if k == 0 else 'train'}" for k in range(7))
    )
    arguments = {
        "preset": "tiny",
        "training": {"steps": 2},
        "splits": table,
        "channels": ["t1", "flair"],
    }
    detector = train(cohort, tmp_path / "m", cache=cache, **arguments)  # type: ignore[arg-type]
    assert detector.spec.channels == ("t1", "flair")
    assert detector.spec.cohort is not None
    assert (detector.spec.cohort.training_cases, detector.spec.cohort.validation_cases) == (6, 1)
    assert "case0,val" in (tmp_path / "m" / "splits.csv").read_text()


def test_the_published_learning_rate_falls_and_rises_again() -> None:
    schedule = Training(learning_rate=1.0)
    rates = [learning_rate(schedule, step) for step in (0, 31, 32, 1600, 3200, 4800, 6400)]
    np.testing.assert_allclose(
        rates, [1, 1, 0.5 * (1 + np.cos(np.pi / 100)), 0.5, 0, 0.5, 1], atol=1e-12
    )
    # The reference: torch's own cosine, stepped once per 32 iterations.
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for epoch in range(250):
        assert learning_rate(schedule, 32 * epoch) == pytest.approx(
            torchs.get_last_lr()[0], abs=1e-9
        )
        optimizer.step()
        torchs.step()


def test_batches_use_every_slice_before_repeating_one() -> None:
    schedule = Training(batch_size=4)
    numbers = [number for step in range(5) for number in batch_numbers(10, schedule, step)]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]
    assert batch_numbers(3, schedule, 0)  # fewer slices than a batch holds


def test_the_paper_preset_is_the_published_one() -> None:
    paper = DAE.PRESETS["paper"]
    network = DAE(("flair", "t1", "t1ce", "t2"), **paper.settings)
    assert sum(parameter.numel() for parameter in network.parameters()) == 7_703_748
    assert (network.noise_resolution, network.noise_std) == (16, 0.2)
    training = paper.training
    assert training is not None
    assert (training.steps, training.batch_size, training.learning_rate) == (67_200, 16, 1e-4)
    assert (training.weight_decay, training.gradient_clip, training.schedule) == (
        1e-5,
        0.5,
        "published",
    )
    assert (training.precision, training.crop_to_brain) == ("32-true", False)


@pytest.mark.parametrize("box", [None, (16, 112, 8, 104)])
def test_the_loss_is_the_squared_error_on_the_foreground(
    box: tuple[int, int, int, int] | None,
) -> None:
    method = DAE(("flair",), widths=[4, 8, 16, 32])
    method.network.forward = lambda x: torch.full_like(x, 2.0)  # type: ignore[method-assign]
    x, foreground = torch.zeros(2, 1, 128, 128), torch.zeros(2, 128, 128, dtype=torch.bool)
    foreground[:, 32:64, 32:64] = True
    pixels = 128 * 128 if box is None else 96 * 96
    loss = method(x, foreground, torch.Generator(), box)
    assert float(loss) == pytest.approx(4 * 32 * 32 / pixels)


def test_flips_and_gains_change_input_and_target_alike() -> None:
    augmentation = {"flip": True, "gain": 0.5}
    method = DAE(("a", "b"), widths=[4, 8, 16, 32], noise_std=0.0, augmentation=augmentation)
    seen = []

    def perfect(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x

    method.network.forward = perfect  # type: ignore[method-assign]
    x = torch.zeros(64, 2, 32, 32)
    x[:, :, :10] = torch.tensor([1.0, 2.0])[:, None, None]
    foreground = x.sum(dim=1) > 0
    generator = torch.Generator().manual_seed(0)
    assert (
        float(method(x, foreground, generator)) == 0
    )  # no noise, a perfect reconstruction: the target follows
    mirrored = (seen[0][:, 0, 0] == 0).all(dim=1)
    assert 16 < int(mirrored.sum()) < 48
    gains = seen[0].amax(dim=(2, 3)) / torch.tensor([1.0, 2.0])
    assert 0.5 <= float(gains.min()) < 0.6 and 1.4 < float(gains.max()) <= 1.5
    assert not torch.equal(gains[:, 0], gains[:, 1])
    method.eval()
    method(x, foreground, generator)
    assert torch.equal(seen[1], x)  # validation sets the same task each time


def test_a_deeper_network_gets_a_box_it_can_halve(
    cohort: Path, cache: Path, tmp_path: Path
) -> None:
    arguments = {
        "preset": "tiny",
        "training": {"steps": 1},
        "settings": {"widths": [4, 4, 4, 4, 4]},
    }
    detector = train(cohort, tmp_path / "m", cache=cache, **arguments)  # type: ignore[arg-type]
    assert detector.spec.crop is not None
    top, bottom, left, right = detector.spec.crop
    assert (bottom - top) % 16 == (right - left) % 16 == 0


def test_a_cohort_may_have_more_cases_than_open_files_allowed(cohort: Path, cache: Path) -> None:
    packed = pack_cohort(find_cases(cohort)[:1], ("flair", "t1"), Grid(), Scaling(), cache) * 400
    slices = HealthySlices(packed)
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    slices.batch(range(0, len(slices), 10))
    after = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    assert after - before < 150


def test_a_second_signal_stops_at_once() -> None:
    with StopRequest.listen() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_thresholding_needs_no_training_but_has_thresholds(
    cohort: Path, cache: Path, tmp_path: Path
) -> None:
    detector = train(cohort, tmp_path / "m", method="thresholding", cache=cache)
    assert detector.spec.thresholds is not None
    again = anomri.load(tmp_path / "m")
    assert again.spec == detector.spec
    case = find_cases(cohort)[7]
    np.testing.assert_array_equal(again.detect(case).scores, detector.detect(case).scores)


def test_thresholds_have_the_false_positive_rates_they_state(
    cohort: Path, cache: Path, model: Path
) -> None:
    detector = Detector.load(model)
    thresholds = detector.spec.thresholds
    assert thresholds is not None
    # case5 is healthy and held out; the rates hold over both held-out cases pooled, so roughly over
    # one.
    detection = detector.detect(find_cases(cohort)[5])
    inside = detection.scores[detection.stack.foreground.numpy()]
    for rate, value in zip(thresholds.false_positive_rate, thresholds.value, strict=True):
        assert 0.2 * rate < float((inside > value).mean()) < 2 * rate
    facts = json.loads((model / "model.json").read_text())
    assert facts["thresholds"]["healthy_cases"] == 2
