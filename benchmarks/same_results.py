"""Whether a change of the code changes results: run real scans through two checkouts and compare
every number.

    python benchmarks/same_results.py run ../shared/data before     # in the checkout before the
    change python benchmarks/same_results.py run ../shared/data after      # in the checkout after
    it python benchmarks/same_results.py compare before after

Images are compared byte by byte, after decompression. Tables and JSON are compared value by value,
except for times, versions, paths and fingerprints.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

VOLATILE = {
    "anomri",
    "code",
    "date",
    "fingerprint",
    "key",
    "machine",
    "seconds",
    "started",
    "version",
    "versions",
    "model",
}
"""Columns and keys that differ between two runs of the same code, or name the code itself."""


def commands(data: Path) -> dict[str, list[str]]:
    """The runs to compare: name of the output folder, and the arguments of the command line."""
    brats, small = (
        str(data / "brats18"),
        ["--preset", "small", "--steps", "40", "--precision", "32-true"],
    )
    return {
        "brats18": ["detect", "-i", brats, "--reconstruction"],
        "brats18-flair": ["evaluate", "-i", brats, "--channels", "flair"],
        "brats18-evaluate": ["evaluate", "-i", brats],
        "mslesseg": ["evaluate", "-i", str(data / "mslesseg")],
        "mslesseg-detect": ["detect", "-i", str(data / "mslesseg"), "--sensitivity", "high"],
        "stroke": ["detect", "-i", str(data / "stroke")],
        "healthy": ["detect", "-i", str(data / "healthy"), "--min-volume", "10"],
        "whole_head": ["detect", "-i", str(data / "whole_head"), "--skull-strip", "--register"],
        "train": ["train", "-i", brats, *small],
    }


def run(data: Path, out: Path, only: str | None = None) -> None:
    """Run every command with the anomri that this Python imports."""
    for name, arguments in commands(data).items():
        folder = out / name
        if not folder.exists() and (only is None or name in only.split(",")):
            print(name, flush=True)
            command = [sys.executable, "-m", "anomri", *arguments, "-o", str(folder)]
            if name == "train":
                command += ["--cache", str(out / "cache")]
            code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
            print(f"  exit code {code}", flush=True)


def contents(path: Path) -> object:
    """What is compared of a file: a digest, rows of a table, or values of a JSON document."""
    if path.name.endswith(".nii.gz"):
        return hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    if path.suffix in (".tsv", ".csv"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        return [{key: value for key, value in row.items() if key not in VOLATILE} for row in rows]
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(before: object, after: object, place: str = "") -> list[str]:
    """Where two values of JSON differ, as ``score.kind``; volatile keys aside.

    >>> differences({"a": {"b": 1, "c": 2}, "seconds": 3}, {"a": {"b": 1, "c": 3}, "seconds": 4})
    ['a.c']
    """
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [key for key in {**before, **after} if key not in VOLATILE]
        inside = [differences(before.get(k), after.get(k), f"{place}.{k}".strip(".")) for k in keys]
        return [one for found in inside for one in found]
    return [] if before == after else [place or "content"]


def compare(before: Path, after: Path) -> int:
    """Print what differs between two folders of runs; 1 if anything does.

    Only the runs that ``after`` holds are compared. Pictures and records of a run are left out.
    """
    kinds = (".nii.gz", ".tsv", ".csv", ".json", ".safetensors")
    runs = {path.name for path in after.iterdir()}
    files = [
        path.relative_to(before)
        for path in sorted(before.rglob("*"))
        if path.name.endswith(kinds)
        and not {"logs", "cache", "previews"} & {*path.parts}
        and path.relative_to(before).parts[0] in runs
    ]
    different = 0
    for path in files:
        if not (after / path).is_file():
            different += 1
            print(f"missing: {path}")
        elif found := differences(contents(before / path), contents(after / path)):
            different += 1
            print(f"differs: {path}: {', '.join(found[:8])}{', ...' if found[8:] else ''}")
    print(f"{len(files)} files compared, {different} differ")
    return int(different > 0)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["run", "compare"])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--only", help="Names of runs with commas between, as stroke,healthy.")
    options = parser.parse_args()
    if options.action == "compare":
        return compare(options.first, options.second)
    options.second.mkdir(parents=True, exist_ok=True)
    run(options.first, options.second, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
