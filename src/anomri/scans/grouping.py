"""From groups of images to cases: whose each file is, and which of several is taken."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from anomri.errors import AnomriError
from anomri.scans.case import Case, case_from_kinds, note_choice
from anomri.scans.cohort import Cohort, LeftOut
from anomri.scans.names import (
    ANNOTATIONS,
    IMAGES,
    LABEL_NAMES,
    MASK_NAMES,
    MOVED,
    OUTPUTS,
    STEPS,
    FileName,
    bare_name,
    channel_name,
    folder_name,
    parse_name,
    preference,
)
from anomri.scans.own_results import is_own_result
from anomri.scans.owners import Named, name_files

Files = dict[str, list[Path]]
"""The files of one case by kind: channel, kind of label or kind of mask."""


@dataclass(frozen=True)
class Group:
    """Images that lie together: in one folder or, after steps of processing, below it."""

    folder: Path
    images: Sequence[Path]
    case: str | None = None
    """The case of all of them; if None, their names say whose they are, or the folder's name."""
    subject: str | None = None
    note: str = ""
    """What the user should know about the choice of these images."""
    left_out: Sequence[LeftOut] = field(default=())


def cases_from_groups(layout: str, folder: Path, groups: Iterable[Group]) -> Cohort:
    """The cases of the cohort ``folder`` from the groups that its layout found.

    Raises `AnomriError` if two images are the same channel of one case.
    """
    ordered = sorted(groups, key=lambda group: group.folder)
    named = name_files(
        {
            group.folder: [path for path in group.images if not _is_mask_or_lesions(path)]
            for group in ordered
        }
    )
    unnamed = [group.folder for group in ordered if group.case is None]
    patients = _patient_folders(folder, {place: named[place].files for place in unnamed})
    files: dict[str, Files] = {}
    for group in ordered:
        for path, (stem, kind) in named[group.folder].files.items():
            name = _case_name(group, stem, patients)
            files.setdefault(name, {}).setdefault(kind, []).append(path)
    own_notes: dict[str, list[str]] = {}
    for group in ordered:
        for path in _unread(group, named[group.folder]):
            stem, kind = parse_name(path)
            if kind in ANNOTATIONS and not is_own_result(path):
                name = _case_name(group, stem, patients)
                own_notes.setdefault(name, []).append(_note_taken_for_result(name, path, stem))
    subjects = {group.case: group.subject for group in ordered if group.case}
    notes = {path: group.note for group in ordered if group.note for path in group.images}
    left_out = [one for group in ordered for one in _left_out(group, named[group.folder])]
    cases: list[Case] = []
    for name, found in files.items():
        case, others = _choose(name, found)
        left_out += others
        told = {f"{name}: {notes[path]}" for path in case.channels.values() if path in notes}
        all_notes = (*case.notes, *sorted(told), *own_notes.get(name, ()))
        cases.append(replace(case, subject=subjects.get(name), notes=all_notes))
    return Cohort(layout, cases, left_out)


def _case_name(group: Group, stem: str, patients: set[Path]) -> str:
    """The case of an image in a group whose name has this stem."""
    name = group.case or stem
    if not name or (group.case is None and group.folder in patients):
        return folder_name(group.folder)
    return name


def _unread(group: Group, named: Named) -> list[Path]:
    """The images that lie beside an anomaly map and are called as results are."""
    known = {*named.files, *named.left_out}
    return [path for path in group.images if path not in known]


def _is_mask_or_lesions(path: Path) -> bool:
    """Whether an image is a result; maps are known by their names, and what lies beside by them."""
    return not bare_name(path).endswith(f"_{OUTPUTS[0]}") and is_own_result(path)


def _note_taken_for_result(name: str, path: Path, stem: str) -> str:
    return (
        f"{name}: {path.name} is not read: beside {stem}_anomaly.nii.gz it is taken for a result of"
        f" anomri detect. If it is your label or mask, call it {stem}_seg or {stem}_brainmask."
    )


def _left_out(group: Group, named: Named) -> list[LeftOut]:
    return [
        *group.left_out,
        *(LeftOut(path, "was written by anomri detect") for path in _unread(group, named)),
        *(LeftOut(path, reason) for path, reason in named.left_out.items()),
    ]


def _patient_folders(cohort: Path, folders: Mapping[Path, Mapping[Path, FileName]]) -> set[Path]:
    """The folders that hold one patient each, though their files are called alike.

    ``p1/scan_flair`` and ``p2/scan_flair`` are of two patients. Folders may also be of the same
    patients: one for each channel (``flair/anna_flair``, ``t1/anna_t1``), step, or for labels.
    """
    taken = {name.stem for name in folders[cohort].values()} | {folder_name(cohort)}
    by_stem: dict[str, list[Path]] = {}
    for folder, names in folders.items():
        stems = {name.stem for name in names.values()}
        if len(stems) != 1 or _is_for_kind(folder, {name.kind for name in names.values()}):
            continue
        (stem,) = stems
        # A stem with a number may be a patient's, who has a folder for each step of processing.
        if stem not in {folder.name, *taken} and not re.search(r"\d", stem):
            by_stem.setdefault(stem, []).append(folder)
    return {
        folder
        for alike in by_stem.values()
        if _same_content([folders[folder] for folder in alike])
        for folder in alike
    }


def _is_for_kind(folder: Path, kinds: set[str]) -> bool:
    """Whether a folder's name says that it is for a channel, for annotations, or for a step."""
    words = {channel_name(word) for word in re.split(r"[^A-Za-z0-9]+", folder.name)}
    return bool(words & kinds) or kinds <= ANNOTATIONS or folder.name.lower() in STEPS


def _same_content(folders: Sequence[Mapping[Path, FileName]]) -> bool:
    """Whether two images of the same kind and the same processing lie in these folders."""
    counts = Counter(
        (name.kind, preference(path)) for names in folders for path, name in names.items()
    )
    return max(counts.values()) > 1


def _choose(name: str, files: Files) -> tuple[Case, list[LeftOut]]:
    """A case with one file of each kind, its label and mask, and the files that it does not take.

    Raises `AnomriError` if there is no reason to prefer one of two images.
    """
    files, step_note, left_out = _one_step(name, files)
    chosen: dict[str, Path] = {}
    for kind, paths in files.items():
        if kind not in LABEL_NAMES:
            chosen[kind] = _preferred(name, kind, paths)
            left_out += [
                LeftOut(path, f"another file is taken for {kind}")
                for path in paths
                if path != chosen[kind]
            ]
    labels = [
        (kind, path) for kind, paths in files.items() if kind in LABEL_NAMES for path in paths
    ]
    chosen.update(labels[:1])
    case = case_from_kinds(name, chosen)
    for annotation in (case.label, case.mask):
        if annotation is not None:
            _check_same_image(annotation, chosen, files)
    notes = [*case.notes, *note_choice(name, "label", [path for _, path in labels])]
    if _is_label_of_folder(case):
        label = case.label.name if case.label else ""
        notes.append(f"{name}: {label} is taken for its label, as it is in its folder.")
    left_out += [LeftOut(path, "another file is taken for the label") for _, path in labels[1:]]
    left_out += [
        LeftOut(path, "another file is taken for the brain mask")
        for kind, path in chosen.items()
        if kind in MASK_NAMES and path != case.mask
    ]
    return replace(case, notes=(*notes, *step_note)), left_out


def _one_step(name: str, files: Files) -> tuple[Files, list[str], list[LeftOut]]:
    """The files of the first of the `STEPS` whose folders hold the case's images."""
    folders = {path.parent for kind, paths in files.items() if kind in IMAGES for path in paths}
    steps = sorted((one for one in folders if one.name.lower() in STEPS), key=step_order)
    if len(steps) < 2:
        return files, [], []
    first, unread = steps[0], steps[1:]
    kept: Files = {}
    left_out: list[LeftOut] = []
    told = [step.name for step in unread]
    for kind, paths in files.items():
        for path in paths:
            if path.parent not in unread:
                kept.setdefault(kind, []).append(path)
                continue
            left_out.append(LeftOut(path, f"the images are read from {first.name}"))
            if kind in ANNOTATIONS:
                told.append(f"{path.parent.name}/{path.name}")
    note = f"{name}: its images are those in {first.name}; not read: {', '.join(told)}."
    return kept, [note], left_out


def step_order(folder: Path) -> tuple[int, Path]:
    """A sort key for folders that are called after one of the `STEPS`."""
    return STEPS.index(folder.name.lower()), folder


def _preferred(name: str, kind: str, paths: Sequence[Path]) -> Path:
    first, *others = sorted(paths, key=preference)
    if others and preference(first) == preference(others[0]):
        raise AnomriError(
            f"{first} and {others[0]} are both {kind} of case {name}; keep one of them or, if they"
            " are of two scans, call these differently or name them in a TSV."
        )
    return first


def _check_same_image(annotation: Path, chosen: Mapping[str, Path], files: Files) -> None:
    """Raise `AnomriError` if a mask or label is called after an image that is not taken.

    Only if that image lies on another grid, as its name says.
    """
    for kind, paths in files.items():
        if kind in ANNOTATIONS:
            continue
        taken = bare_name(chosen[kind])
        others = [bare_name(path) for path in paths if path != chosen[kind]]
        named = [name for name in (taken, *others) if bare_name(annotation).startswith(f"{name}_")]
        owner = max(named, key=len, default=taken)
        if MOVED.findall(owner) != MOVED.findall(taken):
            raise AnomriError(
                f"{annotation}: belongs to {owner}, but {chosen[kind].name} is taken for {kind};"
                " keep one of these images, or name the files in a .tsv."
            )


def _is_label_of_folder(case: Case) -> bool:
    """Whether the label is not called after the case, though the images are."""
    if case.label is None or case.name in case.label.name:
        return False
    return all(case.name in path.name for path in case.channels.values())
