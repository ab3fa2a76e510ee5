"""Every method on the small cohort: it learns, it is saved and loaded, it goes on after a stop."""

import csv
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

import anomri
from anomri.cli.options import parse_settings
from anomri.errors import AnomriError, Interrupted
from anomri.methods import registry as methods
from anomri.methods.base import Method
from anomri.methods.dae import DAE
from anomri.methods.diffusion import Diffusion, signal_share
from anomri.methods.fanogan import FAnoGAN
from anomri.methods.networks.gan import Downward
from anomri.methods.simplex import simplex_noise
from anomri.methods.vae import VAE, total_variation
from anomri.model.files import read_model, write_model
from anomri.scans.find import find_cases
from anomri.slices import cut_box, paste_box
from anomri.spec import ModelSpec, Training
from anomri.training.train import learning_rate, train
from test_training import StopAt

WIDTHS = [2, 4, 8, 16]
FAST = {"batch_size": 4, "validate_every": 8, "validation_slices": 8, "precision": "32-true"}
TRAINED = {
    "ae": ({"widths": WIDTHS, "bottleneck": 4}, {"steps": 32, "learning_rate": 1e-2}),
    "vae": ({"widths": WIDTHS, "latent": 4}, {"steps": 32, "learning_rate": 1e-2}),
    "fanogan": (
        {"width": 1, "latent": 4, "gan_share": 0.4, "encoder_rate": 1.0},
        {"steps": 60, "validate_every": 5, "learning_rate": 1e-2},
    ),
    "diffusion": ({"widths": WIDTHS, "strides": 2}, {"steps": 32, "learning_rate": 1e-2}),
}


def arguments(method: str, cache: Path) -> dict[str, object]:
    settings, training = TRAINED[method]
    return {
        "method": method,
        "preset": "demo",
        "settings": settings,
        "training": {**FAST, **training},
        "cache": cache,
        "device": "cpu",
    }


@pytest.fixture(scope="module", params=TRAINED)
def trained(
    request: pytest.FixtureRequest,
    cohort: Path,
    cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    train(cohort, folder, **arguments(request.param, cache))  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def vae() -> VAE:
    """A restoring VAE that has learnt three slices a little: an untrained one has no objective
    worth lowering."""
    torch.manual_seed(0)
    method = VAE(("flair", "t1"), WIDTHS, latent=4, restoration_steps=15, restoration_rate=0.02)
    optimizer = torch.optim.Adam(method.parameters(), 1e-2)
    for step in range(25):
        optimizer.zero_grad()
        method(brains(), brains().sum(dim=1) > 0, Generator().manual_seed(step)).backward()
        optimizer.step()
    return method.eval()


def brains(count: int = 3) -> torch.Tensor:
    place = torch.linspace(-1, 1, 128)
    inside = (place[:, None] ** 2 + place[None, :] ** 2) < 0.6
    return inside * (
        0.7 + 0.1 * torch.rand((count, 2, 128, 128), generator=Generator().manual_seed(0))
    )


def test_the_loss_of_every_method_falls(trained: Path) -> None:
    with (trained / "log.csv").open() as file:
        losses = [float(row["validation_loss"]) for row in csv.DictReader(file)]
    known = [loss for loss in losses if loss == loss]
    assert known[-1] < 0.95 * known[0]
    # f-AnoGAN's encoder has the last steps alone, and before them there is no loss to compare.
    assert (len(known) < len(losses)) == (trained.name == "fanogan")


def test_a_saved_model_gives_the_same_map_bit_for_bit(
    trained: Path, cohort: Path, tmp_path: Path
) -> None:
    detector = anomri.load(trained, device="cpu")
    case = find_cases(cohort)[7]
    before = detector.detect(case)
    detector.save(tmp_path)
    np.testing.assert_array_equal(
        before.anomaly_map, anomri.load(tmp_path, device="cpu").detect(case).anomaly_map
    )
    assert before.anomaly_map.max() > 0
    assert detector.spec.thresholds is not None
    assert "AUPRC, pooled" in [
        figure.name for figure in anomri.evaluate(cohort, model=detector).figures
    ]


@pytest.mark.slow
def test_a_resumed_training_gives_the_model_of_an_unbroken_one(
    trained: Path, cohort: Path, cache: Path, tmp_path: Path
) -> None:
    given = arguments(trained.name, cache)
    # In the middle of the GAN's turns, and after a validation that the next step does not repeat.
    with pytest.raises(Interrupted):
        train(cohort, tmp_path, progress=StopAt(12), **given)  # type: ignore[arg-type]
    train(cohort, tmp_path, resume=True, **given)  # type: ignore[arg-type]
    assert (tmp_path / "weights.safetensors").read_bytes() == (
        trained / "weights.safetensors"
    ).read_bytes()


NETWORKS = [name for name in methods.names() if name != "thresholding"]


@pytest.mark.parametrize(
    "recipe",
    [f"{name} {preset}" for name in NETWORKS for preset in ("paper", "small", "demo")]
    + ["dae quick", "dae accurate"],
)
def test_every_method_has_its_presets(recipe: str) -> None:
    method, preset = recipe.split()
    chosen = methods.preset(method, preset)
    assert chosen.training is not None
    spec = ModelSpec(("flair", "t1"), method, chosen.settings, training=chosen.training)
    assert spec.checked() == spec
    with torch.device("meta"):
        built = methods.build(spec)
    assert isinstance(built, Method)
    assert {objective.name for objective in built.objectives()} == (
        {"critic", "generator", "encoder"} if method == "fanogan" else {""}
    )


def test_baselines_have_the_published_settings() -> None:
    with torch.device("meta"):
        vae, gan = VAE(("flair",)), FAnoGAN(("flair",))
    assert vae.to_latent.weight.shape == (256, 512, 16, 16)
    assert (
        vae.kl_weight,
        methods.preset("vae-restoration", "paper").settings["restoration_steps"],
    ) == (1e-3, 100)
    training = methods.preset("fanogan", "paper").training
    assert training is not None
    rates = [objective.rate * training.learning_rate for objective in gan.objectives()]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-5])
    assert (training.batch_size, gan.kappa) == (32, 1e-8)


def test_restoration_lowers_its_objective_slice_by_slice(vae: VAE) -> None:
    x = brains()
    inside = (x != 0).any(dim=1, keepdim=True)
    with torch.no_grad():
        restored = vae.reconstruct(x)
        before, after = (vae.restoration_objective(y, x, inside) for y in (x, restored))
        alone = vae.reconstruct(x[1:2])
    assert (after < 0.95 * before).all()
    assert torch.equal(restored * ~inside, torch.zeros_like(x))
    torch.testing.assert_close(
        alone, restored[1:2], atol=1e-3, rtol=0
    )  # slices do not see each other


def test_the_restoration_weight_keeps_the_image_near_the_input(vae: VAE) -> None:
    x = brains(1)
    moved = []
    for weight in (0.0, 1.0):
        vae.restoration_weight = weight
        moved.append(float((vae.restore(x) - x).abs().mean()))
    vae.restoration_weight = 0.1
    assert moved[1] < 0.8 * moved[0]
    step = torch.zeros(1, 1, 8, 8)
    step[..., 2:4, 2:4] = 3.0
    assert float(total_variation(step)) == 3.0 * 8


def test_one_training_serves_reconstruction_and_restoration(vae: VAE) -> None:
    settings = {"widths": WIDTHS, "latent": 4}
    restoring = methods.build(
        ModelSpec(("flair", "t1"), "vae-restoration", {**settings, "restoration_steps": 2})
    )
    restoring.load_state_dict(vae.state_dict())
    assert not torch.equal(
        restoring.eval().reconstruct(brains(1)), vae.decode(vae.posterior(brains(1))[0])
    )
    assert methods.preset("vae-restoration", "small").weights_of == "vae"


def test_the_critic_separates_real_from_made_up() -> None:
    torch.manual_seed(0)
    gan = FAnoGAN(("flair", "t1"), width=1, latent=4)
    critic, generator, encoder = (objective.module for objective in gan.objectives())
    optimizer = torch.optim.Adam(critic.parameters(), 1e-2, betas=(0.0, 0.9))
    x, foreground = brains(4), brains(4).sum(dim=1) > 0
    before = [parameter.clone() for parameter in generator.parameters()]
    for step in range(15):
        loss = gan(x, foreground, Generator().manual_seed(step), objective="critic")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, generator.parameters(), strict=True))
    made_up = generator(torch.randn(4, 4))
    with torch.no_grad():
        assert critic(x).min() > critic(made_up).max()
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_the_objectives_of_fanogan_take_turns() -> None:
    gan = FAnoGAN(("flair",), width=1, gan_share=0.5)
    turns = [
        [objective.name for objective in gan.objectives() if objective.active(step, 20)]
        for step in range(20)
    ]
    assert turns[:5] == [["critic"]] * 4 + [["critic", "generator"]]
    assert turns[10:] == [["encoder"]] * 10
    assert [objective.name for objective in gan.objectives() if objective.active(0, 1)] == [
        "encoder"
    ]


def test_a_critic_sees_one_slice_at_a_time() -> None:
    torch.manual_seed(0)
    critic = Downward(2, 1, 1)
    torch.testing.assert_close(critic(brains(3))[:1], critic(brains(3)[:1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("noise", ["gaussian", "simplex", "coarse"])
def test_diffusion_with_little_noise_returns_the_input(noise: str) -> None:
    torch.manual_seed(0)
    x, box = brains(), (8, 120, 16, 112)
    settings = {"widths": WIDTHS, "noise": noise}
    with torch.no_grad():
        none = Diffusion(("flair", "t1"), start=0, **settings).reconstruct(x, box)  # type: ignore[arg-type]
        little = Diffusion(("flair", "t1"), start=1, **settings).reconstruct(x, box)  # type: ignore[arg-type]
        much = Diffusion(("flair", "t1"), start=500, **settings).reconstruct(x, box)  # type: ignore[arg-type]
    inside = cut_box(x, box)
    torch.testing.assert_close(cut_box(none, box), inside)
    assert (
        0
        < float((cut_box(little, box) - inside).abs().mean())
        < 0.02
        < float((cut_box(much, box) - inside).abs().mean())
    )
    assert torch.equal(none, paste_box(cut_box(none, box), (128, 128), box))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_network_that_knows_the_noise_denoises_exactly(eta: float) -> None:
    """The scheme itself, step by step and strided: with the true noise, every jump lands on the
    true slice."""
    method = Diffusion(("flair", "t1"), WIDTHS, noise="gaussian", start=250, strides=7, eta=eta)
    x = brains(1)

    def true_noise(noisy: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        share = method.signal[time][:, None, None, None]
        return (noisy - share.sqrt() * (2 * x - 1)) / (1 - share).sqrt()

    method.network.forward = true_noise  # type: ignore[method-assign, assignment]
    torch.testing.assert_close(method.reconstruct(x), x, atol=1e-4, rtol=0)
    assert method.times == [250, 214, 179, 143, 107, 71, 36, 0]


def test_the_noise_schedules_of_diffusion_are_the_published_ones() -> None:
    linear, cosine = signal_share(1000, "linear"), signal_share(1000, "cosine")
    for share in (linear, cosine):
        assert share.shape == (1001,)
        assert share[0] == 1
        assert (share.diff() < 0).all()
    assert float(linear[1]) == pytest.approx(1 - 1e-4)
    assert float(linear[-1]) == pytest.approx(
        4.04e-5, rel=0.01
    )  # Ho et al. 2020: nearly pure noise
    assert float(cosine[500]) == pytest.approx(
        0.4938, abs=1e-3
    )  # Nichol and Dhariwal 2021: half way at half time


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": "pink"}, "no noise 'pink'"),
        ({"schedule": "steep"}, "no schedule 'steep'"),
        ({"start": 2000}, "can start at steps 0 to 1000"),
    ],
)
def test_bad_settings_of_diffusion_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(AnomriError, match=message):
        Diffusion(("flair",), WIDTHS, **settings)  # type: ignore[arg-type]


def test_simplex_noise_is_smooth_and_standard() -> None:
    noise = simplex_noise((64, 2, 64, 64), wavelength=8, generator=Generator().manual_seed(0))
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    one = simplex_noise(
        (4, 1, 128, 128), wavelength=32, octaves=1, generator=Generator().manual_seed(0)
    )
    # No jump at the borders of the triangles: neighbours differ by little of the range.
    assert float(one.diff(dim=2).abs().max()) < 0.25 * float(one.max() - one.min()) / 2
    fields = one.flatten(1)
    assert abs(float(torch.corrcoef(fields)[0, 1])) < 0.5
    again = simplex_noise(
        (4, 1, 128, 128), wavelength=32, octaves=1, generator=Generator().manual_seed(0)
    )
    assert torch.equal(one, again)


def test_a_constant_learning_rate_stays_constant() -> None:
    schedule = replace(Training(), schedule="constant", learning_rate=0.5)
    assert {learning_rate(schedule, step) for step in (0, 1000, 67_000)} == {0.5}


@pytest.mark.parametrize("noise", ["gaussian", "simplex", "coarse"])
def test_the_noises_of_diffusion_have_the_variance_of_its_schedule(noise: str) -> None:
    method = Diffusion(("flair",), widths=[4, 8], noise=noise)  # type: ignore[arg-type]
    drawn = method.draw(torch.zeros(64, 1, 64, 64), torch.Generator().manual_seed(3))
    assert float(drawn.var()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("noise", ["gaussian", "simplex", "coarse"])
def test_diffusion_reconstructs_a_slice_independently_of_its_batch(noise: str) -> None:
    method = Diffusion(
        ("flair",), widths=[4, 8], noise=noise, steps=50, start=20, strides=4, eta=1.0
    ).eval()  # type: ignore[arg-type]
    x = torch.rand(5, 1, 32, 32, generator=Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            method.reconstruct(x)[3:], method.reconstruct(x[3:]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("method", "grid", "sides"), [("dae", 100, 8)])
def test_a_grid_that_does_not_fit_is_refused_before_anything_is_packed(
    method: str, grid: int, sides: int, cohort: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        AnomriError, match=f"{grid} x {grid} does not fit the method, .* multiples of {sides}"
    ):
        train(
            cohort,
            tmp_path / "model",
            method=method,
            grid=grid,
            preset="small",
            cache=tmp_path / "cache",
        )
    with pytest.raises(
        AnomriError, match=r"works on slices of 128 x 128 only, not 256 x 256; leave out --grid"
    ):
        train(
            cohort,
            tmp_path / "model",
            method="vae",
            grid=256,
            preset="small",
            cache=tmp_path / "cache",
        )
    assert not (tmp_path / "cache").exists()


class Mine(DAE):
    """A method of another package."""

    def __init__(self, channels: list[str], extra: int = 1, **settings: Any) -> None:
        super().__init__(channels, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"anomalies": "no"},
            "the setting anomalies of dae: input should be a valid boolean; found 'no'",
        ),
        ({"noise_resolution": 8.5}, "the setting noise_resolution of dae: .*; found 8.5"),
        ({"noise_share": "half"}, "the setting noise_share of dae: .*; found 'half'"),
        ({"augmentation": {"flip": "no"}}, "the augmentation flip is true or false; found 'no'"),
        ({"augmentation": {"turn": True}}, "the augmentation turn is a number; found True"),
    ],
)
def test_a_setting_of_another_type_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(AnomriError, match=message):
        methods.build(ModelSpec(("flair",), settings=settings))


def test_settings_read_true_and_false_as_booleans() -> None:
    assert parse_settings(["a=False", "b=True", "c=false", "d=no"]) == {
        "a": False,
        "b": True,
        "c": False,
        "d": "no",
    }


class Heavy(DAE):
    """What keeps a table that it does not save, and has a setting larger than a model's
    description may hold."""

    def __init__(
        self, channels: Sequence[str], widths: tuple[int, ...], table: int, seed: int = 0
    ) -> None:
        super().__init__(channels, widths)
        self.register_buffer("table", torch.zeros(table), persistent=False)


def test_a_model_that_could_not_be_loaded_again_is_not_trained(
    monkeypatch: pytest.MonkeyPatch, cohort: Path, cache: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(methods, "PLACES", dict(methods.PLACES))
    methods.register("heavy", f"{__name__}:Heavy")
    given: dict[str, Any] = {
        "method": "heavy",
        "preset": "tiny",
        "training": {"steps": 1},
        "cache": cache,
    }
    for settings in ({}, {"table": 0, "seed": 5_000_000}):
        with pytest.raises(
            AnomriError, match="a model of heavy with these settings could not be read again"
        ):
            train(cohort, tmp_path / "model", settings={"table": 2**20, **settings}, **given)
    assert not (tmp_path / "model").exists()
    # A tuple is a list in model.json, and infinity is a number.
    spec = ModelSpec(("flair",), "heavy", {"widths": (2, 4), "table": 2}).checked()
    methods.build(spec)
    state = {**methods.build(spec).state_dict(), "network.head.bias": torch.full((1,), torch.inf)}
    write_model(tmp_path / "infinite", spec, state)
    assert read_model(tmp_path / "infinite")[2]["network.head.bias"] == torch.inf


def test_other_packages_can_add_methods(
    monkeypatch: pytest.MonkeyPatch, cohort: Path, cache: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(methods, "PLACES", dict(methods.PLACES))
    with pytest.raises(AnomriError, match="there is no method 'mine'"):
        train(cohort, tmp_path, method="mine", cache=cache)
    methods.register("mine", f"{__name__}:Mine")
    train(cohort, tmp_path, method="mine", preset="tiny", training={"steps": 2}, cache=cache)
    assert type(anomri.load(tmp_path).method) is Mine
    methods.register("broken", f"{__name__}:Nothing")
    with pytest.raises(AnomriError, match="the method 'broken' cannot be loaded from .*Nothing"):
        methods.preset("broken", "small")
    with pytest.raises(AnomriError, match="there is a method 'dae' already"):
        methods.register("dae", f"{__name__}:Mine")
    points = EntryPoints(
        [
            EntryPoint("theirs", f"{__name__}:Mine", "anomri.methods"),
            EntryPoint("dae", "x:y", "anomri.methods"),
        ]
    )
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points.select(group=group))
    assert (
        "theirs" in methods.names()
        and methods.load("theirs") is Mine
        and methods.load("dae") is DAE
    )


class NoMethod:
    """A class that is not derived from `Method`."""


class Unfinished(Method):
    """A method that cannot reconstruct."""

    PRESETS = DAE.PRESETS

    def forward(self, *arguments: Any) -> torch.Tensor:
        raise NotImplementedError


def test_a_class_that_is_not_a_complete_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "PLACES", dict(methods.PLACES))
    for name, message in (
        ("NoMethod", "is not a subclass of anomri.methods.base.Method"),
        ("parse_settings", "is not a subclass of anomri.methods.base.Method"),
        ("Unfinished", r"the method 'Unfinished' \(.*:Unfinished\) lacks reconstruct"),
    ):
        methods.register(name, f"{__name__}:{name}")
        with pytest.raises(AnomriError, match=message):
            methods.build(ModelSpec(("flair",), name))


def test_the_names_of_methods_are_known_without_torch() -> None:
    program = "import sys; from anomri.methods import registry; print(registry.names(), 'torch' in sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert printed == f"{methods.names()} False\n"
