"""Options of `detect` that say which files a scan is and what is done to it before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Scans = Annotated[
    Optional[Path],
    typer.Option(
        "-i",
        "--input",
        metavar="SCAN|FOLDER|TSV",
        help="One scan, a folder (also DICOM), or a .tsv.",
    ),
]
Channel = Annotated[
    Optional[Path], typer.Option(metavar="FILE", help="This channel of one scan, instead of -i.")
]
Channels = Annotated[
    Optional[list[str]],
    typer.Option(
        "--channel", metavar="NAME=FILE", help="A channel of another name; may be repeated."
    ),
]
Series = Annotated[
    Optional[list[str]],
    typer.Option(
        "--series",
        metavar="CHANNEL=DESCRIPTION",
        help="DICOM: which series is which channel; repeated.",
    ),
]
KeepIdentifiers = Annotated[
    bool,
    typer.Option(
        "--keep-identifiers", help="DICOM: name the case by its PatientID, not by a hash."
    ),
]
DicomSeg = Annotated[
    bool, typer.Option("--dicom-seg", help="DICOM: also write the mask as DICOM SEG.")
]
BrainMask = Annotated[
    Optional[Path],
    typer.Option(
        metavar="FILE", help="Voxels above zero are brain (one scan); default: voxels above zero."
    ),
]
SkullStrip = Annotated[
    bool,
    typer.Option(
        "--skull-strip",
        help="Take the skull off: mri_synthstrip or hd-bet if installed, else deepbet.",
    ),
]
BiasCorrection = Annotated[
    bool, typer.Option("--bias-correction", help="Correct the coil's shading (N4).")
]
Register = Annotated[
    bool,
    typer.Option(
        "--register", help="Turn the scan into the model's space (rigid), and its map back."
    ),
]
