"""Finding the scans of a cohort. Nothing is opened here but tables and descriptions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from anomri.errors import AnomriError
from anomri.scans.case import Case
from anomri.scans.cohort import Cohort, LeftOut
from anomri.scans.dicom.signature import is_dicom
from anomri.scans.layouts import LAYOUTS
from anomri.scans.names import IMAGES, SUFFIXES, parse_name
from anomri.scans.places import Place
from anomri.scans.splits import assign_splits, read_splits


def find_cases(cohort: str | Path) -> list[Case]:
    """The cases of a cohort, sorted by name.

    ``cohort`` is one of

    * a folder of folders, ``<case>/<case>_<channel>.nii.gz`` (BraTS) or
      ``<patient>/<channel>.nii.gz``;
    * the same with a folder for each visit, ``<patient>/<visit>/<channel>.nii.gz``: all images of a
      visit are one case, called ``<patient>_<visit>``;
    * the same with a folder for each step of processing, ``<patient>/pre/<channel>.nii.gz``: the
      first step is taken, labels and masks may lie beside (WMH 2017, MSSEG 2016, ISBI 2015);
    * a flat folder, ``<case>_<channel>.nii.gz``, also that of a single case;
    * a BIDS data set, raw or derivative (`bids.bids_cases`);
    * a raw data set of nnU-Net, with the channel names of its ``dataset.json``;
    * a ``.tsv`` with a column ``case``, one per channel, and perhaps ``mask``, ``label``, ``split``
      and ``subject`` (the patient); its paths are relative to the table;
    * one NIfTI file, a case of one channel.

    A name that ends in ``_seg``, ``_lesion``, ``_lesion_mask`` or the like is a lesion label
    (`names.LABEL_NAMES`), in ``_mask`` or ``_brainmask`` a brain mask. Channel names are lower
    case; ``t1w``, ``t1c``, ``T2_FLAIR`` and others are known (`names.ALIASES`), also behind a
    hyphen and before ``_n4``, ``_reg`` or the like. An image with ``_brain`` or ``_bet`` in its
    name is preferred, then the least processed one. Segmentations of healthy tissue and what
    `anomri detect` wrote are left out. A ``splits.csv`` (case,split) in the folder gives each case
    its split. `read_cohort` also says what was left out.

    Raises `AnomriError` if there is no scan, or a file that does not fit.
    """
    return _read(Path(cohort)).cases


def read_cohort(cohort: str | Path) -> Cohort:
    """What is understood of a cohort: its layout, its cases, and each NIfTI file that is left out.

    ``cohort`` is what `find_cases` takes. Raises `AnomriError` if that does.

    >>> cohort = read_cohort("cohort")           # doctest: +SKIP
    >>> cohort.cases[0].channels                 # doctest: +SKIP
    >>> cohort.write("cohort.tsv")               # doctest: +SKIP
    """
    path = Path(cohort)
    found = _read(path)
    known = {file for case in found.cases for file in _files(case)}
    known |= {one.path for one in found.left_out}
    unknown = [
        LeftOut(image, f"is not where this layout has images ({found.layout})")
        for image in _all_images(path)
        if image not in known
    ]
    return replace(found, left_out=sorted([*found.left_out, *unknown]))


def _read(path: Path) -> Cohort:
    place = Place(path)
    layout = next((one for one in LAYOUTS if one.matches(place)), None)
    if layout is None:
        if not path.exists():
            raise AnomriError(f"{path}: no such file or folder.")
        if is_dicom(path):
            raise AnomriError(f"{path}: is a DICOM file; give the folder that holds its series.")
        if not path.is_dir():
            raise AnomriError(
                f"{path}: not a folder, a .tsv, a .nii or a .nii.gz; a cohort is one of these."
            )
        raise _nothing_found(path, [])
    cohort = layout.read(place)
    has_images = any(case.channels for case in cohort.cases)
    if not cohort.cases or (not has_images and _deeper_image(path, cohort.cases)):
        raise _nothing_found(path, cohort.cases)
    cases = cohort.cases
    if (path / "splits.csv").is_file():
        cases = assign_splits(cases, read_splits(path / "splits.csv"))
    return replace(cohort, cases=sorted(cases, key=lambda case: case.name))


def _nothing_found(path: Path, cases: list[Case]) -> AnomriError:
    but_labels = " but labels and masks" if cases else ""
    expected = ", ".join(dict.fromkeys(layout.EXAMPLE for layout in LAYOUTS))
    deeper = _deeper_image(path, cases)
    hint = f" There is {deeper}: name a folder that is nearer, or write a .tsv." if deeper else ""
    return AnomriError(f"{path}: no scans found{but_labels}. Expected one of: {expected}.{hint}")


def _deeper_image(path: Path, cases: list[Case]) -> Path | None:
    """An image that lies deeper in a folder than the annotations of ``cases``, if there are any."""
    known = {file for case in cases for file in _files(case)}
    for image in path.glob("*/*/**/*"):
        if not image.name.lower().endswith(SUFFIXES) or image in known:
            continue
        if not cases or parse_name(image).kind in IMAGES:
            return image
    return None


def _files(case: Case) -> Iterator[Path]:
    yield from case.channels.values()
    yield from (path for path in (case.label, case.mask) if path)


def _all_images(folder: Path) -> Iterator[Path]:
    """All NIfTI files in a folder and below; links are followed, but not in a circle."""
    seen: set[str] = set()
    waiting = [Place(folder)]
    while waiting:
        place = waiting.pop()
        real = os.path.realpath(place.path)
        if real not in seen:
            seen.add(real)
            yield from place.images
            waiting += place.folders
