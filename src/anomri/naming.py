"""What the names of files say: which case an image is of, and what it shows. Nothing is opened here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

SUFFIXES = (".nii.gz", ".nii")
LABEL_NAMES = ("seg", "label")
MASK_NAMES = ("mask", "brainmask")
OUTPUTS = ("anomaly", "mask", "reconstruction")
"""How the images that `anomri detect` writes end: anomaly first, which is written first."""
OTHER_IMAGES = (
    *LABEL_NAMES,
    *MASK_NAMES,
    *OUTPUTS,
    "flair",
    "t1",
    "t1ce",
    "t2",
    "swi",
    "t2star",
    "dwi",
    "adc",
    "fa",
    "pd",
)
"""How files end that are not to be taken for a channel which they do not name."""
ALIASES = {
    "t1w": "t1",
    "t1n": "t1",
    "t2w": "t2",
    "t2f": "flair",
    "t2flair": "flair",
    "t1c": "t1ce",
    "t1gd": "t1ce",
}
"""What BIDS, BraTS since 2023 and others call channels that are known by another name here."""
CHANNELS = {*ALIASES.values()}
HYPHENATED = {*ALIASES, *CHANNELS, *LABEL_NAMES, *MASK_NAMES}
"""What may stand behind a hyphen, as in BraTS since 2023, where a name's last part else stands behind an underscore."""
TWO_PARTS = re.compile(r"(?:^|[_-])(t2[_-]flair|t1[_-](?:ce|gd|c)|t1\+c)$", re.IGNORECASE)
"""Channels in two words, as in ``T2_FLAIR``: not the channel ``flair`` of a case ``T2``."""
STRIPPED = re.compile("_(?:desc-)?(?:brain|bet)$", re.IGNORECASE)
"""What tools that strip skulls write behind an image's name, for the brain and, before ``_mask``, for its mask."""
FORBIDDEN = {*"/\\", *(':*?"<>|' if os.name == "nt" else "")}


def channel_name(name: str) -> str:
    """A channel's name in lower case and, if it is one of `ALIASES`, as it is known here."""
    name = name.strip().lower()
    return ALIASES.get(name, name)


def may_name_files(name: str) -> bool:
    """Whether files called after a case stay in their folder."""
    return bool(name) and name.isprintable() and not set(name) & FORBIDDEN


def bare_name(path: Path) -> str:
    """A file's name without ``.nii.gz`` or ``.nii``."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def folder_name(folder: Path) -> str:
    """What a folder is called where the user named it: what a link leads to may be called anything."""
    return Path(os.path.abspath(folder)).name  # noqa: PTH100 - resolve() would follow it


def split_name(path: Path, two_words: bool = True) -> tuple[str, str]:
    """What stands before the last part of a file's name, and that part: the case and what the image is of it."""
    stem, kind = _split(bare_name(path), two_words)
    if is_stripped(path) and (whole := _split(stem, two_words))[1] in CHANNELS:
        return whole
    return stem, kind


def split_names(paths: Iterable[Path]) -> dict[Path, tuple[str, str]]:
    """`split_name` of the files of one folder, but as the others there suggest; without what `anomri detect` wrote.

    A mask is of the case whose image has its name, and the one that is most plainly a case's is taken.
    """
    named = {path: split_name(path) for path in paths}
    scans = {stem for stem, kind in named.values() if kind in CHANNELS}
    for path in named:
        stem, kind = split_name(path, two_words=False)
        if kind in CHANNELS and scans & {stem, f"{stem[:-1]}1"}:
            named[path] = stem, kind  # T1 and T2 are points in time
    detected = {stem for stem, kind in named.values() if kind == OUTPUTS[0]}
    named = {path: (stem, kind) for path, (stem, kind) in named.items() if stem not in detected or kind not in OUTPUTS}
    return _with_masks(named)


def _with_masks(named: dict[Path, tuple[str, str]]) -> dict[Path, tuple[str, str]]:
    images = {found for found in named.values() if found[1] not in MASK_NAMES}
    masks: dict[Path, tuple[int, str, str]] = {}
    for path, (stem, kind) in named.items():
        if kind not in MASK_NAMES:
            continue
        if stem in {of for of, _ in images}:
            masks[path] = 0, stem, kind
            continue
        stem = STRIPPED.sub("", stem)
        before, channel = _split(stem)
        derived = (before, channel) in images
        masks[path] = 2 if derived and channel not in CHANNELS else 1, before if derived else stem, kind
    best = {stem: min(rank for rank, of, _ in masks.values() if of == stem) for _, stem, _ in masks.values()}
    kept = {path: (stem, kind) for path, (rank, stem, kind) in masks.items() if rank == best[stem]}
    return {path: kept.get(path, found) for path, found in named.items() if path in kept or path not in masks}


def is_stripped(path: Path) -> bool:
    """Whether a file's name says that its image is a brain without its skull."""
    return STRIPPED.search(bare_name(path)) is not None


def _split(bare: str, two_words: bool = True) -> tuple[str, str]:
    if two_words and (two := TWO_PARTS.search(bare)):
        return bare[: two.start()], channel_name(re.sub("[_+-]", "", two[1]))
    stem, hyphen, kind = bare.rpartition("-")
    if not hyphen or kind.lower() not in HYPHENATED:
        stem, _, kind = bare.rpartition("_")
    kind = channel_name(kind)
    if kind == "t1" and (agent := re.search(r"_ce-[A-Za-z0-9]+", stem)):
        # In BIDS: a contrast agent was given.
        return stem.replace(agent.group(), ""), "t1ce"
    return stem, kind
