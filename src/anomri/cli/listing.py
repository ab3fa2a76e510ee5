"""The command `list`: what is understood of a folder of scans, and what is left out and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.table import Table

from anomri.cli.options import MORE, command, err, flag, out
from anomri.errors import AnomriError
from anomri.scans.names import IMAGES

if TYPE_CHECKING:
    from anomri.scans.cohort import Cohort

SHOWN = 5
"""Files and notes of one kind that are named without ``--all``."""


@command(MORE, "anomri list SCANS", "anomri list SCANS -o cohort.tsv", name="list")
def list_cohort(
    cohort: Annotated[
        Path,
        typer.Argument(
            metavar="COHORT", help="Folder of scans (also DICOM or BIDS), a scan, or a .tsv."
        ),
    ],
    output: Annotated[
        Optional[Path],
        typer.Option(
            "-o",
            "--output",
            metavar="TSV",
            help="Also write the cases to this table, to edit and to use as a cohort: -i TSV.",
        ),
    ] = None,
    every_file: Annotated[bool, flag("--all", "Name all files that are left out.")] = False,
) -> None:
    """Show which scans are found in a folder, and which files are left out.

    Nothing is opened or changed. In a pipe, the table is printed as -o writes
    it, and all else goes to standard error.
    """
    from anomri.scans.cohort import case_table, split_for_table, write_cases
    from anomri.scans.find import read_cohort
    from anomri.scans.intake import holds_dicom

    if cohort.is_dir() and holds_dicom(cohort):
        _list_dicom(cohort, output)
        return
    found = read_cohort(cohort)
    in_table, not_in_table = split_for_table(found.cases)
    if output and not in_table:
        raise AnomriError(f"{_text(output)}: cannot list any case. {not_in_table[0]}")
    if output:
        write_cases(output, in_table)
    patients = len({case.patient for case in found.cases})
    summary = out if out.is_terminal else err
    summary.print(
        f"{_text(cohort)}: {found.layout}; cases: {len(found.cases)}, patients: {patients}",
        soft_wrap=True,
    )
    if out.is_terminal:
        out.print(cohort_table(found, cohort))
    elif not out.quiet:
        out.file.write(case_table(in_table))
    print_notes(summary, found, cohort, None if every_file else SHOWN)
    if output or not out.is_terminal:
        _print_some(summary, "Not in the table", not_in_table, None)
    if output:
        summary.print(f"wrote {_text(output)}; use it with -i {_text(output)}", soft_wrap=True)


def cohort_table(cohort: Cohort, folder: Path) -> Table:
    """A row for each case: its patient, files, and split; paths are relative to ``folder``."""
    cells: dict[str, list[str]] = {
        "case": [_text(case.name) for case in cohort.cases],
        "patient": [_text(case.patient) for case in cohort.cases],
    }
    for channel in cohort.channels:
        files = [case.channels.get(channel) for case in cohort.cases]
        cells[channel] = [_relative(path, folder) for path in files]
    cells["label"] = [_relative(case.label, folder) for case in cohort.cases]
    cells["mask"] = [_relative(case.mask, folder) for case in cohort.cases]
    cells["split"] = [case.split or "" for case in cohort.cases]
    table = Table(box=None, pad_edge=False, header_style="bold")
    shown = {name: column for name, column in cells.items() if any(column)}
    for name in shown:
        table.add_column(_text(name), overflow="fold")
    for row in zip(*shown.values(), strict=True):
        # Table cells are read as markup unless they are escaped: a file may be called [a].nii.
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def print_notes(console: Console, cohort: Cohort, folder: Path, limit: int | None) -> None:
    """What was chosen, which channels are unknown, and what was left out, by its reason."""
    notes = [note for case in cohort.cases for note in case.notes]
    _print_some(console, "Notes", [_text(note) for note in notes], limit)
    if cohort.unknown_channels:
        names = ", ".join(_text(name) or "(no name)" for name in cohort.unknown_channels)
        console.print(
            f"Channels that are not known by name: {names}. They are read under these names; known"
            f" are {', '.join(IMAGES)}.",
            soft_wrap=True,
        )
    reasons: dict[str, list[str]] = {}
    for path, reason in cohort.left_out:
        reasons.setdefault(reason, []).append(_relative(path, folder))
    for reason, paths in reasons.items():
        _print_some(console, f"Left out, {reason}", paths, limit)
    if not reasons:
        console.print("Left out: nothing")


def _print_some(console: Console, title: str, lines: Sequence[str], limit: int | None) -> None:
    if not lines:
        return
    console.print(f"{title} ({len(lines)}):", soft_wrap=True)
    for line in lines[:limit]:
        console.print(f"  {line}", soft_wrap=True)
    if limit and len(lines) > limit:
        console.print(f"  and {len(lines) - limit} more; --all names them", soft_wrap=True)


def _list_dicom(folder: Path, output: Path | None) -> None:
    from anomri.scans.dicom.find import choose_series

    if output:
        raise AnomriError(
            f"{folder}: holds DICOM files, which a table cannot list; use the folder with -i."
        )
    left_out: list[str] = []
    keep: Callable[[str], None] = left_out.append
    chosen = choose_series(folder, None, keep)
    out.print(f"{_text(folder)}: a DICOM study; one case", soft_wrap=True)
    for channel, series in chosen.items():
        out.print(f"  {channel}: {series}", soft_wrap=True)
    _print_some(out, "Left out, and what was guessed", [_text(one) for one in left_out], None)


def _relative(path: Path | None, folder: Path) -> str:
    if path is None:
        return ""
    return _text(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _text(name: str | Path) -> str:
    """A name for a terminal: bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode(errors="replace")
