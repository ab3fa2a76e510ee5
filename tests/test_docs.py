"""The documentation holds: its examples run, its messages and commands exist, and its links lead
somewhere."""

from __future__ import annotations

import ast
import doctest
import re
import textwrap
from pathlib import Path

import pytest

import anomri
from anomri.cli import main
from anomri.methods import registry

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OUTSIDE_THE_SITE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
CARD = "src/anomri/pretrained/brats18/MODEL_CARD.md"


@pytest.mark.slow
def test_the_python_examples_print_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    # A fence would belong to the output above it.
    examples = re.sub(r"^```.*$", "", text, flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(examples, {}, "python.md", "docs/python.md", 0)
    assert len(test.examples) > 20
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    doctest.DocTestRunner().run(test, out=report.append)
    assert not report, "".join(report)


def test_every_message_on_the_troubleshooting_page_is_in_the_source() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`", text, flags=re.MULTILINE)
    assert len(quoted) > 15
    # Names and numbers are written as an ellipsis there.
    parts = [part.strip() for message in quoted for part in message.split("…") if part.strip()]
    known = "\n".join(_texts())
    gone = [part for part in parts if part not in known]
    assert not gone, "no longer in the source, update docs/troubleshooting.md: " + "; ".join(gone)


def _texts() -> list[str]:
    """The texts in the source, with an ellipsis for what is filled in."""
    texts = []
    for path in (ROOT / "src" / "anomri").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                values = (
                    one.value if isinstance(one, ast.Constant) else "…" for one in node.values
                )
                texts.append("".join(map(str, values)))
    return texts


@pytest.mark.parametrize("page", [*OUTSIDE_THE_SITE, CARD])
def test_links_outside_the_site_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_commands_and_options_in_the_documentation_exist() -> None:
    import typer.main

    from anomri.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    options = {
        name: {one for param in command.params for one in (*param.opts, *param.secondary_opts)}
        for name, command in commands.items()
    }
    unknown = []
    for path in [*DOCS.glob("*.md"), ROOT / "README.md"]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"(?:^|[`\s])anomri ([a-z-]+(?: [^`\n#|]*)?)", text):
            name, *words = line.split()
            if name in commands:
                given = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
                unknown += [
                    f"{path.name}: {name} {one}" for one in given - options[name] - {"--help"}
                ]
    assert unknown == []


def test_every_folder_drawn_on_the_page_about_scans_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (DOCS / "scans.md").read_text(encoding="utf-8")
    drawn = re.findall(
        r'^=== "([^"]+)"\n(?:(?!===).*\n)*?    ```text\n((?:    .*\n)+?)    ```', text, re.M
    )
    trees = {name: tree for name, tree in drawn if name != "A table"}
    assert len(trees) == 7
    found = {}
    for name, tree in trees.items():
        folder = _draw(tmp_path / name, tree)
        cases = anomri.find_cases(folder)
        found[name] = [
            (case.name, case.patient, sorted(case.channels), bool(case.label)) for case in cases
        ]
    assert found == {
        "A folder for each case": [("case01", "case01", ["flair", "t1"], True)],
        "All files in one folder": [
            ("case01", "case01", ["flair", "t1"], False),
            ("case02", "case02", ["flair", "t1"], False),
        ],
        "Patients": [
            ("P01", "P01", ["flair", "t1"], False),
            ("P02", "P02", ["flair", "t1"], False),
        ],
        "Patients and visits": [
            ("P01_v1", "P01", ["flair"], False),
            ("P01_v2", "P01", ["flair"], False),
            ("P02_v1", "P02", ["flair"], False),
        ],
        "Processing steps": [("P01", "P01", ["flair"], True)],
        "BIDS": [("sub-01", "sub-01", ["flair", "t1"], True)],
        "nnU-Net": [("case01", "case01", ["flair"], True), ("case09", "case09", ["flair"], False)],
    }
    shown = re.search(r"prints:\n\n```text\n(.+?)```", text, re.DOTALL)
    assert shown
    monkeypatch.chdir(tmp_path / "Processing steps")
    assert main(["list", "cohort"]) == 0
    printed = capsys.readouterr()
    # In a pipe the table is machine-readable and the rest goes to standard error.
    table = [line for line in shown[1].splitlines() if line.startswith(("case ", "P01 "))]
    assert [*shown[1].splitlines()] == [
        printed.err.splitlines()[0],
        *table,
        *printed.err.splitlines()[1:],
    ]


def _draw(folder: Path, tree: str) -> Path:
    """Make the files of a tree, two spaces a level; empty but for descriptions. Returns the
    topmost folder."""
    contents = {
        "dataset_description.json": '{"Name": "a", "BIDSVersion": "1.8.0"}',
        "dataset.json": '{"channel_names": {"0": "FLAIR"}}',
        "splits.csv": "case,split\ncase01,train\n",
    }
    places: list[Path] = []
    for line in textwrap.dedent(tree).splitlines():
        name = line.split()[0]
        level = (len(line) - len(line.lstrip())) // 2
        places[level:] = [(places[level - 1] if level else folder) / name]
        if not name.endswith(("/", "...")):
            places[-1].parent.mkdir(parents=True, exist_ok=True)
            places[-1].write_text(contents.get(name, ""))
    return places[0]


def test_the_method_shown_to_contributors_trains_and_detects(
    cohort: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DOCS / "contributing.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.+?)```", text, re.DOTALL)
    assert code
    (tmp_path / "my_mean.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "PLACES", dict(registry.PLACES))
    registry.register("mean", "my_mean:Mean")
    training = {"steps": 2, "batch_size": 4, "validate_every": 1, "precision": "32-true"}
    model = anomri.train(
        cohort, tmp_path / "model", method="mean", training=training, cache=cache, device="cpu"
    )
    detection = model.detect(anomri.find_cases(cohort)[-1])
    assert detection.anomaly_map.max() > 0


def test_contributing_names_every_room_of_the_house() -> None:
    text = (DOCS / "contributing.md").read_text(encoding="utf-8")
    house = ROOT / "src" / "anomri"
    rooms = [path.parent.name for path in house.glob("*/__init__.py")]
    modules = [path.name for path in house.glob("*.py") if not path.name.startswith("_")]
    assert [name for name in (*rooms, *modules) if f"`{name}`" not in text] == []
