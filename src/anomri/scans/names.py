"""What the name of one file says: which case the image belongs to, and what it shows.

Nothing is opened here. `owners` looks at the names around a file, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".nii.gz", ".nii")

IMAGES = ("flair", "t1", "t1ce", "t2", "swi", "t2star", "dwi", "adc", "fa", "pd", "mra")
"""Channels that are known by name. Any other name of an image is a channel of that name."""
CHANNELS = {"flair", "t1", "t1ce", "t2"}
"""Channels that make a name a scan's, to which masks and labels can belong."""
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
"""What BIDS, BraTS since 2023 and other data sets call these channels."""
DESCRIPTIONS = {
    "flair": re.compile("(3d)?(t2w?)?flairw?(t2w?)?|t2f|fluidattenuatedinversionrecovery"),
    "t1ce": re.compile(
        "(3d)?t1w?(plus)?(ce|c|gd|gad|gado|gadolinium|post|postcontrast|postgd|contrast"
        "|withcontrast|contrastenhanced|km)w?|(ce|gd|postcontrast|contrastenhanced)t1w?"
    ),
    "t1": re.compile("(3d)?t1w?n?|t1w?(native|pre|precontrast)|(t1w?)?mp2?rage"),
    "t2": re.compile("(3d)?t2w?(tse|fse|space)?"),
    "t2star": re.compile("t2starw?"),
    "swi": re.compile("swiw?"),
    "pd": re.compile("pdw?|dp|protondensityw?"),
    "dwi": re.compile("dwi|diffusionw?"),
}
"""What descriptions call the channels, in small letters and digits; ``weighted`` is ``w``."""
SECOND_CHOICE = ("t1wks", "gado", "mprage", "3dt1", "3dflair", "dp")
"""Aliases that give way to an image which is called by the channel's own name."""

LABEL_NAMES = (
    *("seg", "label", "consensus", "lesion", "lesions", "lesionmask", "lesionseg", "wmh", "wml"),
    *("infarct", "infarcts", "stroke", "tumor", "tumour", "tumors", "tumours", "gt", "truth"),
    *("groundtruth", "segm", "segmentation", "labels", "msk", "gtv", "roi", "manual"),
    *("annotation", "mask1", "mask2"),
)
"""How lesion labels end in public data sets, the surest first (ISBI 2015 has two raters: mask1)."""
MASK_NAMES = ("brainmask", "brain_mask", "mask")
"""How brain masks end. ``brain_mask`` is for columns of tables: only a file's last part counts."""
ANNOTATIONS = {*LABEL_NAMES, *MASK_NAMES}
"""Kinds of image that are not channels."""
OUTPUTS = ("anomaly", "mask", "lesions", "reconstruction")
"""How the images that `anomri detect` writes end; the anomaly map is written first."""
SUMMARY_KEY = "anomri"
"""The key in ``<case>.json`` by which a result of `anomri detect` is known; its value is the
version."""
SUMMARY_KEY = "anomri"
"""A key that ``<case>.json`` has if anomri wrote it, and not if a DICOM converter did."""
OTHER_IMAGES = {*ANNOTATIONS, *OUTPUTS, *IMAGES}
"""Ends of names that rule out any other channel."""

STEPS = (
    *("pre", "preproc", "preprocessed", "preprocessed_data", "processed"),
    *("orig", "original", "raw", "raw_data", "native"),
)
"""Names of folders with a scan's images after and before processing; labels fit the first best."""

FORBIDDEN = {*"/\\", *(':*?"<>|' if os.name == "nt" else "")}
"""Characters that would lead a file out of its folder, or that the file system refuses."""
HYPHENATED = {*ALIASES, *CHANNELS, "pd", "mra", "seg", "label", "mask", "brainmask"}
"""Ends of names that may follow a hyphen, as in BraTS since 2023; others follow an underscore."""
TWO_WORDS = re.compile(r"(?:^|[_-])(t2[_-]flair|t1[_-](?:ce|gd|c)|t1\+c)$", re.IGNORECASE)
"""Channels of two words: ``T2_FLAIR`` is not the channel ``flair`` of a case ``T2``."""
CONTRAST_AGENT = re.compile(r"_ce-[A-Za-z0-9]+")
"""The entity of BIDS that makes a T1w a T1ce."""
STRIPPED = re.compile("(?:^|_)(?:desc-)?(?:brain|bet)$", re.IGNORECASE)
"""What skull stripping tools append to an image's name, or insert before ``_mask``."""
PROCESSED = re.compile(
    "_(?:desc-)?(?:pp|preproc|preprocessed|n4|isovox|iso|reg|registered|coreg|mni|denoised"
    "|normali[sz]ed)$",
    re.IGNORECASE,
)
"""What is appended to an image's name for other processing."""


MOVED = re.compile("(?:^|_)(isovox|iso|reg|registered|coreg|mni)(?=_|$)", re.IGNORECASE)
"""Processing that brings an image onto another grid, where masks of the image before do not fit."""


class FileName(NamedTuple):
    """What a file's name says."""

    stem: str
    """What stands before the kind: the case, or nothing."""
    kind: str
    """What the image shows: a channel, a kind of label or a kind of mask."""


class Processing(NamedTuple):
    """A file's name without what processing appended, and what that was."""

    name: str
    is_stripped: bool
    steps: int
    """Number of other steps of processing."""


def channel_name(name: str) -> str:
    """A channel's name in lower case, by the name it has here.

    >>> channel_name("T1w"), channel_name("T2FLAIR"), channel_name("SWI")
    ('t1', 'flair', 'swi')
    """
    name = name.strip().lower()
    return ALIASES.get(name, name)


def described_channel(text: str) -> str:
    """A channel by the name that people give it in a description or a table.

    >>> [described_channel(name) for name in ("T1-weighted", "T2w FLAIR", "T1 + Gd", "T2*", "CBF")]
    ['t1', 'flair', 't1ce', 't2star', 'cbf']
    """
    words = text.lower().replace("*", "star").replace("+", "plus").replace("weighted", "w")
    words = re.sub(r"(?<=\W)(images?|scan|mri|mr)$", "", words)
    plain = re.sub("[^a-z0-9]", "", words)
    for channel, pattern in DESCRIPTIONS.items():
        if pattern.fullmatch(plain):
            return channel
    return channel_name(plain)


def may_name_files(name: str) -> bool:
    """Whether files that are called after a case stay in their folder."""
    return bool(name) and name.isprintable() and not set(name) & FORBIDDEN


def bare_name(path: Path) -> str:
    """A file's name without ``.nii.gz`` or ``.nii``."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def folder_name(folder: Path) -> str:
    """A folder's name as the user wrote it; the target of a link may have any other name."""
    return Path(os.path.abspath(folder)).name  # noqa: PTH100 - resolve() would follow it


def parse_name(path: Path, two_words: bool = True) -> FileName:
    """What a file's name says; ``two_words`` says whether a channel may have two (T2_FLAIR).

    >>> parse_name(Path("P1_v2_T2_FLAIR.nii.gz"))
    FileName(stem='P1_v2', kind='flair')
    >>> parse_name(Path("P1_v2_T2_FLAIR.nii.gz"), two_words=False)
    FileName(stem='P1_v2_T2', kind='flair')
    >>> parse_name(Path("P1_t1_brain.nii.gz"))
    FileName(stem='P1', kind='t1')
    """
    bare = bare_name(path)
    parsed = split_kind(bare, two_words)
    if parsed.kind in ANNOTATIONS or parsed.kind in IMAGES:
        return parsed
    plain = without_processing(bare)
    before = split_kind(plain.name, two_words)
    is_known = before.kind in ANNOTATIONS or before.kind in IMAGES
    if before.kind in CHANNELS or (plain.steps and is_known):
        return before
    return parsed


def split_kind(bare: str, two_words: bool = True) -> FileName:
    """Split a name without its suffix at the last underscore or, for some kinds, hyphen.

    >>> split_kind("BraTS-GLI-00002-000-t2f")
    FileName(stem='BraTS-GLI-00002-000', kind='flair')
    >>> split_kind("sub-1_ce-gd_T1w")
    FileName(stem='sub-1', kind='t1ce')
    """
    if two_words and (words := TWO_WORDS.search(bare)):
        return FileName(bare[: words.start()], channel_name(re.sub("[_+-]", "", words[1])))
    stem, hyphen, kind = bare.rpartition("-")
    if not hyphen or kind.lower() not in HYPHENATED:
        stem, _, kind = bare.rpartition("_")
    kind = channel_name(kind)
    if kind == "t1" and (agent := CONTRAST_AGENT.search(stem)):
        return FileName(stem.replace(agent.group(), ""), "t1ce")
    return FileName(stem, kind)


def without_processing(bare: str) -> Processing:
    """A name without what processing appended to it.

    >>> without_processing("p_t1_n4_brain")
    Processing(name='p_t1', is_stripped=True, steps=1)
    """
    is_stripped, steps = False, 0
    while True:
        if end := STRIPPED.search(bare):
            is_stripped = True
        elif end := PROCESSED.search(bare):
            steps += 1
        else:
            return Processing(bare, is_stripped, steps)
        bare = bare[: end.start()]


def preference(path: Path) -> tuple[bool, bool, int]:
    """A sort key for several images of one channel, the preferred one first.

    An image by the channel's own name comes first, then one without skull, then the least
    processed one.
    """
    plain = without_processing(bare_name(path))
    last_word = re.split("[_-]", plain.name)[-1].lower()
    return last_word in SECOND_CHOICE, not plain.is_stripped, plain.steps


def parse_folder(paths: Sequence[Path]) -> dict[Path, FileName]:
    """The names of a folder's files, without what `anomri detect` wrote there.

    A mask or reconstruction is from `anomri detect` if an anomaly map has the same stem.
    """
    names = {path: parse_name(path) for path in paths}
    detected = {name.stem for name in names.values() if name.kind == OUTPUTS[0]}
    return {
        path: name
        for path, name in names.items()
        if name.stem not in detected or name.kind not in OUTPUTS
    }
