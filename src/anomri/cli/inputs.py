"""Options that say which files make up a scan, and how it is prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from anomri.cli.options import DICOM, INPUT, PREPARATION, flag

Scans = Annotated[
    Optional[Path],
    typer.Option(
        "-i",
        "--input",
        metavar="SCANS",
        help="One scan, a folder of scans (NIfTI, BIDS or DICOM), or a .tsv that lists them.",
    ),
]
Channel = Annotated[
    Optional[Path],
    typer.Option(
        metavar="FILE", help="This channel of one scan, instead of -i.", rich_help_panel=INPUT
    ),
]
Channels = Annotated[
    Optional[list[str]],
    typer.Option(
        "--channel",
        metavar="NAME=FILE",
        help="Another channel of one scan; repeat it for more.",
        rich_help_panel=INPUT,
    ),
]
BrainMask = Annotated[
    Optional[Path],
    typer.Option(
        metavar="FILE",
        help="Brain mask of one scan (default: voxels above zero are brain).",
        rich_help_panel=INPUT,
    ),
]
Series = Annotated[
    Optional[list[str]],
    typer.Option(
        "--series",
        metavar="NAME=TEXT",
        help="Channel of a series, by its description: flair='Ax FLAIR'; repeat it for more.",
        rich_help_panel=DICOM,
    ),
]
KeepIdentifiers = Annotated[
    bool,
    flag("--keep-identifiers", "Name the case by its PatientID, not by a hash of it.", DICOM),
]
DicomSeg = Annotated[bool, flag("--dicom-seg", "Also write the mask as DICOM SEG.", DICOM)]
SkullStrip = Annotated[
    bool,
    flag(
        "--skull-strip",
        "Remove the skull, by mri_synthstrip or hd-bet if installed, else by deepbet.",
        PREPARATION,
    ),
]
BiasCorrection = Annotated[
    bool, flag("--bias-correction", "Correct uneven brightness of the coil (N4).", PREPARATION)
]
Register = Annotated[
    bool,
    flag(
        "--register",
        "Align channels, and the scan with the model's space; maps return to the scan's grid.",
        PREPARATION,
    ),
]
