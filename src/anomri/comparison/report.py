"""The report of a comparison, written anew after each job: tables, pictures and one page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anomri.comparison import pictures
from anomri.comparison.jobs import Job
from anomri.comparison.tables import (
    COLUMNS,
    COST_COLUMNS,
    LONG_COLUMNS,
    Done,
    Row,
    cost_rows,
    long_rows,
    markdown,
    read_done,
    result_rows,
)
from anomri.files import whole_file, write_text
from anomri.reporting.pages import Page, Table, write_page
from anomri.reporting.previews import Picture
from anomri.runs.tables import write_tsv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOW = (
    "Mean ± standard deviation over seeds; 95 % bootstrap intervals over test patients, their "
    "bounds averaged over seeds. ceil-Dice chooses its threshold on the test labels: an upper "
    "bound. + components: components of at most 20 voxels, if these were 1 mm high, are dropped at "
    "that threshold. Training time is that of the steps, without packing and interruptions. "
    "Seconds a scan are from slices to the filtered map, mean of the test scans. Peak memory is "
    "the largest resident size of the process that trained (since its last start) or evaluated, "
    "and did nothing else."
)
"""How the figures were measured."""


def write_comparison(
    folder: Path, jobs: Sequence[Job], protocol: Mapping[str, str], failed: Mapping[str, str]
) -> tuple[Path, list[Row]]:
    """Write the tables and pictures of the jobs that are done; returns the report and its rows.

    ``table.tsv`` has every value of every seed; ``table.md``, ``cost.tsv`` and ``report.html`` are
    for reading. ``noise_*.png`` and ``examples.png`` are written if there is something to show.
    """
    done = read_done(jobs)
    rows, costs = result_rows(done), cost_rows(done)
    cells = [row.cells() for row in rows]
    write_tsv(folder / "table.tsv", LONG_COLUMNS, long_rows(rows))
    write_text(folder / "table.md", markdown(COLUMNS, cells))
    write_tsv(folder / "cost.tsv", COST_COLUMNS, costs)
    count = f"{len(done)} of {len(jobs)}"
    facts = {**protocol, "jobs": f"{count} done", "measured": HOW}
    page = Page(
        title="Methods compared",
        lead=f"Preset {protocol['preset']}; test cases: {protocol['cases']}; {count} jobs done.",
        tables=[
            Table("Result", COLUMNS, cells),
            Table("Cost", COST_COLUMNS, costs),
            Table("Protocol", ("what", "how"), [*facts.items(), *_problems(done, failed)]),
        ],
        pictures=_write_pictures(folder, done),
    )
    return write_page(folder / "report.html", page), rows


def _problems(done: Done, failed: Mapping[str, str]) -> list[tuple[str, str]]:
    """The jobs that failed, and the cases that failed in a job that is done, with the reasons."""
    problems = [(f"failed: {name}", error) for name, error in failed.items()]
    for job, result in done:
        for case, error in result["failed"].items():
            problems.append((f"failed: {job.name}, {case}", error))
    return problems


def _write_pictures(folder: Path, done: Done) -> list[Picture]:
    shown = []
    for setting, label in pictures.LABELS.items():
        curve = pictures.noise_curve(setting, done)
        if curve is not None:
            shown.append(_save(curve, folder / f"{setting}.png", f"DAE: AUPRC and {label}"))
    examples = pictures.examples(done)
    if examples is not None:
        title = "Maps side by side; the middle of each method's colours is its ceil-Dice threshold"
        shown.append(_save(examples, folder / "examples.png", title))
    return shown


def _save(figure: Figure, path: Path, title: str) -> Picture:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    with whole_file(path) as partial:
        partial.write_bytes(image.getvalue())
    return Picture(title, base64.b64encode(image.getvalue()).decode(), format="png")
