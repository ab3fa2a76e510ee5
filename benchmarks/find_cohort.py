"""How long it takes to find the scans of a cohort of 3,000 patients, in several layouts.

python benchmarks/find_cohort.py [--patients 3000]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from anomri.scans.cohort import write_cases
from anomri.scans.find import find_cases

CHANNELS = ("flair", "t1", "t1ce", "t2")
ENDS = (*CHANNELS, "seg")


def brats(name: str) -> Iterator[str]:
    """``<case>/<case>_<channel>``."""
    return (f"{name}/{name}_{end}" for end in ENDS)


def flat(name: str) -> Iterator[str]:
    """``<case>_<channel>``."""
    return (f"{name}_{end}" for end in ENDS)


def patients(name: str) -> Iterator[str]:
    """``<patient>/<channel>``."""
    return (f"{name}/{end}" for end in ENDS)


def visits(name: str) -> Iterator[str]:
    """``<patient>/<visit>/<channel>``."""
    return (f"{name}/v1/{end}" for end in ENDS)


def steps(name: str) -> Iterator[str]:
    """``<patient>/pre/<channel>`` and ``orig/<channel>``."""
    yield from (f"{name}/{step}/{channel}" for step in ("pre", "orig") for channel in CHANNELS)
    yield f"{name}/wmh"


def nnunet(name: str) -> Iterator[str]:
    """``imagesTr/<case>_<number>``."""
    yield from (f"imagesTr/{name}_{number:04d}" for number in range(len(CHANNELS)))
    yield f"labelsTr/{name}"


def bids(name: str) -> Iterator[str]:
    """``sub-<patient>/anat/sub-<patient>_<suffix>``."""
    anat = f"sub-{name}/anat/sub-{name}"
    yield from (f"{anat}_{suffix}" for suffix in ("FLAIR", "T1w", "ce-gd_T1w", "T2w"))
    yield f"derivatives/hand/{anat}_label-lesion_mask"


LAYOUTS = (brats, flat, patients, visits, steps, nnunet, bids)


def make(folder: Path, layout: Callable[[str], Iterator[str]], count: int) -> Path:
    """Empty files of ``count`` patients in a layout."""
    for number in range(count):
        for name in layout(f"P{number:05d}"):
            path = folder / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    if layout is nnunet:
        names = {str(number): channel for number, channel in enumerate(CHANNELS)}
        (folder / "dataset.json").write_text(json.dumps({"channel_names": names}))
    if layout is bids:
        facts = {"Name": "Small", "BIDSVersion": "1.10.0"}
        (folder / "dataset_description.json").write_text(json.dumps(facts))
    return folder


def seconds(cohort: Path, patients: int) -> float:
    """The time of one `find_cases`, which has to find all patients and channels."""
    start = time.perf_counter()
    cases = find_cases(cohort)
    elapsed = time.perf_counter() - start
    assert len(cases) == patients
    assert all(len(case.channels) == len(CHANNELS) and case.label for case in cases)
    return elapsed


def main(args: list[str] | None = None) -> None:
    """Print the seconds for each layout, and for a table of the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=3000)
    count = parser.parse_args(args).patients
    with tempfile.TemporaryDirectory() as folder:
        for layout in LAYOUTS:
            cohort = make(Path(folder) / layout.__name__, layout, count)
            print(f"{layout.__name__:9s}{seconds(cohort, count):7.2f} s")
        table = Path(folder) / "cohort.tsv"
        write_cases(table, find_cases(Path(folder) / "brats"))
        print(f"{'table':9s}{seconds(table, count):7.2f} s")


if __name__ == "__main__":
    main()
