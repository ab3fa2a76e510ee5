"""The pictures of a case that a report shows: drawn once while the scan is in memory, kept in ``previews``."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anomri.files import output_folder, write_text
from anomri.reporting.plots import Histogram, histogram
from anomri.scans.case import shown_channel

if TYPE_CHECKING:
    from anomri.model.detection import Detection

BINS = 64
TITLES = {
    "planes": "Three planes through the peak",
    "findings": "The largest findings, numbered by size, axial, 80 mm wide",
    "row": "Slice with the most {most}",
    "slices": "Axial slices from below, heights in mm",
}


@dataclass(frozen=True)
class Picture:
    """An image (base64) with its title, the names of the columns it shows side by side, and its size in pixels."""

    title: str
    data: str
    columns: tuple[str, ...] = ()
    size: tuple[int, int] = (960, 200)
    format: str = "jpeg"


@dataclass(frozen=True)
class Preview:
    """What a report shows of one case."""

    name: str
    pictures: tuple[Picture, ...] = ()
    histogram: Histogram | None = None
    has_truth: bool = False
    channel: str = ""


def save_preview(detection: Detection, folder: Path) -> None:
    """Write a case's pictures and the histogram of its scores to ``previews/<case>.*``, where `report` looks for them."""
    from anomri.reporting.pictures import (
        closeups,
        columns_of,
        lightbox,
        planes,
        preview,
        score_counts,
        write_jpeg,
    )

    place = output_folder(folder / "previews")
    sizes = {}
    for kind, draw in (
        ("planes", planes),
        ("findings", closeups),
        ("row", preview),
        ("slices", lightbox),
    ):
        picture = draw(detection)
        if picture is not None:
            write_jpeg(place / f"{detection.name}.{kind}.jpg", picture)
            sizes[kind] = picture.shape[1::-1]
    thresholds = detection.spec.thresholds
    healthy = thresholds.healthy if thresholds else None
    counts, top = score_counts(detection, BINS)
    facts = {
        "columns": columns_of(detection),
        "channel": detection.volume.channels[
            shown_channel(detection.volume.channels, detection.volume.missing)
        ],
        "truth": detection.volume.label is not None and bool(detection.volume.label.any()),
        "sizes": sizes,
        "scores": counts,
        "scores_top": top,
        "healthy": healthy.histogram if healthy else [],
        "healthy_top": healthy.histogram_top if healthy else 0.0,
        "threshold": detection.threshold,
    }
    write_text(place / f"{detection.name}.preview.json", json.dumps(facts) + "\n")


def remove_preview(folder: Path, name: str) -> None:
    """Remove what `save_preview` left of a case in ``folder``."""
    for kind in ("preview.json", *(f"{kind}.jpg" for kind in TITLES)):
        (folder / "previews" / f"{name}.{kind}").unlink(missing_ok=True)


def read_preview(folder: Path, name: str) -> Preview | None:
    """What `save_preview` left of a case in ``folder``; ``None`` if there is nothing, or nothing of use."""
    place = folder / "previews"
    try:
        facts = json.loads((place / f"{name}.preview.json").read_text(encoding="utf-8"))
        most = "lesion" if facts["truth"] else "anomaly"
        pictures = tuple(
            Picture(
                title.format(most=most),
                base64.b64encode((place / f"{name}.{kind}.jpg").read_bytes()).decode(),
                tuple(facts["columns"]) if kind == "row" else (),
                (int(facts["sizes"][kind][0]), int(facts["sizes"][kind][1])),
            )
            for kind, title in TITLES.items()
            if kind in facts["sizes"]
        )
        tops = (float(facts["scores_top"]), float(facts["healthy_top"]))
        bars = histogram(facts["scores"], facts["healthy"], tops, facts["threshold"])
        return Preview(name, pictures, bars, bool(facts["truth"]), str(facts["channel"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
