"""What a user hands in, as cases: NIfTI, a file for each channel, or a folder of DICOM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anomri.errors import AnomriError
from anomri.files import output_folder
from anomri.scans.case import Case, case_from_files
from anomri.scans.dicom.channels import Series
from anomri.scans.dicom.signature import is_dicom
from anomri.scans.names import OUTPUTS, SUFFIXES, channel_name, parse_name
from anomri.scans.places import walk_once

CONVERTED = "nifti"
"""The folder in the output for converted scans."""
LOOKED_AT = 2000
"""How many files of a folder are looked at, at most, to find out whether it holds DICOM."""


@dataclass(frozen=True)
class Intake:
    """The cases of a run; for a DICOM folder also the series of each channel of its one case."""

    cases: list[Case]
    series: dict[str, Series] = field(default_factory=dict)


def parse_pairs(pairs: Sequence[str], option: str) -> dict[str, str]:
    """The values of ``name=value`` options by channel name.

    Raises `AnomriError` naming one that is not written so, or a name that is given twice.

    >>> parse_pairs(["T1w=scan.nii"], "--channel")
    {'t1': 'scan.nii'}
    """
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
    """Whether a folder holds DICOM files and, apart from results in ``out``, no NIfTI file.

    DICOM files are known by their content. All folders below are searched, too.
    """
    found = False
    files = (place / name for place, names in walk_once(folder) for name in names)
    for number, path in enumerate(files):
        if path.name.lower().endswith(SUFFIXES):
            if out is None or not _is_result(path, out):
                return False
        elif not found and number < LOOKED_AT:
            found = is_dicom(path)
    return found


def _is_result(path: Path, out: Path) -> bool:
    folder = path.parent.resolve()
    if folder == (out / CONVERTED).resolve():
        return True
    stem, kind = parse_name(path)
    has_map = (out / f"{stem}_{OUTPUTS[0]}.nii.gz").is_file()
    return folder == out.resolve() and kind in OUTPUTS and has_map


def collect_cases(
    source: Path | None,
    files: Mapping[str, str | Path],
    out: Path,
    find_cases: Callable[[Path], list[Case]],
    *,
    series: Mapping[str, str] | None = None,
    keep_identifiers: bool = False,
    dicom_seg: bool = False,
    note: Callable[[str], None],
) -> Intake:
    """The cases in ``source``, or the one case of ``files`` (channel -> file).

    A folder that holds DICOM and no NIfTI is converted to ``out/nifti``; ``series`` says which
    series is which channel, and ``note`` is called with what is left out. Raises `AnomriError` if
    both or neither of ``source`` and ``files`` are given, if nothing fits, or if options for DICOM
    (``series``, ``keep_identifiers``, ``dicom_seg``) are given for other scans.
    """
    if (source is None) == (not files):
        raise AnomriError(
            "name the scan either with -i, or a file for each channel (--flair FILE --t1 FILE ...)."
        )
    if source is not None and source.is_dir() and holds_dicom(source, out):
        return _convert_dicom(source, out, series or None, keep_identifiers, note)
    cases = [case_from_files(files)] if source is None else find_cases(source)
    if series or keep_identifiers or dicom_seg:
        raise AnomriError(
            "--series, --keep-identifiers and --dicom-seg are for a folder of DICOM files without a"
            " NIfTI file."
        )
    return Intake(cases)


def _convert_dicom(
    folder: Path,
    out: Path,
    series: Mapping[str, str] | None,
    keep_identifiers: bool,
    note: Callable[[str], None],
) -> Intake:
    # Imported here, since whoever only lists a folder needs no library for images.
    from anomri.scans.dicom.find import choose_series
    from anomri.scans.dicom.read import convert_series

    chosen = choose_series(folder, series, note)
    case = convert_series(chosen, output_folder(out) / CONVERTED, keep_identifiers=keep_identifiers)
    for channel, one in chosen.items():
        note(f"{channel} is the series {one}")
    return Intake([case], chosen)
