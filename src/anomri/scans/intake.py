"""What a user hands in, found to be cases: NIfTI, one file per channel, or DICOM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anomri.errors import AnomriError
from anomri.files import output_folder
from anomri.scans.case import Case, case_from_files
from anomri.scans.dicom.channels import Series
from anomri.scans.dicom.find import choose_series
from anomri.scans.dicom.read import convert_series
from anomri.scans.names import OUTPUTS, SUFFIXES, channel_name, parse_name

CONVERTED = "nifti"
"""The folder in the output where converted scans are kept."""
LOOKED_AT = 2000
"""Files of a folder that are looked at, at most, to say whether it holds DICOM."""


@dataclass(frozen=True)
class Intake:
    """The cases of a run; for a DICOM folder also the series that each channel of its one case came from."""

    cases: list[Case]
    series: dict[str, Series] = field(default_factory=dict)


def named(pairs: Sequence[str], option: str) -> dict[str, str]:
    """``name=value`` options as a dictionary; raises `AnomriError` naming the one that is none, or given twice."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = channel_name(name)
        if not (name and equals and value.strip()):
            raise AnomriError(
                f"{option} {pair!r}: write it as name=value, such as {option} flair=..."
            )
        if name in found:
            raise AnomriError(f"{option}: {name} is given twice ({found[name]} and {value}).")
        found[name] = value.strip()
    return found


def holds_dicom(folder: Path, out: Path | None = None) -> bool:
    """Whether a folder holds DICOM files, by their content, and no NIfTI file but results in ``out``; at any depth."""
    dicom = False
    for number, path in enumerate(folder.rglob("*")):
        if path.name.lower().endswith(SUFFIXES):
            if out is None or not _is_result(path, out):
                return False
            continue
        if not dicom and number < LOOKED_AT and path.is_file() and not path.name.startswith("."):
            with path.open("rb") as file:
                dicom = file.read(132)[128:] == b"DICM"
    return dicom


def _is_result(path: Path, out: Path) -> bool:
    stem, kind = parse_name(path)
    map_of_it = out / f"{stem}_{OUTPUTS[0]}.nii.gz"
    place = path.parent.resolve()
    return place == (out / CONVERTED).resolve() or (
        place == out.resolve() and kind in OUTPUTS and map_of_it.is_file()
    )


def take_in(
    source: Path | None,
    files: Mapping[str, str | Path],
    out: Path,
    find_cases: Callable[[Path], list[Case]],
    *,
    series: Mapping[str, str] | None = None,
    keep_identifiers: bool = False,
    dicom_seg: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Intake:
    """The cases in ``source``, or the one case of ``files`` (channel -> file).

    A folder that holds DICOM and no NIfTI is converted to ``out/nifti``; ``series`` says which series is which channel
    and ``note`` is told what is left out. Raises `AnomriError` if both or none of the two are given, nothing fits, or what is for
    DICOM only (``series``, ``keep_identifiers``, ``dicom_seg``) is asked of other scans.
    """
    if (source is None) == (not files):
        raise AnomriError(
            "name the scan either with -i, or a file for each channel (--flair FILE --t1 FILE ...)."
        )
    if source is None:
        return _only_nifti(
            Intake([case_from_files(files)]), bool(series) or keep_identifiers or dicom_seg
        )
    if not source.is_dir() or not holds_dicom(source, out):
        return _only_nifti(
            Intake(find_cases(source)), bool(series) or keep_identifiers or dicom_seg
        )
    chosen = choose_series(source, series or None, note)
    case = convert_series(chosen, output_folder(out) / CONVERTED, keep_identifiers=keep_identifiers)
    for channel, one in chosen.items():
        note(f"{channel} is the series {one}")
    return Intake([case], chosen)


def _only_nifti(intake: Intake, dicom_options: bool) -> Intake:
    if dicom_options:
        raise AnomriError(
            "--series, --keep-identifiers and --dicom-seg are for a folder of DICOM files without a NIfTI file."
        )
    return intake
