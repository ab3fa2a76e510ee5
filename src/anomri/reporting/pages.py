"""Pages in HTML: pictures first, numbers after, in one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from anomri.files import write_text
from anomri.reporting.plots import Plot
from anomri.reporting.previews import Picture, Preview, read_preview

T = TypeVar("T")
MAX_PICTURES = 60
"""Cases with pictures on a page; those of the others lie in ``previews``."""
MAX_PICTURE_BYTES = 12_000_000
"""Of all pictures on a page (base64), so that it stays small enough to open."""


@dataclass(frozen=True)
class Table:
    """A titled table; columns whose every value reads as a number are set right-aligned.

    ``links`` leads from values of the first column to places on the page.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    descriptions: Sequence[str] = ()
    """Of the columns, shown when the mouse rests on their names."""

    @property
    def numeric(self) -> set[int]:
        """Numbers of the columns that hold numbers only."""
        return {
            k
            for k in range(len(self.columns))
            if self.rows and all(_is_number(row[k]) for row in self.rows)
        }


@dataclass(frozen=True)
class CaseView:
    """One case on the page: its place there, what is to be said of it, its pictures and its
    lesions."""

    place: str
    preview: Preview
    caption: str = ""
    details: Sequence[str] = ()
    lesions: Table | None = None


@dataclass(frozen=True)
class Page:
    """What a report shows, from the top down; ``facts`` are the few values that stand large, with
    their names."""

    title: str
    lead: str = ""
    note: str = ""
    errors: Sequence[tuple[str, str]] = ()
    facts: Sequence[tuple[str, str]] = ()
    summary: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    cases: Sequence[CaseView] = ()
    pictured: str = ""
    tables: Sequence[Table] = ()
    glossary: Sequence[tuple[str, str]] = ()
    footer: str = ""
    pictures: Sequence[Picture] = ()


def write_page(path: Path, page: Page) -> Path:
    """Write a page as self-contained HTML; everything that comes from files is escaped, one script
    may run."""
    from jinja2 import Environment, PackageLoader  # slow to import
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("anomri"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    script, style = (
        (files("anomri") / "templates" / f"report.{kind}").read_text("utf-8")
        for kind in ("js", "css")
    )
    text = environment.get_template("report.html.j2").render(
        page=page,
        version=version("anomri"),
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        svg=Markup,
    )
    write_text(path, text)
    return path


def case_views(folder: Path, cases: Mapping[str, T]) -> Iterator[tuple[str, Preview, T]]:
    """The place on the page, the preview and the facts of each case that is shown.

    These are the first ``cases`` that have a preview in ``folder``, as far as `MAX_PICTURES` and
    `MAX_PICTURE_BYTES` allow.
    """
    count = size = 0
    for name, facts in cases.items():
        preview = read_preview(folder, name)
        if preview is None:
            continue
        count += 1
        size += sum(len(picture.data) for picture in preview.pictures)
        if count > MAX_PICTURES or size > MAX_PICTURE_BYTES:
            return
        yield f"case-{count}", preview, facts


def pictured(shown: int, cases: int, order: str) -> str:
    """Which of the cases are shown, in words."""
    if shown == cases:
        return f"All {cases}, {order}." if cases > 1 else ""
    return f"{shown} of {cases}, {order}; pictures of the others are in the folder previews."


def _is_number(value: object) -> bool:
    try:
        float(str(value) or "0")
    except ValueError:
        return False
    return True
