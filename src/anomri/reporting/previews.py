"""The pictures of a case that a report shows: drawn once while the scan is in memory, kept in
``previews``."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomri.errors import AnomriError
from anomri.files import output_folder, read_json, write_text
from anomri.reporting.plots import Histogram, histogram
from anomri.scans.case import shown_channel

if TYPE_CHECKING:
    from anomri.model.detection import Detection

BINS = 64
TITLES = {
    "planes": "Three planes through the highest score",
    "findings": "The largest findings, axial, {closeup:.0f} mm wide",
    "slices": "Axial slices from below, with their heights in mm",
    "row": "The slice with the most {most}",
}
"""The pictures of a case in the order in which they are shown, and what a page calls them."""


@dataclass(frozen=True)
class Picture:
    """An image (base64) with its title, the names of the columns it shows side by side, and its
    size in pixels."""

    title: str
    data: str
    columns: tuple[str, ...] = ()
    size: tuple[int, int] = (960, 200)
    format: str = "jpeg"
    kind: str = ""
    """One of `TITLES`, or empty."""


@dataclass(frozen=True)
class Preview:
    """What a report shows of one case; ``colours`` are the lowest and the highest score that have a
    colour."""

    name: str
    pictures: tuple[Picture, ...] = ()
    histogram: Histogram | None = None
    has_truth: bool = False
    channel: str = ""
    colours: tuple[float, float] = (0.0, 1.0)


def save_preview(detection: Detection, folder: Path) -> None:
    """Write a case's pictures and the histogram of its scores to ``previews/<case>.*``, for
    `read_preview`.

    What the network alone can show is taken from the earlier preview if the map was a stored one.
    """
    from anomri.reporting import pictures

    place = output_folder(folder / "previews")
    facts_path = place / f"{detection.name}.preview.json"
    row_path = place / f"{detection.name}.row.jpg"
    z = pictures.telling_slice(detection)
    counts, top = pictures.score_counts(detection, BINS)
    panel = None
    if detection.reconstructed is None:
        # A stored map holds neither the reconstruction nor the scores of the working grid.
        with suppress(AnomriError, KeyError):
            before = read_json(facts_path)
            z, counts, top = before["slice"], before["scores"], before["scores_top"]
            panel = pictures.read_reconstruction_panel(row_path)
    drawn = {
        "planes": pictures.planes(detection),
        "findings": pictures.closeups(detection),
        "slices": pictures.lightbox(detection),
        "row": pictures.preview(detection, z, panel),
    }
    sizes = {}
    for kind, picture in drawn.items():
        if picture is not None:
            pictures.write_jpeg(place / f"{detection.name}.{kind}.jpg", picture)
            sizes[kind] = picture.shape[1::-1]
    thresholds = detection.spec.thresholds
    healthy = thresholds.healthy if thresholds else None
    volume = detection.volume
    facts = {
        "columns": pictures.panel_names(detection),
        "channel": volume.channels[shown_channel(volume.channels, volume.missing)],
        "truth": volume.label is not None and bool(volume.label.any()),
        "sizes": sizes,
        "slice": z,
        "closeup_mm": pictures.CLOSEUP_MM,
        "colours": pictures.colour_range(detection),
        "scores": counts,
        "scores_top": top,
        "healthy": healthy.histogram if healthy else [],
        "healthy_top": healthy.histogram_top if healthy else 0.0,
        "threshold": detection.threshold,
    }
    write_text(facts_path, json.dumps(facts) + "\n")


def remove_preview(folder: Path, name: str) -> None:
    """Remove what `save_preview` left of a case in ``folder``."""
    for kind in ("preview.json", *(f"{kind}.jpg" for kind in TITLES)):
        (folder / "previews" / f"{name}.{kind}").unlink(missing_ok=True)


def read_preview(folder: Path, name: str) -> Preview | None:
    """What `save_preview` left of a case in ``folder``; ``None`` if there is nothing, or it is
    damaged."""
    place = folder / "previews"
    try:
        facts = json.loads((place / f"{name}.preview.json").read_text(encoding="utf-8"))
        pictures = tuple(
            _read_picture(place / f"{name}.{kind}.jpg", kind, facts)
            for kind in TITLES
            if kind in facts["sizes"]
        )
        tops = (float(facts["scores_top"]), float(facts["healthy_top"]))
        bars = histogram(facts["scores"], facts["healthy"], tops, facts["threshold"])
        low, high = facts["colours"]
        colours = (float(low), float(high))
        return Preview(name, pictures, bars, bool(facts["truth"]), str(facts["channel"]), colours)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_picture(path: Path, kind: str, facts: Mapping[str, Any]) -> Picture:
    width, height = facts["sizes"][kind]
    most = "lesion" if facts["truth"] else "anomaly"
    title = TITLES[kind].format(most=most, closeup=facts["closeup_mm"])
    columns = tuple(facts["columns"]) if kind == "row" else ()
    data = base64.b64encode(path.read_bytes()).decode()
    return Picture(title, data, columns, (int(width), int(height)), kind=kind)
