"""The package: what is in the wheel and the source archive, what they need, and the container's
recipe."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from anomri.cli import main
from anomri.cli.facts import libraries_of_extra
from conftest import read_tsv, write_case

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "anomri"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}

INSTALLED = packages_distributions()


def project() -> dict[str, object]:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib comes with Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def bare(requirement: str) -> str:
    """The name of a requirement as an index writes it: `SimpleITK>=2.4` -> `simpleitk`."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def provides(requirements: list[str], module: str) -> bool:
    """Whether one of the requirements installs a module, by name or by what is installed here."""
    package = module.partition(".")[0]
    names = {bare(name) for name in [package, *INSTALLED.get(package, [])]}
    return not names.isdisjoint(bare(one) for one in requirements)


def imported_modules(tree: ast.AST) -> set[str]:
    """What a module imports, anywhere in it, but for types."""
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


def test_every_library_that_is_imported_is_a_dependency() -> None:
    required = project()["dependencies"]
    used = set().union(*(imported_modules(tree) for tree in TREES.values()))
    foreign = sorted(used - set(sys.stdlib_module_names) - {"anomri"})
    assert {"torch", "numpy", "cv2"} <= set(foreign)
    assert [name for name in foreign if not provides(required, name)] == []
    unused = [one for one in required if not any(provides([one], name) for name in foreign)]
    assert unused == []


def test_every_optional_library_is_one_of_its_extra() -> None:
    extras = project()["optional-dependencies"]
    calls = [
        [argument.value for argument in node.args[:2]]
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "import_extra"
        and all(isinstance(argument, ast.Constant) for argument in node.args[:2])
    ]
    assert len(calls) >= 5
    assert [call for call in calls if not provides(extras[call[1]], call[0])] == []


def test_the_metadata_name_no_address_that_is_made_up() -> None:
    facts = project()
    citation = (ROOT / "README.md").read_text() + (ROOT / "CITATION.cff").read_text()
    assert [url for url in facts["urls"].values() if url not in citation] == []
    assert [name for name in facts["license-files"] if not (ROOT / name).is_file()] == []


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the source archive of this checkout."""
    pytest.importorskip("hatchling", reason="needs hatchling, of anomri[dev]")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_licences_and_nothing_else(
    archives: dict[str, Path],
) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = set(wheel.namelist())
    source = {
        f"anomri/{path.relative_to(SOURCE).as_posix()}"
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for name in (
        "py.typed",
        "templates/report.html.j2",
        "static/niivue/niivue.umd.js",
        "pretrained/brats18/weights.safetensors",
    ):
        assert f"anomri/{name}" in source
    assert {name for name in names if ".dist-info/" not in name} == source
    licences = {name.partition("/licenses/")[2] for name in names if "/licenses/" in name}
    assert licences == set(project()["license-files"])
    assert archives["wheel"].stat().st_size < 10e6


@pytest.mark.slow
def test_the_source_archive_holds_what_a_build_and_a_reader_need(
    archives: dict[str, Path],
) -> None:
    with tarfile.open(archives["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/conftest.py"} <= names
    assert {f"src/anomri/{path.relative_to(SOURCE).as_posix()}" for path in TREES} <= names
    stray = r"tests/golden/|docs/.*\.(png|jpg)|\.ci/|examples/|.*\.nii(\.gz)?$|.*__pycache__"
    assert [name for name in names if re.match(stray, name)] == []
    assert archives["sdist"].stat().st_size < 10e6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_archive_installs_into_a_fresh_environment_and_works(
    kind: str, archives: dict[str, Path], tmp_path: Path
) -> None:
    fresh = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
    python = fresh / ("Scripts" if os.name == "nt" else "bin") / "python"
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        return subprocess.run(
            command, env=environ, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The libraries of the tests lie behind those of the environment. The .pth files there are not
    # read, so that an editable anomri is not seen.
    behind = [part for part in sys.path if "-packages" in part]
    (own / "libraries_of_the_tests.pth").write_text("\n".join(behind) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    run(*pip, "--no-index", "--no-deps", "--no-build-isolation", str(archives[kind]))

    anomri = python.with_name("anomri")
    home = run(python, "-c", "import anomri; print(anomri.__file__)").strip()
    assert Path(home).is_relative_to(own)
    assert run(anomri, "--version").split()[-1] == project()["version"]
    information = run(anomri, "info")
    assert f"anomri   {project()['version']}" in information
    assert "trained on" in information
    write_case(tmp_path / "scans", "case1", 1, lesion=True)
    run(anomri, "detect", "-i", tmp_path / "scans", "-o", tmp_path / "out", "--device", "cpu")
    image = nib.load(next((tmp_path / "out").rglob("case1_anomaly.nii.gz")))
    assert np.asanyarray(image.dataobj).max() > 0
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile: their names and the rest of their lines."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines) if name]


def test_the_container_installs_what_the_project_asks_for() -> None:
    facts, recipe = project(), instructions()
    pips = [rest for name, rest in recipe if name == "RUN" and "pip install" in rest]
    assert len(pips) == 2
    torch = next(one for one in facts["dependencies"] if bare(one) == "torch")
    assert torch in shlex.split(pips[0])
    (extras,) = re.findall(r"/src\[([\w,]+)\]", pips[1])
    assert (
        {"bids", "bet", "register"} == set(extras.split(",")) <= set(facts["optional-dependencies"])
    )
    assert all(libraries_of_extra(extra) for extra in extras.split(","))
    # Debian 12 has Python 3.11.
    assert dict(recipe)["FROM"] == "debian:bookworm-slim"
    assert facts["requires-python"] == ">=3.10"
    # pip asks the ordinary index, and that of torch for its build for processors.
    hosts = re.findall(r"https?://([\w.-]+)", (ROOT / "Dockerfile").read_text())
    assert hosts == ["download.pytorch.org"]
    assert "/whl/cpu" in dict(recipe)["ARG"]


def test_the_container_starts_the_bids_app_without_rights() -> None:
    from anomri.cli import app

    recipe = instructions()
    program, command = json.loads(dict(recipe)["ENTRYPOINT"])
    assert program in project()["scripts"]
    assert command in [one.name or one.callback.__name__ for one in app.registered_commands]
    assert dict(recipe)["USER"] not in {"root", "0"}
    assert recipe.index(("USER", "anomri")) < [name for name, _ in recipe].index("ENTRYPOINT")
    assert dict(re.findall(r"(\w+)=(\S+)", dict(recipe)["ENV"]))["HOME"] == "/tmp"


def test_the_container_is_given_the_files_that_a_build_needs() -> None:
    facts = project()
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY"]
    sources = {source for line in copied for source in line}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert sources == allowed
    assert [source for source in sources if not (ROOT / source).exists()] == []
    needed = ["pyproject.toml", facts["readme"], *facts["license-files"], "src"]
    assert [name for name in needed if name.partition("/")[0] not in sources] == []


@pytest.fixture
def example() -> Path:
    folder = ROOT / "examples"
    if not folder.is_dir():
        pytest.skip("the source archive has no example scan")
    return folder


def test_the_example_scan_is_small_anonymous_and_given_away_with_its_source(example: Path) -> None:
    files = sorted(example.rglob("*.nii.gz"))
    assert [path.name for path in files] == [
        f"ms01_{name}.nii.gz" for name in ("flair", "t1", "t2")
    ]
    assert sum(path.stat().st_size for path in files) < 4e6
    images = [nib.load(path) for path in files]
    assert len({(image.shape, image.affine.tobytes()) for image in images}) == 3
    for image in images:
        assert image.get_data_dtype() == np.uint8
        assert not image.header["descrip"].item() and not image.header.extensions
    said = " ".join((example / "README.md").read_text(encoding="utf-8").replace(">", "").split())
    assert "Creative Commons Attribution" in said and "What was changed" in said
    assert "Neuroinformatics 14 (2016), 403-420" in said


@pytest.mark.slow
def test_the_first_real_scan_gives_what_the_documentation_says(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepbet", reason="needs anomri[bet]")
    pytest.importorskip("SimpleITK", reason="needs anomri[register]")
    monkeypatch.setattr("anomri.scans.skull.TOOLS", ())
    command = ["detect", "-i", str(example), "--skull-strip", "--register", "--device", "cpu"]
    assert main([*command, "-o", str(tmp_path / "out")]) == 0
    columns, (row,) = read_tsv(tmp_path / "out" / "cases.tsv")
    case = dict(zip(columns, row, strict=True))
    assert case["channels"] == "flair,t1,t2" and case["lesions"] == "0"
    assert "80% of which it covers" in case["notes"]
    brain = re.search(
        r"by deepbet in channel t1, and in flair where t1 does not reach \((\d+) ml of it\): ([\d,]+) ml",
        case["notes"],
    )
    assert brain is not None
    assert int(brain[1]) == pytest.approx(20, abs=2)
    assert int(brain[2].replace(",", "")) == pytest.approx(1373, abs=10)
