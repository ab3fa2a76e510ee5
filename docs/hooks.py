"""What mkdocs runs: the command reference is written from the commands themselves, and no page fetches anything."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mkdocs.exceptions import PluginError

COMMANDS = "<!-- commands -->"
"""The line of a page that the command reference replaces."""
SCORES = "<!-- scores -->"
"""The line of a page that the table of scores replaces."""
INTERVAL = re.compile(r"\[(\d\.\d+) - (\d\.\d+)\]")
"""A confidence interval."""
ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["']?https?:|<link[^>]+rel=["']?"""
    r"""(?:stylesheet|preload|icon|preconnect)["']?[^>]*href=["']?https?:"""
)
"""What a browser would fetch from another machine."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write commands and scores where a page asks for them, and keep intervals on one line."""
    for line, write in ((COMMANDS, command_reference), (SCORES, score_table)):
        if line in markdown:
            markdown = markdown.replace(line, write())
    return INTERVAL.sub(r'<span class="interval">[\1 - \2]</span>', markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would fetch something from another machine: the site is read offline."""
    if found := ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri}: fetches from another machine: {found.group()!r}")
    return output


def command_reference() -> str:
    """Markdown for every command: what it does, how it is called, its arguments and options."""
    import typer.main

    from anomri.cli import app

    group: Any = typer.main.get_command(app)
    sections = [_section(name, command) for name, command in group.commands.items()]
    shared = [(_spelled(one, "N"), _about(one)) for one in _shown(group) if one.name != "help"]
    if shared:
        table = _table(("option", "what it does"), shared)
        sections.append(f"## Before the command's name\n\n`anomri [OPTIONS] COMMAND`\n\n{table}")
    return "\n\n".join(sections)


def score_table() -> str:
    """Markdown for the registered scores: what each is, and what a model needs for it."""
    from anomri.scoring import registry

    rows = []
    for name, score in registry.SCORES.items():
        needs = ["a segmentation head"] if score.needs_segmentation_head else []
        needs += ["healthy residuals measured in training"] if score.needs_healthy_slices else []
        rows.append((f"`{name}`", score.help, ", ".join(needs)))
    return _table(("score", "what it is", "needs"), rows)


def _shown(command: Any) -> list[Any]:
    return [one for one in command.params if not getattr(one, "hidden", False)]


def _section(name: str, command: Any) -> str:
    hints = get_type_hints(inspect.unwrap(command.callback))

    def metavar(parameter: Any) -> str:
        return _metavar(parameter, hints[parameter.name])

    parameters = _shown(command)
    arguments = [one for one in parameters if one.param_type_name == "argument"]
    options = [one for one in parameters if one.param_type_name == "option" and one.name != "help"]
    required = [one for one in options if one.required]
    usage = ["anomri", name, *(metavar(one) for one in arguments)]
    usage += [f"{one.opts[0]} {metavar(one)}" for one in required]
    usage += ["[OPTIONS]"] if len(options) > len(required) else []
    text = inspect.cleandoc(command.help or "").replace("\f", "")
    lines = [f"## anomri {name}", text, "```sh\n" + " ".join(usage) + "\n```"]
    if examples := [one for one in (command.epilog or "").split("\n\n") if "anomri" in one]:
        lines.append("```sh\n" + "\n".join(examples) + "\n```")
    if arguments:
        rows = [(f"`{metavar(one)}`", _about(one)) for one in arguments]
        lines.append(_table(("argument", "what it is"), rows))
    if options:
        rows = [(_spelled(one, metavar(one)), _about(one)) for one in options]
        lines.append(_table(("option", "what it does"), rows))
    return "\n\n".join(lines)


def _spelled(option: Any, metavar: str) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return names if option.is_flag else f"{names} `{metavar}`"


def _metavar(parameter: Any, hint: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    kinds = {int: "N", float: "X", Path: "PATH"}
    return next((kinds[kind] for kind in (hint, *get_args(hint)) if kind in kinds), "TEXT")


def _about(parameter: Any) -> str:
    about = (parameter.help or "").strip()
    default = parameter.default
    shown = not (default is None or callable(default) or isinstance(default, bool))
    if shown and default not in ((), "") and "default" not in about and not parameter.required:
        about += f" Default: `{default}`."
    return about + (" **Required.**" if parameter.required else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
