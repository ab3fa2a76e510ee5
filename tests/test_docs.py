"""The documentation holds: its examples run, its messages and commands exist, and its links lead somewhere."""

from __future__ import annotations

import ast
import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OUTSIDE_THE_SITE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
CARD = "src/anomri/pretrained/brats18/MODEL_CARD.md"


def test_the_examples_in_python_run_as_written(
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


def test_every_message_in_troubleshooting_is_one_of_the_source() -> None:
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
