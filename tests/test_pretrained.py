"""A training that begins with a trained model."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anomri.errors import AnomriError, Interrupted
from anomri.methods import registry as methods
from anomri.model.detector import BUILT_IN, Detector
from anomri.model.files import read_model, write_model
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.splits import read_split_cases, splits_by_name, write_splits
from anomri.spec import ModelSpec, Score
from anomri.training.recipe import Pretrained
from anomri.training.state import TrainingState
from anomri.training.train import Progress, train
from conftest import write_case


def test_a_training_starts_with_the_weights_and_recipe_of_a_model(
    cohort: Path, cache: Path, model: Path, tmp_path: Path
) -> None:
    before, _, started = read_model(model)
    # So small that nothing moves: what comes out is what went in.
    detector = train(
        cohort,
        tmp_path / "same",
        pretrained=model,
        training={"steps": 1, "learning_rate": 1e-12},
        cache=cache,
    )
    _, _, ended = read_model(tmp_path / "same")
    assert all(torch.allclose(ended[name], value, atol=1e-8) for name, value in started.items())
    again = detector.spec
    assert (again.channels, again.settings, again.scaling, again.grid) == (
        before.channels,
        before.settings,
        before.scaling,
        before.grid,
    )
    assert again.training is not None and before.training is not None
    assert (again.training.steps, again.training.batch_size) == (1, before.training.batch_size)
    assert len(again.training.pretrained) == 64 and not before.training.pretrained


@pytest.mark.slow
def test_a_score_that_was_chosen_is_chosen_again(
    cohort: Path, cache: Path, model_with_head: Path, tmp_path: Path
) -> None:
    assert Pretrained.read(model_with_head).preset().score.kind == "auto"
    short = {"steps": 2, "validate_every": 2}
    spec = train(
        cohort,
        tmp_path / "model",
        pretrained=model_with_head,
        training=short,
        subsets=True,
        cache=cache,
    ).spec
    assert spec.score.chosen_by and spec.score.kind != "auto"
    assert set(spec.subset_thresholds) == {"flair", "t1"}


@pytest.mark.slow
def test_a_cohort_with_fewer_channels_continues_with_the_same_network(
    cohort: Path, cache: Path, model_with_head: Path, tmp_path: Path
) -> None:
    alone = [replace(case, channels={"t1": case.channels["t1"]}) for case in find_cases(cohort)]
    told: list[str] = []
    still = {"steps": 1, "learning_rate": 1e-12}
    part = train(
        alone,
        tmp_path / "model",
        pretrained=model_with_head,
        training=still,
        cache=cache,
        progress=lambda state: told.append(state.note),
    )
    assert "continues without flair: the new model has t1." in told
    assert part.spec.channels == ("t1",) and part.spec.settings["network_channels"] == [
        "flair",
        "t1",
    ]
    assert part.spec.score.kind != "auto" and not part.spec.subset_thresholds
    # What it makes of T1 is what the first model makes of a scan that has nothing else.
    x = torch.rand((2, 2, 32, 40), generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0
    whole, own = methods.build(read_model(model_with_head)[0]), methods.build(part.spec)
    whole.load_state_dict(read_model(model_with_head)[2])
    own.load_state_dict(read_model(tmp_path / "model")[2])
    with torch.no_grad():
        expected, found = whole.reconstruct(x), own.reconstruct(x[:, 1:])
    assert found.shape == (2, 2, 32, 40)
    assert torch.allclose(found, expected[:, 1:], atol=1e-5)
    found = Detector.load(tmp_path / "model").detect(alone[7])
    assert found.anomaly_map.max() > 0


def test_a_network_keeps_its_channels_when_some_are_left_out_repeatedly(tmp_path: Path) -> None:
    before = Pretrained.read("built-in")
    assert before.preset().settings == before.spec.settings
    once = before.preset(("flair", "t2"))
    assert once.settings == {
        **before.spec.settings,
        "network_channels": ["flair", "t1", "t1ce", "t2"],
    }
    given = Score("positive", ("flair", "t1"))
    part = replace(
        before,
        spec=replace(before.spec, channels=("flair", "t2"), settings=once.settings, score=given),
    )
    again = part.preset(("flair",))
    assert again.settings == once.settings
    assert (again.score.kind, again.score.channels) == ("positive", ("flair",))
    networks = [
        methods.build(replace(part.spec, channels=names))
        for names in (("flair", "t2"), ("flair",), ("t2",))
    ]
    x = torch.rand((1, 2, 32, 40), generator=torch.Generator().manual_seed(0))
    for network in networks:
        network.load_state_dict(before.weights)
        # Processes of one training would wait for each other to make buffers equal.
        assert not list(network.buffers())
    both, flair, t2 = networks
    with torch.no_grad():
        for channel, one in enumerate((flair, t2)):
            alone = x * (torch.arange(2) == channel)[:, None, None]
            expected = both.reconstruct(alone)[:, [channel, 2]]
            assert torch.allclose(one.reconstruct(x[:, channel : channel + 1]), expected, atol=1e-5)


@pytest.mark.slow
def test_a_training_may_start_with_the_mean_of_several_models(
    cohort: Path, cache: Path, model_with_head: Path, tmp_path: Path
) -> None:
    spec, _, weights = read_model(model_with_head)
    moved = {name: value + 0.5 for name, value in weights.items()}
    other = replace(
        spec, channels=("flair",), settings={**spec.settings, "network_channels": ["flair", "t1"]}
    )
    write_model(
        tmp_path / "other",
        replace(other, score=Score("anomaly_probability"), data_licence="CC0"),
        moved,
    )
    write_splits(
        tmp_path / "other" / "splits.csv",
        [Case("case0", {}, split="test"), Case("else", {}, split="train")],
    )
    both = Pretrained.read_all([model_with_head, tmp_path / "other"])
    assert all(
        torch.allclose(both.weights[name], value + 0.25, atol=1e-6)
        for name, value in weights.items()
    )
    assert (both.spec.channels, both.spec.score) == (spec.channels, spec.score)
    assert both.spec.data_licence == f"{spec.data_licence}; CC0" and both.takes_subsets
    # Of two sides the one that more was seen of.
    sides = splits_by_name(Pretrained.read(model_with_head).cases)
    assert splits_by_name(both.cases) == sides | {"else": "train"} and sides["case0"] == "train"
    still = {"steps": 1, "learning_rate": 1e-12}
    trained = train(
        cohort,
        tmp_path / "mean",
        pretrained=[model_with_head, tmp_path / "other"],
        training=still,
        cache=cache,
    )
    _, _, ended = read_model(tmp_path / "mean")
    assert all(
        torch.allclose(ended[name], value + 0.25, atol=1e-5) for name, value in weights.items()
    )
    assert trained.splits["else"] == "train"
    with pytest.raises(
        AnomriError,
        match=r"brats18: its network is not that of .*model_with_head; only models that",
    ):
        Pretrained.read_all([model_with_head, "built-in"])
    alike = replace(spec, channels=("t1", "t2"))
    write_model(tmp_path / "alike", replace(alike, score=Score("anomaly_probability")), weights)
    with pytest.raises(AnomriError, match="alike: its network is not that of"):
        Pretrained.read_all([model_with_head, tmp_path / "alike"])


@pytest.mark.parametrize("channels", [["flair", "t2"], ["flair", "t1", "t1"], ["t2"]])
def test_a_description_with_other_channels_of_the_network_is_refused_by_name(
    model_with_head: Path, tmp_path: Path, channels: list[str]
) -> None:
    spec, _, weights = read_model(model_with_head)
    write_model(
        tmp_path, replace(spec, settings={**spec.settings, "network_channels": channels}), weights
    )
    with pytest.raises(
        AnomriError, match=r"model\.json: network_channels are the channels and others"
    ):
        read_model(tmp_path)


def test_the_channels_are_those_of_most_cases_that_are_not_for_testing() -> None:
    before = Pretrained.read("built-in")

    def cases(*kinds: tuple[int, str, str | None]) -> list[Case]:
        return [
            Case(
                f"{channels}{number}",
                {name: Path(name) for name in channels.split("+")},
                split=split,
            )
            for count, channels, split in kinds
            for number in range(count)
        ]

    every = "flair+t1+t1ce+t2"
    assert (
        before.channels_for(cases((3, every, "train"), (4, "flair", "test")), ())
        == before.spec.channels
    )
    # What the model does not have counts neither for nor against.
    some = cases((2, every, None), (3, f"{every}+pd", None), (4, "flair+t1", None), (2, "pd", None))
    assert before.channels_for(some, ()) == before.spec.channels
    assert before.channels_for(some, ("t1", "flair")) == ("flair", "t1")
    assert before.channels_for(cases((2, "t1+flair", None), (1, every, None)), ()) == (
        "flair",
        "t1",
    )
    with pytest.raises(AnomriError, match="has the channels flair, t1, t1ce, t2, not pd"):
        before.channels_for(cases((2, "pd", None)), ())


def test_the_model_knows_the_cases_of_both_trainings(
    cohort: Path, cache: Path, model: Path, tmp_path: Path
) -> None:
    for number in range(2):
        write_case(tmp_path / "others", f"new{number}", 20 + number, lesion=False)
    short = {"steps": 2, "validate_every": 2}
    train(tmp_path / "others", tmp_path / "model", pretrained=model, training=short, cache=cache)
    splits = {case.name: case.split for case in read_split_cases(tmp_path / "model" / "splits.csv")}
    assert splits == {case.name: case.split for case in find_cases(cohort)} | {
        name: splits[name] for name in ("new0", "new1")
    }
    assert sorted([splits["new0"], splits["new1"]]) == ["train", "val"]


def test_patients_keep_their_split_if_none_is_given(
    cohort: Path, model: Path, tmp_path: Path
) -> None:
    before = Pretrained.read(model)
    again = [replace(case, split=None) for case in find_cases(cohort)]
    new = [Case("new0", {}), Case("new1", {})]
    divided = {case.name: case.split for case in before.split([*again, *new], seed=0)}
    assert divided == {case.name: case.split for case in find_cases(cohort)} | {
        "new0": "train",
        "new1": "train",
    }
    # Nobody who was held out: some of the new ones are.
    divided = {case.name: case.split for case in before.split([*again[:5], *new], seed=0)}
    assert sorted(str(divided[case.name]) for case in new) == ["train", "val"]
    assert (
        len(
            before.other_cases(
                [replace(case, split=divided[case.name]) for case in [*again[:5], *new]]
            )
        )
        == 4
    )
    for given in (find_cases(cohort), new):
        assert before.split(given, seed=0) == given


def sided(**splits: str | None) -> list[Case]:
    return [Case(name, {}, split=split) for name, split in splits.items()]


def test_validation_patients_are_never_drawn_from_training_patients(
    model: Path,
) -> None:
    before = Pretrained.read(model)
    known = {case.name: case.split for case in before.cases}
    assert known["case0"] == known["case1"] == "train" and "val" in known.values()
    validated = next(name for name, side in known.items() if side == "val")
    for seed in range(5):
        # As a data set of nnU-Net: training and test, and nothing in between.
        found = before.split(
            sided(case0="train", case1="train", new0="train", new1="test", new2=None), seed
        )
        assert {case.name: case.split for case in found} == {
            "case0": "train",
            "case1": "train",
            "new0": "val",
            "new1": "test",
            "new2": None,
        }
    found = before.split(sided(case0="train", new0="train", **{validated: "train"}), 0)
    assert {case.name: case.split for case in found} == {
        "case0": "train",
        "new0": "train",
        validated: "val",
    }
    # Those it was to be tested on it was not trained on.
    tested = [case.name for case in before.cases if case.split == "test"]
    found = before.split(sided(case0="train", **dict.fromkeys(tested, "train")), 0)
    assert sorted(str(case.split) for case in found if case.name in tested) == ["train", "val"]
    assert before.split(sided(**dict.fromkeys(tested, "test")), 0) == sided(
        **dict.fromkeys(tested, "test")
    )
    for split in ("train", None):
        with pytest.raises(
            AnomriError, match="was trained on all of these patients; add one that it does not know"
        ):
            before.split(sided(case0=split, case1=split), 0)


def test_a_new_training_keeps_the_list_of_patients_seen_before(model: Path) -> None:
    before = Pretrained.read(model)
    validated = next(case.name for case in before.cases if case.split == "val")
    # A case of the cohort that is in none of its splits has still been seen before.
    kept = {case.name for case in before.other_cases(sided(case0="train", case1=None))}
    assert "case0" not in kept and {"case1", validated} <= kept
    with pytest.raises(
        AnomriError,
        match="in the split test, but .* was validated on that patient; give it the split val",
    ):
        before.other_cases(sided(**{validated: "test"}))
    assert before.other_cases(sided(**{validated: "train"}))


def test_a_saved_model_lists_the_patients_it_has_seen(model: Path, tmp_path: Path) -> None:
    detector = Detector.load(model)
    assert detector.splits
    for number, one in enumerate(
        (detector, detector.with_spec(detector.spec), detector.with_min_volume(9))
    ):
        one.save(tmp_path / str(number))
        assert (tmp_path / str(number) / "splits.csv").read_bytes() == (
            model / "splits.csv"
        ).read_bytes()
        assert Detector.load(tmp_path / str(number)).splits == detector.splits


def test_a_model_names_the_terms_of_both_cohorts(
    cohort: Path, cache: Path, model: Path, tmp_path: Path
) -> None:
    arguments = {"pretrained": model, "training": {"steps": 1}, "cache": cache}
    old = ModelSpec.read(model / "model.json").data_licence
    spec = train(cohort, tmp_path / "given", data_licence="CC0", **arguments).spec  # type: ignore[arg-type]
    assert spec.data_licence == f"CC0; started from weights of: {old}"
    assert Pretrained.read(model).licence(old) == old
    assert (
        Pretrained.read(model)
        .licence(None)
        .startswith("unknown for the scans that it continued with; started from")
    )


def test_training_patients_cannot_become_held_out(
    cohort: Path, cache: Path, model: Path, tmp_path: Path
) -> None:
    swapped = tmp_path / "splits.csv"
    swapped.write_text(
        "case,split\n" + "".join(f"case{k},{'val' if k == 0 else 'train'}\n" for k in range(7))
    )
    with pytest.raises(
        AnomriError, match="case0 is in the split val, but .*model was trained on that patient"
    ):
        train(cohort, tmp_path / "model", pretrained=model, splits=swapped, cache=cache)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "quick"}, "leave out --method and --preset"),
        ({"method": "vae"}, "leave out --method and --preset"),
        ({"channels": ["flair"]}, "needs all of its channels, flair, t1; leave out --channels"),
        ({"channels": ["flair", "t2"]}, "has the channels flair, t1, not flair, t2"),
        ({"channels": ["t1", "t1"]}, "two of the channels"),
        ({"settings": {"network_channels": ["t1", "flair"]}}, "leave them out"),
        ({"settings": {"widths": [4, 8]}}, "leave out settings that change the network"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    cohort: Path,
    cache: Path,
    model: Path,
    tmp_path: Path,
    arguments: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(AnomriError, match=message):
        train(cohort, tmp_path / "model", pretrained=model, cache=cache, **arguments)


def test_a_model_without_weights_cannot_be_continued(
    cohort: Path, cache: Path, tmp_path: Path
) -> None:
    train(cohort, tmp_path / "thresholding", method="thresholding", cache=cache)
    with pytest.raises(AnomriError, match="thresholding has no weights to start from"):
        train(cohort, tmp_path / "model", pretrained=tmp_path / "thresholding", cache=cache)


def test_resuming_continues_its_own_training_only(
    cohort: Path, cache: Path, model: Path, tmp_path: Path
) -> None:
    training = {"steps": 4, "validate_every": 2}

    def stop(state: Progress) -> None:
        if state.stage == "train" and state.done == 2:
            raise Interrupted("stopped", 2)

    whole = train(cohort, tmp_path / "whole", pretrained=model, training=training, cache=cache)
    with pytest.raises(Interrupted):
        train(
            cohort,
            tmp_path / "model",
            pretrained=model,
            training=training,
            cache=cache,
            progress=stop,
        )
    assert (tmp_path / "model" / TrainingState.NAME).exists()
    with pytest.raises(AnomriError, match="was begun with another training"):
        train(
            cohort, tmp_path / "model", preset="tiny", training=training, cache=cache, resume=True
        )
    resumed = train(
        cohort, tmp_path / "model", pretrained=model, training=training, cache=cache, resume=True
    )
    assert resumed.fingerprint == whole.fingerprint
    # And is known again once it is finished.
    shutil.rmtree(tmp_path / "whole")
    assert train(
        cohort, tmp_path / "model", pretrained=model, training=training, cache=cache, resume=True
    )


def test_the_built_in_model_can_be_continued() -> None:
    before = Pretrained.read("built-in")
    assert (preset := before.preset()).training is not None and preset.training.precision == "auto"
    assert preset.score.kind == "auto" and not preset.score.flips
    assert {case.split for case in before.cases} >= {"train", "val"}
    assert before.spec == ModelSpec.read(BUILT_IN / "model.json")
