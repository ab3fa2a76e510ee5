"""What the names of files say: which case an image is of, and what it shows. Nothing is opened here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

SUFFIXES = (".nii.gz", ".nii")
LABEL_NAMES = (
    *("seg", "label", "consensus", "lesion", "lesions", "lesionmask", "lesionseg", "wmh", "tumor", "tumour", "infarct"),
    *("gt", "groundtruth", "segm", "segmentation", "labels", "gtv", "roi", "manual", "annotation", "mask1", "mask2"),
)
"""How labels of lesions end; of several of one case the first in this order is taken."""
MASK_NAMES = ("brainmask", "brain_mask", "mask")
OUTPUTS = ("anomaly", "mask", "reconstruction")
"""How the images that `anomri detect` writes end: anomaly first, which is written first."""
IMAGES = ("flair", "t1", "t1ce", "t2", "swi", "t2star", "dwi", "adc", "fa", "pd", "mra")
OTHER_IMAGES = (*LABEL_NAMES, *MASK_NAMES, *OUTPUTS, *IMAGES)
"""How files end that are not to be taken for a channel which they do not name."""
ALIASES = {
    "t1w": "t1",
    "t1n": "t1",
    "t2w": "t2",
    "t2f": "flair",
    "t2flair": "flair",
    "t1c": "t1ce",
    "t1gd": "t1ce",
    "t1wks": "t1ce",
    "gado": "t1ce",
    "mprage": "t1",
    "dp": "pd",
}
"""What BIDS, BraTS since 2023 and others call channels that are known by another name here."""
CHANNELS = {"flair", "t1", "t1ce", "t2"}
HYPHENATED = {*ALIASES, *IMAGES, *LABEL_NAMES, *MASK_NAMES} - {"brain_mask"}
"""What may stand behind a hyphen, as in BraTS since 2023, where a name's last part else stands behind an underscore."""
TWO_PARTS = re.compile(r"(?:^|[_-])(t2[_-]flair|t1[_-](?:ce|gd|c)|t1\+c)$", re.IGNORECASE)
"""Channels in two words, as in ``T2_FLAIR``: not the channel ``flair`` of a case ``T2``."""
STRIPPED = re.compile("(?:^|_)(?:desc-)?(?:brain|bet)$", re.IGNORECASE)
"""What tools that strip skulls write behind an image's name, for the brain and, before ``_mask``, for its mask."""
PROCESSED = re.compile(
    "_(?:desc-)?(?:pp|preproc|preprocessed|n4|isovox|iso|reg|registered|coreg|mni|denoised|normali[sz]ed)$",
    re.IGNORECASE,
)
"""What others write behind a name for what was done to the image, which is still of the same."""
LIKE_A_LESION = re.compile(
    r"(?:^|[_-])(?:(?:label|desc|seg|mask)-)?(?:[a-z0-9]*lesions?(?:-?(?:seg|mask))?|tumou?rs?|wm[hl]s?|infarcts?|strokes?"
    r"|consensus|gt|ground-?truth|manual|roi|msk)(?=$|[_.-])",
    re.IGNORECASE,
)
"""What names have of which an image may be the label of a lesion; before ``_mask``, that it is not the brain's."""
FORBIDDEN = {*"/\\", *(':*?"<>|' if os.name == "nt" else "")}
"""What would lead a file's name out of its folder, or is refused there."""


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
    bare = PROCESSED.sub("", bare_name(path))
    stem, kind = _split(bare, two_words)
    if kind not in IMAGES and STRIPPED.search(bare) and (whole := _split(stem, two_words))[1] in CHANNELS:
        return whole
    if bare != bare_name(path) and kind not in (*IMAGES, *LABEL_NAMES, *MASK_NAMES):
        return _split(bare_name(path), two_words)
    return stem, kind


def split_names(folders: Mapping[Path, Sequence[Path]]) -> dict[Path, dict[Path, tuple[str, str]]]:
    """`split_name` of the files in the folders of a cohort, but as their neighbours suggest; without what `detect` wrote.

    A mask or a label is of the case whose image has its name, and of several the one that is most plainly a case's is taken.
    """
    named = {place: {path: split_name(path) for path in paths} for place, paths in folders.items()}
    found = _all(named)
    scans = {stem for stem, kind in found if kind in CHANNELS}
    marked = {stem for stem, kind in found if kind in (*LABEL_NAMES, *MASK_NAMES) and _split(stem) not in found}
    for place, files in named.items():
        around = folder_name(place)
        for path in files:
            stem, kind = split_name(path, two_words=False)
            # Before ``_flair``, ``P_T2`` is a case where others are called so, or ``P_T1``: a point in time.
            alike = {stem, f"{stem[:-1]}1"}
            if kind in CHANNELS and (stem in marked or around in alike or alike & scans):
                files[path] = stem, kind
        detected = {stem for stem, kind in files.values() if kind == OUTPUTS[0]}
        for path, (stem, kind) in list(files.items()):
            if stem in detected and kind in OUTPUTS:
                del files[path]
    images = {one for one in _all(named) if one[1] not in MASK_NAMES}
    scans = {stem for stem, kind in images if kind in CHANNELS}
    return {place: _with_owners(folder_name(place), files, images, scans) for place, files in named.items()}


def _all(named: Mapping[Path, Mapping[Path, tuple[str, str]]]) -> set[tuple[str, str]]:
    return {one for files in named.values() for one in files.values()}


def _with_owners(
    place: str, files: Mapping[Path, tuple[str, str]], images: set[tuple[str, str]], scans: set[str]
) -> dict[Path, tuple[str, str]]:
    """The files of a folder called ``place`` with each mask and label as its case's, where that can be told."""
    here = {stem for stem, kind in files.values() if kind in CHANNELS}
    owned: dict[Path, tuple[str, str]] = {}
    ranks: dict[Path, tuple[int, str]] = {}
    for path, (stem, kind) in files.items():
        owned[path] = stem, kind
        whose = _before_lesion(stem)
        if kind in CHANNELS and whose != stem and (whose, kind) in images:
            owned[path], ranks[path] = (whose, "lesion"), (2, kind)  # drawn on that image
        elif kind in (*MASK_NAMES, *LABEL_NAMES):
            if kind in MASK_NAMES and stem not in scans and whose != stem:
                stem, kind = whose, "lesion"
            ranks[path], case = _owner(stem, images, scans)
            # A folder of one case, called after it: whatever its label is called.
            owned[path] = place if case not in scans and here == {place} else case, kind
    best: dict[tuple[str, bool], tuple[int, str]] = {}
    for path, rank in ranks.items():
        case, kind = owned[path]
        one = case, kind in MASK_NAMES
        best[one] = min(rank, best.get(one, rank))
    return {
        path: (case, kind)
        for path, (case, kind) in owned.items()
        if path not in ranks or ranks[path] == best[case, kind in MASK_NAMES]
    }


def _owner(stem: str, images: set[tuple[str, str]], scans: set[str]) -> tuple[tuple[int, str], str]:
    """How plainly a mask or label called ``stem`` is one case's, the least number the most, and that case."""
    if stem in scans:
        return (0, ""), stem
    bare = STRIPPED.sub("", _before_lesion(stem))
    for case, channel in (_split(bare, two_words) for two_words in (True, False)):
        if (case, channel) in images and channel in IMAGES:
            return (2 + (channel not in CHANNELS), channel), case
    return (1 if bare != stem else 0, ""), bare


def _before_lesion(stem: str) -> str:
    """What is left of ``consensus`` and the like at the end of a name."""
    while last := next((one for one in LIKE_A_LESION.finditer(stem) if one.end() == len(stem)), None):
        stem = stem[: last.start()]
    return stem


def is_processed(path: Path) -> bool:
    """Whether a file's name says that its image is a brain without its skull, or what was made of a raw image."""
    return any(words.search(bare_name(path)) for words in (STRIPPED, PROCESSED))


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
