"""What the names of files say: which case an image is of, and what it shows. Nothing is opened here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SUFFIXES = (".nii.gz", ".nii")
LABEL_NAMES = (
    *(
        "seg",
        "label",
        "consensus",
        "lesion",
        "lesions",
        "lesionmask",
        "lesionseg",
        "wmh",
        "wml",
        "infarct",
        "infarcts",
    ),
    *(
        "stroke",
        "tumor",
        "tumour",
        "tumors",
        "tumours",
        "gt",
        "truth",
        "groundtruth",
        "segm",
        "segmentation",
        "labels",
    ),
    *("msk", "gtv", "roi", "manual", "annotation", "mask1", "mask2"),
)
"""How labels of lesions end in public data sets (``mask1`` and ``mask2`` are the raters' of ISBI 2015), the surest first."""
MASK_NAMES = ("brainmask", "brain_mask", "mask")
"""How brain masks end; ``brain_mask`` as a column of a table, since of a file's name the last part alone is looked at."""
OUTPUTS = ("anomaly", "mask", "reconstruction")
"""How the images that `anomri detect` writes end: anomaly first, which is written first."""
IMAGES = ("flair", "t1", "t1ce", "t2", "swi", "t2star", "dwi", "adc", "fa", "pd", "mra")
ANNOTATIONS = {*LABEL_NAMES, *MASK_NAMES}
"""What is no channel."""
OTHER_IMAGES = {*ANNOTATIONS, *OUTPUTS, *IMAGES}
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
    "3dt1": "t1",
    "3dflair": "flair",
    "dp": "pd",
}
"""What BIDS, BraTS since 2023 and others call channels that are known by another name here."""
SELDOM = ("t1wks", "gado", "mprage", "3dt1", "3dflair", "dp")
"""Of these, those that stand back where a case has an image by the channel's own name."""
CHANNELS = {"flair", "t1", "t1ce", "t2"}
HYPHENATED = {*ALIASES, *CHANNELS, "pd", "mra", "seg", "label", "mask", "brainmask"}
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
SURE = r"(?:^|[_-])(?:(?:label|desc|seg|mask)-)?(?:[a-z0-9]*lesions?|tumou?rs?|wm[hl]s?|infarcts?|strokes?"
SURELY_LESION, LESION = (
    re.compile(f"{SURE}{more})$", re.IGNORECASE) for more in ("", "|consensus|manual|gt|ground")
)
"""What stands before ``_mask`` if that is a lesion's and not the brain's, and before ``_seg`` between it and the case; of
`SURELY_LESION` also if there is a `TISSUE` before it, as in ``brain_tumor_mask``."""
VAGUE = (
    "seg",
    "label",
    "labels",
    "segm",
    "segmentation",
    "consensus",
    "manual",
    "annotation",
    "gt",
    "truth",
    "groundtruth",
)
"""Names of labels that segmentations of tissues have too."""
TISSUE = re.compile(
    r"(?:^|[_-])(?:brain|parenchyma|tissues?|aparc|aseg|synthseg|samseg|fast|pve|gm|wm|csf|ventricles?|hippocamp[a-z]*|thalam[a-z]*"
    r"|cerebr[a-z]*|cerebell[a-z]*|subcort[a-z]*|eyes?|face|icv|skull)(?=$|[_+-])",
    re.IGNORECASE,
)
"""What names have of which a mask or a segmentation is of healthy anatomy."""
WHOLE = re.compile("brain|parenchyma|icv", re.IGNORECASE)
"""What names have of which a mask of anatomy is the brain's; others, of no scan by their name, are left alone."""
DRAWN_ON = re.compile(r"[_-]lesion-?(?:seg|mask)$", re.IGNORECASE)
"""What stands before ``_flair`` if it is the label that was drawn on that image."""
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
    bare = bare_name(path)
    stem, kind = _split(bare, two_words)
    if kind not in ANNOTATIONS and kind not in IMAGES:
        plain, _, processed = _plain(bare)
        whole = _split(plain, two_words)
        if whole[1] in CHANNELS or (processed and (whole[1] in ANNOTATIONS or whole[1] in IMAGES)):
            return whole
    return stem, kind


def preference(path: Path) -> tuple[bool, bool, int]:
    """The lower, the rather an image is taken of several of a channel: by its own name, without skull, the least processed."""
    plain, stripped, processed = _plain(bare_name(path))
    return re.split("[_-]", plain)[-1].lower() in SELDOM, not stripped, processed


def _plain(bare: str) -> tuple[str, bool, int]:
    """A name without what tools write behind it; whether that says that a skull was stripped, and how much more there is."""
    stripped, processed = False, 0
    while end := STRIPPED.search(bare) or PROCESSED.search(bare):
        is_brain = end.re is STRIPPED
        stripped, processed = stripped or is_brain, processed + (not is_brain)
        bare = bare[: end.start()]
    return bare, stripped, processed


def split_folder(paths: Sequence[Path]) -> dict[Path, tuple[str, str]]:
    """`split_name` of the files of a folder, without what `anomri detect` wrote there: maps, and what is called after theirs."""
    named = {path: split_name(path) for path in paths}
    detected = {stem for stem, kind in named.values() if kind == OUTPUTS[0]}
    return {
        path: (stem, kind)
        for path, (stem, kind) in named.items()
        if stem not in detected or kind not in OUTPUTS
    }


def split_names(folders: Mapping[Path, Sequence[Path]]) -> dict[Path, dict[Path, tuple[str, str]]]:
    """`split_name` of the files in the folders of a cohort, but as their neighbours suggest; without what `detect` wrote.

    A mask or a label is of the case whose image has its name. Of a case's masks in a folder only the one that is most
    plainly its own is there, and its labels come in that order.
    """
    named = {place: split_folder(paths) for place, paths in folders.items()}
    found = _all(named)
    scans = {stem for stem, kind in found if kind in CHANNELS}
    marked = {stem for stem, kind in found if kind in ANNOTATIONS and _split(stem) not in found}
    for place, files in named.items():
        around = folder_name(place)
        for path in files:
            stem, kind = split_name(path, two_words=False)
            # Before ``_flair``, ``P_T2`` is a case where others are called so, or ``P_T1``: a point in time.
            alike = {stem, f"{stem[:-1]}1"}
            if kind in CHANNELS and (stem in marked or around in alike or alike & scans):
                files[path] = stem, kind
    images = {one for one in _all(named) if one[1] not in MASK_NAMES}
    scans = {stem for stem, kind in images if kind in CHANNELS}
    return {
        place: _with_owners(files, folder_name(place), images, scans)
        for place, files in named.items()
    }


def _all(named: Mapping[Path, Mapping[Path, tuple[str, str]]]) -> set[tuple[str, str]]:
    return {one for files in named.values() for one in files.values()}


@dataclass(frozen=True, order=True)
class _Mark:
    """A mask or a label: how plainly it is one case's, the least the most, and which."""

    rank: tuple[int, str]
    sureness: int
    path: Path
    case: str
    kind: str


UNKNOWN, ADOPTED = 8, 9
"""Ranks of what is called after no scan, and of a label that but for its folder would be."""


def _with_owners(
    files: Mapping[Path, tuple[str, str]], place: str, images: set[tuple[str, str]], scans: set[str]
) -> dict[Path, tuple[str, str]]:
    """The files of a folder called ``place``, each mask and label with the case whose it is, where that can be told."""
    marked = {stem for stem, kind in files.values() if kind in ANNOTATIONS}
    others: dict[Path, tuple[str, str]] = {}
    masks, labels = list[_Mark](), list[_Mark]()
    for path, (stem, kind) in files.items():
        image = DRAWN_ON.sub("", stem)
        sure = SURELY_LESION.search(stem) is not None or (kind in LABEL_NAMES and kind not in VAGUE)
        anatomy = TISSUE.search(stem) is not None and not sure
        if image != stem and kind in CHANNELS and (image, kind) in images and stem not in marked:
            labels.append(
                _Mark((2, kind), LABEL_NAMES.index("lesionseg"), path, image, "lesionseg")
            )
        elif kind in MASK_NAMES and (stem in scans or anatomy or not LESION.search(stem)):
            rank, case = _owner(stem, _plain(stem)[0], images, scans)
            shown = any((stem, image) in images for image in IMAGES)
            if rank[0] == UNKNOWN and anatomy and not WHOLE.search(stem) and not shown:
                continue
            masks.append(_Mark(rank, 0, path, case, kind))
        elif kind in ANNOTATIONS:
            kind = "lesion" if kind in MASK_NAMES else kind
            before = _before_lesion(stem, scans)
            plain = (
                before
                if before in scans
                else _plain(before)[0]
                if sure
                else PROCESSED.sub("", before)
            )
            rank, case = _owner(stem, plain, images, scans)
            if case in scans or not anatomy:
                labels.append(_Mark(rank, LABEL_NAMES.index(kind), path, case, kind))
        else:
            others[path] = stem, kind
    if {stem for stem, kind in others.values() if kind in CHANNELS} == {place}:
        labels = _adopted(labels, place, scans)
    best = {mark.case: mark.rank for mark in sorted(masks, reverse=True)}
    kept = [*(mark for mark in masks if mark.rank == best[mark.case]), *sorted(labels)]
    return others | {mark.path: (mark.case, mark.kind) for mark in kept}


def _owner(
    stem: str, plain: str, images: set[tuple[str, str]], scans: set[str]
) -> tuple[tuple[int, str], str]:
    """How plainly a mask or label called ``stem``, ``plain`` without what tools add, is one case's, and that case."""
    if stem in scans:
        return (0, ""), stem
    for case, channel in (_split(plain, two_words) for two_words in (True, False)):
        if (case, channel) in images and channel in IMAGES:
            return (2 + (channel not in CHANNELS), channel), case
    return (1 if plain in scans else UNKNOWN, ""), plain


def _adopted(labels: Sequence[_Mark], place: str, scans: set[str]) -> list[_Mark]:
    """In the folder of one case, called after it, a label that is no one's by its name is that case's, if it has none."""
    if any(label.case == place for label in labels):
        return list(labels)
    return [
        label if label.case in scans else replace(label, rank=(ADOPTED, ""), case=place)
        for label in labels
    ]


def _before_lesion(stem: str, scans: set[str]) -> str:
    """A name without ``_consensus`` and the like at its end, but for what is a scan's name."""
    while stem not in scans and (end := LESION.search(stem)):
        stem = stem[: end.start()]
    return stem


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
