"""Fixtures: a small cohort of ellipsoid brains on disk, a model trained on it, and where real
scans lie."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock

import anomri
from anomri.methods.dae import DAE
from anomri.spec import Scaling
from anomri.training.passes import SlabCounts

REAL = Path(__file__).parents[2] / "shared" / "data"
GOLDEN = Path(__file__).parent / "golden"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--dump-dom",
)
SHAPE = (64, 60, 14)
AFFINE = np.array([[-3.75, 0, 0, 120], [0, -3.75, 0, 110], [0, 0, 8, -40], [0, 0, 0, 1]])


@pytest.fixture
def real_scans() -> Path:
    """The real scans' folder; skips where it is absent."""
    if not (REAL / "brats18").is_dir():
        pytest.skip(f"no real scans at {REAL}")
    return REAL


def brain(rng: np.random.Generator, *, lesion: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Two channels (float32) and a lesion label of one ellipsoid brain with a dark ventricle."""
    place = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    radius = np.sqrt(
        ((place / rng.uniform([0.6, 0.7, 0.8], [0.65, 0.78, 0.9])[:, None, None, None]) ** 2).sum(0)
    )
    inside = radius < 1
    ventricle = (
        np.sqrt(((place - rng.uniform(-0.05, 0.05, 3)[:, None, None, None]) ** 2).sum(0)) < 0.2
    )
    flair = inside * (0.6 + 0.2 * radius - 0.4 * ventricle)
    t1 = inside * (0.8 - 0.3 * radius - 0.4 * ventricle)
    label = np.zeros(SHAPE, bool)
    if lesion:
        centre = rng.uniform([0.05, -0.25, -0.25], [0.55, 0.25, 0.25])
        label = inside & (np.sqrt(((place - centre[:, None, None, None]) ** 2).sum(0)) < 0.22)
        flair, t1 = flair + 0.45 * label, t1 - 0.2 * label
    gains = rng.uniform(100, 2000, 2)
    channels = {
        name: (
            gain * np.clip(image + inside * rng.normal(0, 0.02, SHAPE), 0.01 * inside, None)
        ).astype(np.float32)
        for (name, image), gain in zip({"flair": flair, "t1": t1}.items(), gains, strict=True)
    }
    return channels, label


def write(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """Write an array as NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def read_tsv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of a table."""
    with path.open(newline="", encoding="utf-8") as file:
        columns, *rows = csv.reader(file, delimiter="\t")
    return columns, rows


def write_case(folder: Path, name: str, seed: int, *, lesion: bool) -> None:
    """Write one case of the small cohort in the BraTS layout."""
    channels, label = brain(np.random.default_rng(seed), lesion=lesion)
    for channel, data in channels.items():
        write(folder / name / f"{name}_{channel}.nii.gz", data)
    if lesion:
        write(folder / name / f"{name}_seg.nii.gz", label.astype(np.uint8))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def make_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Let the first process that needs ``folder`` make it; the others wait for it."""
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def cohort(shared: Path) -> Path:
    """Five healthy training cases, two for validation (one with a lesion), two lesioned test cases.

    All tests share it: who changes a file copies it first.
    """

    def make(folder: Path) -> None:
        lines = ["case,split"]
        for number in range(9):
            split = "train" if number < 5 else "val" if number < 7 else "test"
            write_case(folder, f"case{number}", number, lesion=number in (2, 6, 7, 8))
            lines.append(f"case{number},{split}")
        (folder / "splits.csv").write_text("\n".join(lines) + "\n")

    return make_once(shared / "cohort", make)


@pytest.fixture(scope="session")
def cache(shared: Path) -> Path:
    """One packed cohort for all tests."""
    folder = shared / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def few_spheres() -> Iterator[None]:
    """Plant fewer spheres for thresholds of subsets: a short training takes longest for these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anomri.training.thresholds.SUBSET_SLABS", SlabCounts(6, 4))
        yield


@pytest.fixture(scope="session", autouse=True)
def tiny_preset() -> None:
    """A preset ``tiny`` that trains in a second or two."""
    small = DAE.PRESETS["small"]
    assert small.training is not None
    DAE.PRESETS["tiny"] = replace(
        small,
        settings={"widths": [4, 8, 16, 32]},
        scaling=Scaling(),
        training=replace(
            small.training,
            steps=60,
            batch_size=8,
            learning_rate=5e-3,
            precision="32-true",
            validate_every=20,
            # What pays off in a thousand steps does not in sixty.
            warmup=0,
            average=0.0,
            amsgrad=True,
            gradient_clip=0.5,
        ),
    )


@pytest.fixture(scope="session")
def model(cohort: Path, cache: Path, shared: Path, tiny_preset: None) -> Path:
    """A model folder trained on the small cohort."""
    return make_once(
        shared / "model",
        lambda folder: anomri.train(cohort, folder, preset="tiny", cache=cache, device="cpu"),
    )


@pytest.fixture(scope="session")
def model_with_head(cohort: Path, cache: Path, shared: Path) -> Path:
    """A model of a few steps with a segmentation head; it takes subsets and chose its score."""
    return make_once(
        shared / "model_with_head",
        lambda folder: anomri.train(
            cohort,
            folder,
            preset="accurate",
            settings={"widths": [4, 8, 16, 32]},
            training={"steps": 12, "batch_size": 4, "validate_every": 6},
            subsets=True,
            cache=cache,
        ),
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests first, so that no process waits for one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
