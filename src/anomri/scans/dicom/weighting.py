"""Which weighting an MR image has by its echo, repetition and inversion times."""

from __future__ import annotations

import re
from collections.abc import Sequence

from anomri.scans.dicom.files import Header, read_number

SPIN_ECHO, GRADIENT_ECHO, UNKNOWN = "spin echo", "gradient echo", ""
OTHER_IMAGE_TYPES = {
    *("DIFFUSION", "ADC", "TRACE", "TRACEW", "EADC", "FA", "TENSOR", "DWI"),
    *("PERFUSION", "ASL", "RCBV", "RCBF", "CBF", "CBV", "MTT", "TTP", "TMAX", "FMRI"),
    *("TOF", "ANGIO", "MIP", "MNIP", "MINIP", "PROJECTION", "SWI", "VELOCITY", "PCA"),
    *("PHASE", "P", "R", "I", "REAL", "IMAGINARY", "MAP", "T1MAP", "T2MAP", "FIELD_MAP", "B0"),
    *("LOCALIZER", "SUBTRACTION", "SUB"),
}
"""Words of ImageType for images that have another contrast than their times say."""
OTHER_SEQUENCES = re.compile(r"ep[_2\d]|epi|tof|swi|ci3d|diff|perf|asl|fieldmap", re.IGNORECASE)
"""Parts of SequenceName that say the same."""
HEAD = {"HEAD", "BRAIN", "SKULL"}
"""Body parts whose series may be scans of a brain."""


def weighting(
    echo: float | None, repetition: float | None, inversion: float | None, sequence: str = SPIN_ECHO
) -> str | None:
    """``flair``, ``t1`` or ``t2`` by the times in ms; ``None`` if they are of none, or not known.

    A long repetition lets all tissue recover (no T1 weighting), and a long echo lets T2 act. An
    inversion about 2 s before removes fluid: FLAIR. One about 1 s before gives the T1 weighting of
    MPRAGE, also with a long repetition. The inversion times are those of 1.5 and 3 T; GE counts
    that of its prepared gradient echoes from 400 ms. Gradient echoes without inversion may be
    angiography, SWI, T2* or T1, by their flip angle and spoiling: they are not guessed.

    >>> weighting(100, 9000, 2500), weighting(390, 5000, 1650)  # FLAIR in 2D and 3D
    ('flair', 'flair')
    >>> weighting(100, 5000, None), weighting(12, 550, 0)
    ('t2', 't1')
    >>> weighting(2.9, 2300, 900, GRADIENT_ECHO), weighting(3.2, 8, 450, GRADIENT_ECHO)
    ('t1', 't1')
    >>> weighting(15, 3000, None) is None  # proton density
    True
    >>> weighting(60, 4500, 160) is None  # STIR
    True
    >>> weighting(3.7, 22, None, GRADIENT_ECHO) is None  # time of flight, perhaps
    True
    """
    if echo is None or repetition is None or echo <= 0:
        return None
    if inversion:
        shortest = 400 if sequence == GRADIENT_ECHO else 700
        if shortest <= inversion <= 1200 and echo <= 30 and repetition <= 3500:
            return "t1"
        is_flair = 1600 <= inversion <= 2800 and echo > 60 and repetition >= 4000
        return "flair" if is_flair and sequence != GRADIENT_ECHO else None
    if sequence != GRADIENT_ECHO and 60 < echo <= 600 and repetition >= 2000:
        return "t2"
    if sequence == SPIN_ECHO and echo <= 30 and 200 <= repetition <= 1000:
        return "t1"
    return None


def other_contrast(headers: Sequence[Header]) -> str:
    """Why the times of a series do not say its weighting, in words; empty if they do.

    ``headers`` are those of all its files.

    >>> other_contrast([{"EchoTime": "15"}, {"EchoTime": "90"}])
    'it has several values of EchoTime'
    """
    first = headers[0]
    sequence = first.get("ScanningSequence", "").split()
    if "EP" in sequence:
        return "it is echo planar, as diffusion and perfusion are"
    if "IR" in sequence and not read_number(first, "InversionTime"):
        return "it has an inversion, but no inversion time"
    types = OTHER_IMAGE_TYPES & set(re.split(r"[\s_]+", first.get("ImageType", "").upper()))
    if types:
        return f"its ImageType names {', '.join(sorted(types))}"
    if first.get("AngioFlag") == "Y":
        return "it is an angiography (AngioFlag)"
    if any(header.get("DiffusionBValue") for header in headers):
        return "it is diffusion-weighted (DiffusionBValue)"
    if OTHER_SEQUENCES.search(first.get("SequenceName", "")):
        return "its SequenceName is that of another kind of image"
    body_part = first.get("BodyPartExamined", "").upper()
    if body_part and not any(part in body_part for part in HEAD):
        return "its BodyPartExamined is not the head"
    if (read_number(first, "NumberOfTemporalPositions") or 1) > 1:
        return "it is a time series"
    for keyword in ("EchoTime", "RepetitionTime", "InversionTime"):
        if _differ([read_number(header, keyword) for header in headers]):
            return f"it has several values of {keyword}"
    if len({_orientation(header) for header in headers}) > 1:
        return "its slices have several orientations"
    return ""


def _differ(values: Sequence[float | None]) -> bool:
    """Whether numbers differ by more than a tenth, or some are missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return bool(known)
    return max(known) > 1.1 * min(known)


def _orientation(header: Header) -> tuple[float, ...]:
    """The directions of rows and columns, coarsely; empty if they cannot be read."""
    try:
        return tuple(round(float(one)) for one in header["ImageOrientationPatient"].split())
    except (KeyError, ValueError, OverflowError):
        return ()
