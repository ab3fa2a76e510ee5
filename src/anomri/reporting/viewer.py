"""`anomri view`: a page on this machine for scrolling through scans, anomaly maps and masks with
NiiVue."""

from __future__ import annotations

import json
import math
import threading
import time
import webbrowser
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.files import read_json
from anomri.model.lesions import healthy_scans, lesion_columns, page_row, read_lesion
from anomri.reporting.server import Image, Page, Table, Viewer
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.intake import CONVERTED, holds_dicom
from anomri.scans.names import SUFFIXES, bare_name

MAP_ENDING = "_anomaly.nii.gz"


def serve(
    folder: str | Path,
    *,
    port: int = 0,
    scans: str | Path | Sequence[Case] | None = None,
    open_browser: bool = True,
) -> Viewer:
    """Serve the results in ``folder`` on 127.0.0.1 until the returned `Viewer` is closed.

    ``folder`` is what `detect_cohort` wrote. ``scans`` are shown behind the maps; by default those
    that the run noted in ``logs``, or converted from DICOM. Port 0 takes a free one. What is served
    is listed once, now. Links in ``folder`` that lead out of it are left out; those among
    ``scans``, which the user named, are followed. Every user of this machine can open the page.

    Raises `AnomriError` if ``folder`` holds no maps, ``scans`` none of their cases, or the port is
    taken.
    """
    folder = Path(folder)
    cases = find_scans(folder) if scans is None else named_scans(folder, scans)
    viewer = Viewer(_table(folder, cases), port)
    if open_browser:
        _open_browser(viewer.url)
    return viewer


def view(
    folder: str | Path,
    *,
    port: int = 0,
    scans: str | Path | Sequence[Case] | None = None,
    open_browser: bool = True,
    announce: Callable[[str], None] = print,
) -> None:
    """As `serve`, and stay until Ctrl-C; ``announce`` is called with the page's address before a
    browser opens."""
    with serve(folder, port=port, scans=scans, open_browser=False) as viewer:
        announce(viewer.url)
        if open_browser:
            _open_browser(viewer.url)
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            return


def find_scans(folder: Path) -> dict[str, Case]:
    """The scans that the results in ``folder`` were made from, by case, as far as they are still
    there."""
    maps = [path.name.removesuffix(MAP_ENDING) for path in folder.glob(f"*{MAP_ENDING}")]
    found: dict[str, Case] = {}
    with suppress(AnomriError):  # a folder of that name may hold anything
        found = {case.name: case for case in find_cases(folder / CONVERTED)}
    for name in maps:
        with suppress(AnomriError):  # no record, or a damaged one
            scans = read_json(folder / "logs" / f"{name}.json").get("scans")
            if isinstance(scans, dict):
                channels = {str(name): folder.resolve() / str(path) for name, path in scans.items()}
                found[name] = Case(name, channels)
    return {name: found[name] for name in maps if name in found}


def named_scans(folder: Path, scans: str | Path | Sequence[Case]) -> dict[str, Case]:
    """The cases among ``scans``, which the user named, by their names in the results in
    ``folder``."""
    if not isinstance(scans, str | Path):
        return {case.name: case for case in scans}
    path = Path(scans)
    converted = folder / CONVERTED
    if converted.is_dir() and path.is_dir() and holds_dicom(path, folder):
        path = converted
    cases = find_cases(path)
    is_file = path.name.lower().endswith(SUFFIXES)
    if is_file and (folder / f"{bare_name(path)}{MAP_ENDING}").is_file():
        # `detect` called the case by all of the file's name.
        return {bare_name(path): cases[0]}
    return {case.name: case for case in cases}


def _open_browser(url: str) -> None:
    # In a thread: a browser in the terminal does not come back before it is left.
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def _table(folder: Path, scans: dict[str, Case]) -> Table:
    """Everything there is to serve, by request path."""
    root = folder.resolve()
    maps = [path for path in sorted(root.glob(f"[!.]*{MAP_ENDING}")) if Image(path, root).resolve()]
    if not maps:
        raise AnomriError(
            f"{folder}: holds no <case>{MAP_ENDING}; name the folder that `anomri detect` wrote."
        )
    names = [path.name.removesuffix(MAP_ENDING) for path in maps]
    if scans and not set(names) & set(scans):
        raise AnomriError(
            f"none of the scans is of a case in {folder} (scans: {_some(scans)}; cases: {_some(names)}); "
            f"name the scans that the maps were made from."
        )
    with_run: Mapping[str, Any] = {}
    with suppress(AnomriError):
        with_run = read_json(root / "run.json")
    compared_with = healthy_scans(with_run)
    table: Table = {}
    cases = [
        _list_case(table, number, root, name, scans.get(name), compared_with)
        for number, name in enumerate(names)
    ]
    cases.sort(key=lambda case: (-(case["volume_mm3"] or 0), case["name"]))
    columns = [
        {"heading": one.heading, "description": one.description}
        for one in lesion_columns().values()
    ]
    facts = {"folder": root.name, "columns": columns, "cases": cases}
    listing = json.dumps(facts, allow_nan=False)
    static = files("anomri") / "static" / "niivue"
    script = "text/javascript; charset=utf-8"
    return {
        **table,
        "/": Page(_page(root.name).encode(errors="replace"), "text/html; charset=utf-8"),
        "/niivue.js": Page((static / "niivue.umd.js").read_bytes(), script),
        "/view.js": Page((static / "view.js").read_bytes(), script),
        "/view.css": Page((static / "view.css").read_bytes(), "text/css; charset=utf-8"),
        "/cases.json": Page(listing.encode(), "application/json"),
    }


def _list_case(
    table: Table, number: int, root: Path, name: str, scan: Case | None, compared_with: int | None
) -> dict[str, Any]:
    """Add the images of one case to ``table``; returns its entry in the listing."""

    def offer(image: Image, kind: str) -> str | None:
        if image.resolve() is None:
            return None
        # NiiVue tells the format by the ending; the rest of the name says nothing of the patient.
        ending = ".nii.gz" if image.path.name.lower().endswith(".gz") else ".nii"
        url = f"/volumes/{number}/{kind}{ending}"
        table[url] = image
        return url

    summary = _summary(root / f"{name}.json", root, compared_with)
    anomaly = offer(Image(root / f"{name}{MAP_ENDING}", root), "anomaly")
    mask = offer(Image(root / f"{name}_mask.nii.gz", root), "mask")
    reconstruction = offer(Image(root / f"{name}_reconstruction.nii.gz", root), "reconstruction")
    backgrounds: list[dict[str, object]] = []
    for channel, path in (scan.channels if scan else {}).items():
        url = offer(Image(path), f"scan-{len(backgrounds)}")
        if url:
            backgrounds.append({"label": channel, "url": url, "frame": 0})
    if reconstruction:
        for frame, channel in enumerate(summary["channels"] or [""]):
            label = f"reconstruction {channel}".strip()
            backgrounds.append({"label": label, "url": reconstruction, "frame": frame})
    backgrounds.append({"label": "anomaly map", "url": anomaly, "frame": 0})
    # Lesions show best on FLAIR.
    backgrounds.sort(key=lambda background: background["label"] != "flair")
    return {"name": name, **summary, "anomaly": anomaly, "mask": mask, "backgrounds": backgrounds}


def _summary(path: Path, root: Path, compared_with: int | None) -> dict[str, Any]:
    """What the page shows of ``<case>.json``; ``None`` for what is missing or damaged."""
    facts: dict[str, Any] = {}
    with suppress(AnomriError, OSError, RuntimeError):
        if path.resolve(strict=True).is_relative_to(root):
            facts = read_json(path)
    lesions, channels = facts.get("lesions"), facts.get("channels")
    return {
        "threshold": _number(facts.get("threshold")),
        "volume_mm3": _number(facts.get("lesion_volume_mm3")),
        "channels": [str(channel) for channel in channels] if isinstance(channels, list) else [],
        "lesions": _lesions(lesions, compared_with) if isinstance(lesions, list) else None,
    }


def _lesions(lesions: Iterable[object], compared_with: int | None) -> list[dict[str, Any]]:
    """The cells of the table of lesions, line by line, and where each lesion is."""
    listed = []
    for facts in lesions:
        if isinstance(facts, dict):
            lesion = read_lesion(facts)
            place = lesion.centroid_mm
            listed.append(
                {
                    "cells": page_row(lesion, compared_with),
                    "centroid_mm": None if math.isnan(place[0]) else place,
                }
            )
    return listed


def _number(value: object) -> float | None:
    if not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _some(names: Sequence[str] | dict[str, Case], most: int = 3) -> str:
    return ", ".join(list(names)[:most]) + (", ..." if len(names) > most else "")


def _page(title: str) -> str:
    from jinja2 import Environment, PackageLoader  # slow to import

    environment = Environment(
        loader=PackageLoader("anomri"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("view.html.j2").render(title=title, version=version("anomri"))
