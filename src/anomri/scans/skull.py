"""Skulls: finding scans that still have theirs, and removing it with the tools people use."""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError, first_line
from anomri.optional import import_extra, install_command
from anomri.scans.case import Case
from anomri.scans.geometry import Geometry
from anomri.scans.masks import MIN_BRAIN_ML
from anomri.scans.names import bare_name
from anomri.scans.nifti import read_image
from anomri.scans.volume import Volume

MAX_BRAIN_ML = 2200.0
"""No brain is larger with all its fluid: 28 patients with tumours reach 1,750 ml, a head has 3,000
to 6,000 ml."""
MAX_SLICE_MM2 = 22_500.0
"""No axial slice of a brain is larger: those patients reach 19,900 mm2. For parts of a head."""
MAX_FILLED = 0.75
"""No brain fills more of the field: an ellipsoid fills 0.52 of its box. For noisy air."""
TOOLS = ("mri_synthstrip", "hd-bet")
"""Programs for scans of any contrast; the first that is on the path is used."""

MAX_UNCOVERED = 0.02
"""T1 covers a head if it is zero in no more than this share of what the first channel shows."""
_CAUTIONS = {
    "flair": (
        " deepbet was made for T1: in FLAIR it leaves out about 3% of what it finds in T1, mostly "
        "fluid at the rim."
    ),
    "t2": (
        " deepbet was made for T1: in T2 it adds up to 4% to what it finds in T1, such as marrow and "
        "parts of the eyes, so look at findings there twice."
    ),
}
"""What a mask is worth that deepbet finds in another contrast than T1; `benchmarks/skulls.py`
measures it."""


def find_skull(volume: Volume) -> tuple[str, str] | None:
    """The first channel that shows a whole head, and the evidence; ``None`` if all show a brain.

    A head has a larger volume above zero than a brain, a larger axial slice, or fills the field. If
    the air around the head is noise, all three hold.
    """
    for name, channel in zip(volume.channels, volume.inside, strict=True):
        evidence = _evidence_of_head(channel > 0, volume.geometry)
        if evidence:
            return name, evidence
    return None


def check_skull(case: Case, volume: Volume) -> None:
    """Raise `AnomriError` if a scan has its skull, also within the case's brain mask."""
    found = find_skull(volume)
    if found is None:
        return
    channel, evidence = found
    if case.mask is None:
        raise skull_error(case.name, case.channels[channel], evidence)
    raise AnomriError(
        f"{case.mask}: takes in more than the brain of {case.name}: within it {channel} still has "
        f"its skull ({evidence}). Give a mask of the brain alone, or leave the mask out and use "
        f"--skull-strip."
    )


def skull_error(name: str, path: Path, evidence: str) -> AnomriError:
    """The error for a scan with its skull, with the commands that remove it."""
    stem = bare_name(path)
    head, brain, mask = map(shlex.quote, (path.name, f"{stem}_brain.nii.gz", f"{stem}_mask.nii.gz"))
    return AnomriError(
        f"{path}: {name} still has its skull ({evidence}); a model of brains would mark all of it. "
        f"Remove the skull with one of\n"
        f"  anomri detect ... --skull-strip          (deepbet: {install_command('bet')})\n"
        f"  hd-bet -i {head} -o {brain}\n"
        f"  mri_synthstrip -i {head} -o {brain} -m {mask}\n"
        f"or give a mask of the brain with --brain-mask, or put it beside the scan as "
        f"<case>_mask.nii.gz and give the folder of both with -i."
    )


def find_brain(volume: Volume) -> tuple[NDArray[np.bool_], str]:
    """The brain (x, y, z) in a scan, and a note that says which tool found it in which channel.

    SynthStrip or HD-BET, which take any contrast, look at the first channel. Without them deepbet,
    which contains its weights, looks at T1 if there is one, and at the first channel for brain that
    T1 does not cover. Raises `AnomriError` if no tool is installed, if it fails, or if its result
    is no brain by its volume.
    """
    tool = _find_program() or "deepbet"
    number = volume.channels.index("t1") if tool == "deepbet" and "t1" in volume.channels else 0
    mask = find_in_channel(volume, number, tool)
    note = f"the brain was found by {tool} in channel {volume.channels[number]}"
    beyond = _beyond_channel(volume, number)
    if beyond is not None:
        added = beyond & find_in_channel(volume, 0, tool)
        added_ml = float(added.sum()) * volume.geometry.voxel_mm3 / 1000
        if added_ml >= 1:  # else it is only the air that differs
            mask = mask | added
            note += (
                f", and in {volume.channels[0]} where {volume.channels[number]} does not reach "
                f"({added_ml:,.0f} ml of it)"
            )
    note += f": {mask.sum() * volume.geometry.voxel_mm3 / 1000:,.0f} ml."
    if tool == "deepbet":
        note += _CAUTIONS.get(volume.channels[number], "")
    return mask, note


def _beyond_channel(volume: Volume, number: int) -> NDArray[np.bool_] | None:
    """Where (x, y, z) a channel is zero; ``None`` if it covers nearly all of the first channel."""
    missing = volume.channel(number) == 0
    head = volume.channel(0) > 0
    if np.count_nonzero(missing & head) <= MAX_UNCOVERED * np.count_nonzero(head):
        return None
    return missing


def find_in_channel(volume: Volume, number: int, tool: str) -> NDArray[np.bool_]:
    """The brain (x, y, z) that a tool finds in one channel; raises `AnomriError` if it is none."""
    geometry = volume.geometry
    head = nib.Nifti1Image(volume.channel(number), geometry.canonical_affine)
    if tool == "deepbet":
        mask = _run_deepbet(head, volume.name)
    else:
        mask = _run_program(tool, head, volume.name)
    millilitres = float(mask.sum()) * geometry.voxel_mm3 / 1000
    if not MIN_BRAIN_ML <= millilitres <= MAX_BRAIN_ML:
        raise AnomriError(
            f"{volume.name}: {tool} finds a brain of {millilitres:,.0f} ml in channel "
            f"{volume.channels[number]}; a brain has {MIN_BRAIN_ML:,.0f} to {MAX_BRAIN_ML:,.0f} ml. "
            f"Strip the skull with another tool, look at its mask, and give it with --brain-mask."
        )
    return mask


def check_skull_strippers() -> None:
    """Raise `AnomriError` if no tool is installed that finds the brain."""
    if _find_program() is None:
        _import_deepbet()


def _find_program() -> str | None:
    return next((name for name in TOOLS if shutil.which(name)), None)


def _import_deepbet() -> Any:
    return import_extra("deepbet.bet", "bet", "--skull-strip")


def _evidence_of_head(inside: NDArray[np.bool_], geometry: Geometry) -> str | None:
    across, down, _ = geometry.spacing_mm
    above_zero = int(np.count_nonzero(inside))
    millilitres = above_zero * geometry.voxel_mm3 / 1000
    filled = above_zero / math.prod(geometry.canonical_shape)
    if millilitres > MAX_BRAIN_ML:
        return f"{millilitres:,.0f} ml are above zero; a brain has at most {MAX_BRAIN_ML:,.0f} ml"
    # Counting slices takes longest, and the box of most brains is too small for a large slice.
    if math.prod(inside.shape[:2]) * across * down > MAX_SLICE_MM2:
        widest_mm2 = float(np.count_nonzero(inside, axis=(0, 1)).max()) * across * down
        if widest_mm2 > MAX_SLICE_MM2:
            return (
                f"a slice is above zero over {widest_mm2 / 100:,.0f} cm2; one of a brain is so "
                f"over {MAX_SLICE_MM2 / 100:.0f} cm2 at most"
            )
    if filled > MAX_FILLED and millilitres > MIN_BRAIN_ML:
        return f"{filled:.0%} of its voxels are above zero: the air around the head is not zero"
    return None


def _run_deepbet(head: nib.Nifti1Image, name: str) -> NDArray[np.bool_]:
    library = _import_deepbet()
    try:
        with warnings.catch_warnings():
            # torch calls the format of its weights deprecated.
            warnings.simplefilter("ignore")
            _, mask, _ = library.BrainExtraction(no_gpu=True).run(head)
    except Exception as error:  # where it sees no brain it raises an assertion or an error of torch
        raise AnomriError(
            f"{name}: deepbet finds no brain ({first_line(error)}). Give a mask of the brain with "
            f"--brain-mask."
        ) from error
    return np.asanyarray(mask.dataobj) > 0


def _run_program(tool: str, head: nib.Nifti1Image, name: str) -> NDArray[np.bool_]:
    with tempfile.TemporaryDirectory() as folder:
        source, brain, mask = (
            Path(folder) / f"{what}.nii.gz" for what in ("head", "brain", "mask")
        )
        nib.save(head, source)
        command = [tool, "-i", str(source), "-o", str(brain)]
        command += ["-m", str(mask)] if tool == "mri_synthstrip" else _hd_bet_device()
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            # HD-BET names its mask differently from version to version, but not the brain.
            found = read_image(mask if mask.exists() else brain)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise AnomriError(
                f"{name}: {tool} failed ({lines[-1] if lines else 'without a message'}). Run it by "
                f"hand and give its mask with --brain-mask."
            ) from error
    lies_on_head = found.shape == head.shape and np.allclose(found.affine, head.affine, atol=0.05)
    if not lies_on_head:
        raise AnomriError(
            f"{name}: {tool} gives a mask on another grid than the scan's. Run it by hand and give "
            f"its mask with --brain-mask."
        )
    return np.asanyarray(found.dataobj) != 0


def _hd_bet_device() -> list[str]:
    import torch

    return [] if torch.cuda.is_available() else ["-device", "cpu"]
