"""Which case a mask or a lesion label belongs to, by its name and the names of the images around.

``p_flair_brain_mask``, ``p_brain_mask`` and ``p_mask`` may all be the brain mask of case ``p``,
``p_brain_tumor_mask`` is its lesion label, and ``p_wm_mask`` is neither. A case may itself be
called ``p_lesion`` or ``P_T2``. So a name is read against the names of all images of the cohort.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

from anomri.scans.names import (
    ANNOTATIONS,
    CHANNELS,
    IMAGES,
    LABEL_NAMES,
    MASK_NAMES,
    PROCESSED,
    FileName,
    folder_name,
    parse_folder,
    parse_name,
    split_kind,
    without_processing,
)

_LESION = (
    r"(?:^|[_-])(?:(?:label|desc|seg|mask)-)?"
    r"(?:[a-z0-9]*lesions?|tumou?rs?|wm[hl]s?|infarcts?|strokes?{more})$"
)
SURELY_LESION = re.compile(_LESION.format(more=""), re.IGNORECASE)
"""End of a stem before ``_mask`` or ``_seg`` that says lesion even behind a `TISSUE`."""
LESION = re.compile(_LESION.format(more="|consensus|manual|gt|ground"), re.IGNORECASE)
"""End of a stem before ``_mask`` that makes it a lesion's label; before ``_seg`` it is dropped."""
VAGUE_LABELS = (
    *("seg", "label", "labels", "segm", "segmentation", "consensus", "manual", "annotation"),
    *("gt", "truth", "groundtruth"),
)
"""Names of labels that segmentations of healthy tissue have too."""
TISSUE = re.compile(
    r"(?:^|[_-])(?:brain|parenchyma|tissues?|aparc|aseg|synthseg|samseg|fast|pve|gm|wm|csf"
    r"|ventricles?|hippocamp[a-z]*|thalam[a-z]*|cerebr[a-z]*|cerebell[a-z]*|subcort[a-z]*|eyes?"
    r"|face|icv|skull)(?=$|[_+-])",
    re.IGNORECASE,
)
"""Words in the name of a mask or segmentation of healthy anatomy."""
WHOLE_BRAIN = re.compile("brain|parenchyma|icv", re.IGNORECASE)
"""Words in the name of a mask of the whole brain."""
DRAWN_ON = re.compile(r"[_-]lesion-?(?:seg|mask)$", re.IGNORECASE)
"""End of a stem before a channel if the image is the label that was drawn on that channel."""


class Match(IntEnum):
    """How the name of a mask or label leads to a case, the plainest way first."""

    SCAN = 0
    """It is called after a scan: p_mask."""
    PROCESSED_SCAN = 1
    """It is called after a scan that was processed: p_brain_mask."""
    CHANNEL = 2
    """It is called after one of `CHANNELS`: p_flair_mask."""
    OTHER_IMAGE = 3
    """It is called after another image: p_swi_mask."""
    NONE = 8
    """It is called after no scan."""
    FOLDER = 9
    """It is called after no scan, but lies in the folder of one case."""


@dataclass(frozen=True, order=True)
class Annotation:
    """A mask or label and the case it belongs to; the smallest is the plainest."""

    match: tuple[Match, str]
    """And the channel it is called after."""
    sureness: int
    path: Path
    case: str
    kind: str


@dataclass(frozen=True)
class Images:
    """The images and labels of a cohort, by name."""

    names: set[FileName]
    scans: set[str]
    """Stems of names that end in one of `CHANNELS`."""


@dataclass
class Named:
    """The files of one folder, each with its case and kind, and the masks that no case gets."""

    files: dict[Path, FileName]
    left_out: dict[Path, str]


def name_files(folders: Mapping[Path, Sequence[Path]]) -> dict[Path, Named]:
    """The case and kind of each file in the folders of a cohort.

    Results of `anomri detect` are not among them. Each case gets only its plainest masks of a
    folder; its labels come with the plainest first.
    """
    names = {folder: parse_folder(paths) for folder, paths in folders.items()}
    _undo_two_words(names)
    found = {name for name in _all_names(names) if name.kind not in MASK_NAMES}
    images = Images(found, {stem for stem, kind in found if kind in CHANNELS})
    return {
        folder: _find_owners(files, folder_name(folder), images) for folder, files in names.items()
    }


def _all_names(folders: Mapping[Path, Mapping[Path, FileName]]) -> Iterable[FileName]:
    return (name for files in folders.values() for name in files.values())


def _undo_two_words(folders: Mapping[Path, dict[Path, FileName]]) -> None:
    """Read ``P_T2_FLAIR`` as FLAIR of the case ``P_T2`` if ``T2`` is a point in time.

    It is one if an annotation, the folder, or another scan is called ``P_T2`` or ``P_T1``.
    """
    found = set(_all_names(folders))
    scans = {stem for stem, kind in found if kind in CHANNELS}
    annotated = {
        stem for stem, kind in found if kind in ANNOTATIONS and split_kind(stem) not in found
    }
    for folder, files in folders.items():
        for path, two_words in files.items():
            one_word = parse_name(path, two_words=False)
            if one_word == two_words or one_word.kind not in CHANNELS:
                continue
            times = {one_word.stem, f"{one_word.stem[:-1]}1"}
            if one_word.stem in annotated or folder_name(folder) in times or times & scans:
                files[path] = one_word


def _find_owners(files: Mapping[Path, FileName], folder: str, images: Images) -> Named:
    """The files of a folder called ``folder``; masks and labels by the case they belong to."""
    annotated = {stem for stem, kind in files.values() if kind in ANNOTATIONS}
    others: dict[Path, FileName] = {}
    left_out: dict[Path, str] = {}
    masks: list[Annotation] = []
    labels: list[Annotation] = []
    for path, name in files.items():
        drawn_on = FileName(DRAWN_ON.sub("", name.stem), name.kind)
        if _is_drawn_on(name, drawn_on, images) and name.stem not in annotated:
            sureness = LABEL_NAMES.index("lesionseg")
            match = (Match.CHANNEL, name.kind)
            labels.append(Annotation(match, sureness, path, drawn_on.stem, "lesionseg"))
        elif name.kind not in ANNOTATIONS:
            others[path] = name
        elif _is_mask(name, images):
            mask = _mask(path, name, images)
            if mask.match[0] == Match.NONE and _is_tissue_only(name, images):
                left_out[path] = "shows healthy tissue, not the whole brain"
            else:
                masks.append(mask)
        else:
            label = _label(path, name, images)
            if _is_anatomy(name) and label.case not in images.scans:
                left_out[path] = "shows healthy tissue, not a lesion"
            else:
                labels.append(label)
    if {stem for stem, kind in others.values() if kind in CHANNELS} == {folder}:
        labels = _adopt(labels, folder, images)
    kept = [*_plainest(masks, left_out), *sorted(labels)]
    named = {one.path: FileName(one.case, one.kind) for one in kept}
    return Named(others | named, left_out)


def _is_drawn_on(name: FileName, drawn_on: FileName, images: Images) -> bool:
    """Whether an image is the label drawn on another, as ``1-LesionSeg-Flair`` on ``1-Flair``."""
    return drawn_on != name and name.kind in CHANNELS and drawn_on in images.names


def _is_surely_lesion(name: FileName) -> bool:
    has_lesion = SURELY_LESION.search(name.stem) is not None
    return has_lesion or (name.kind in LABEL_NAMES and name.kind not in VAGUE_LABELS)


def _is_anatomy(name: FileName) -> bool:
    return TISSUE.search(name.stem) is not None and not _is_surely_lesion(name)


def _is_mask(name: FileName, images: Images) -> bool:
    """Whether an annotation is a mask of anatomy, and not a lesion label called ``_mask``."""
    if name.kind not in MASK_NAMES:
        return False
    return name.stem in images.scans or _is_anatomy(name) or not LESION.search(name.stem)


def _is_tissue_only(name: FileName, images: Images) -> bool:
    """Whether a mask shows a part of the brain, and no image is called as it is."""
    if not _is_anatomy(name) or WHOLE_BRAIN.search(name.stem):
        return False
    return not any((name.stem, image) in images.names for image in IMAGES)


def _mask(path: Path, name: FileName, images: Images) -> Annotation:
    match, case = _owner(name.stem, without_processing(name.stem).name, images)
    return Annotation(match, 0, path, case, name.kind)


def _label(path: Path, name: FileName, images: Images) -> Annotation:
    kind = "lesion" if name.kind in MASK_NAMES else name.kind
    plain = _before_lesion(name.stem, images.scans)
    if plain not in images.scans:
        if _is_surely_lesion(name):
            plain = without_processing(plain).name
        else:
            plain = PROCESSED.sub("", plain)
    match, case = _owner(name.stem, plain, images)
    return Annotation(match, LABEL_NAMES.index(kind), path, case, kind)


def _before_lesion(stem: str, scans: set[str]) -> str:
    """A stem without ``_consensus`` and the like at its end, unless a scan is called so."""
    while stem not in scans and (end := LESION.search(stem)):
        stem = stem[: end.start()]
    return stem


def _owner(stem: str, plain: str, images: Images) -> tuple[tuple[Match, str], str]:
    """The case of a mask or label called ``stem``, and how plainly its name leads there.

    ``plain`` is the stem without what tools append.
    """
    if stem in images.scans:
        return (Match.SCAN, ""), stem
    for two_words in (True, False):
        name = split_kind(plain, two_words)
        if name in images.names and name.kind in IMAGES:
            match = Match.CHANNEL if name.kind in CHANNELS else Match.OTHER_IMAGE
            return (match, name.kind), name.stem
    return (Match.PROCESSED_SCAN if plain in images.scans else Match.NONE, ""), plain


def _adopt(labels: Sequence[Annotation], case: str, images: Images) -> list[Annotation]:
    """In the folder of one case, give it the labels that are called after no scan.

    It gets none if it has a label by name.
    """
    if any(label.case == case for label in labels):
        return list(labels)
    return [
        label if label.case in images.scans else replace(label, match=(Match.FOLDER, ""), case=case)
        for label in labels
    ]


def _plainest(masks: Sequence[Annotation], left_out: dict[Path, str]) -> list[Annotation]:
    """The masks of each case that lead to it most plainly; the others are left out."""
    first: dict[str, Annotation] = {}
    for mask in sorted(masks):
        first.setdefault(mask.case, mask)
    for mask in masks:
        if mask.match != first[mask.case].match:
            left_out[mask.path] = "another file is taken for the brain mask"
    return [mask for mask in masks if mask.path not in left_out]
