"""Scans that still have their skull: telling them from brains, and taking it off with the tools people use."""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

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
"""No brain is larger, with all its fluid; 28 patients with tumours reach 1,750 ml, a head has 3,000 to 6,000."""
MAX_SLICE_MM2 = 22_500.0
"""No axial slice of a brain is larger: those patients reach 19,900 mm2; for a field that shows part of a head."""
MAX_FILLED = 0.75
"""No brain fills more of the field: an ellipsoid fills 0.52 of the box around it; where air is not zero, all is filled."""
TOOLS = ("mri_synthstrip", "hd-bet")
"""Programs that are called if they are on the path, the first found; made for scans of any contrast."""


def has_skull(volume: Volume) -> tuple[str, str] | None:
    """The first channel that is a whole head, not a brain alone, and what says so; ``None`` if none is.

    An image is a head if what is not zero in it has more volume than a brain, a larger axial slice, or fills the field.
    Where air is noise, not zero, all three hold.
    """
    for name, channel in zip(volume.channels, volume.inside, strict=True):
        if found := _head(channel > 0, volume.geometry):
            return name, found
    return None


def _head(inside: NDArray[np.bool_], geometry: Geometry) -> str | None:
    across, down, _ = geometry.spacing_mm
    above = int(np.count_nonzero(inside))
    millilitres = above * geometry.voxel_mm3 / 1000
    filled = above / math.prod(geometry.canonical_shape)
    if millilitres > MAX_BRAIN_ML:
        return f"{millilitres:,.0f} ml of it are above zero, and no brain has more than {MAX_BRAIN_ML:,.0f} ml"
    # Slices take longest to count, and those of most brains fit into a box that is small enough.
    if math.prod(inside.shape[:2]) * across * down > MAX_SLICE_MM2:
        widest = float(np.count_nonzero(inside, axis=(0, 1)).max()) * across * down
        if widest > MAX_SLICE_MM2:
            return f"a slice of it is above zero over {widest / 100:,.0f} cm2, and a brain's over {MAX_SLICE_MM2 / 100:.0f} at most"
    if filled > MAX_FILLED and millilitres > MIN_BRAIN_ML:
        return f"{filled:.0%} of its voxels are above zero: the air around the head is not zero"
    return None


def check_skull(case: Case, volume: Volume) -> None:
    """Raise the `refusal` of a scan that plainly has its skull, unless a mask says where its brain is."""
    if case.mask is None and (found := has_skull(volume)):
        raise refusal(case.name, case.channels[found[0]], found[1])


def refusal(name: str, path: Path, found: str) -> AnomriError:
    """The error for a scan with skull, with the commands that take it off."""
    stem = bare_name(path)
    head, brain, mask = map(shlex.quote, (path.name, f"{stem}_brain.nii.gz", f"{stem}_mask.nii.gz"))
    return AnomriError(
        f"{path}: {name} still has its skull ({found}); a model of brains would mark all of it. Give the brain alone, by "
        f"one of\n  anomri detect ... --skull-strip          (deepbet: {install_command('bet')})"
        f"\n  hd-bet -i {head} -o {brain}"
        f"\n  mri_synthstrip -i {head} -o {brain} -m {mask}"
        f"\nor name the mask of its brain with --brain-mask, or lay it beside the scan as <case>_mask.nii.gz "
        f"and give the folder of both with -i."
    )


def brain_mask(volume: Volume) -> tuple[NDArray[np.bool_], str]:
    """The brain (x, y, z) in the first channel of a scan, and the tool that found it.

    SynthStrip or HD-BET if one is installed, else deepbet, whose weights come with it. Raises `AnomriError` if none
    is there, if the tool fails, or if what it finds is no brain by its volume.
    """
    geometry = volume.geometry
    head = nib.Nifti1Image(volume.channel(0), geometry.canonical_affine)
    tool = next((name for name in TOOLS if shutil.which(name)), None)
    mask = _by_program(tool, head, volume.name) if tool else _by_deepbet(head, volume.name)
    millilitres = float(mask.sum()) * geometry.voxel_mm3 / 1000
    if not MIN_BRAIN_ML <= millilitres <= MAX_BRAIN_ML:
        raise AnomriError(
            f"{volume.name}: {tool or 'deepbet'} finds a brain of {millilitres:,.0f} ml in channel {volume.channels[0]}, "
            f"which is none. Strip the skull with another tool, look at the mask, and name it with --brain-mask."
        )
    return mask, tool or "deepbet"


def _by_deepbet(head: nib.Nifti1Image, name: str) -> NDArray[np.bool_]:
    library = import_extra("deepbet.bet", "bet", "--skull-strip")
    try:
        with warnings.catch_warnings():
            # torch calls the format of its weights deprecated.
            warnings.simplefilter("ignore")
            _, mask, _ = library.BrainExtraction(no_gpu=True).run(head)
    except (
        Exception
    ) as error:  # it raises an assertion, or what torch raises, where it sees no brain
        raise AnomriError(
            f"{name}: deepbet finds no brain ({first_line(error)}). Name a mask of the brain with --brain-mask."
        ) from error
    return np.asanyarray(mask.dataobj) > 0


def _by_program(tool: str, head: nib.Nifti1Image, name: str) -> NDArray[np.bool_]:
    with tempfile.TemporaryDirectory() as folder:
        source, brain, mask = (
            Path(folder) / f"{what}.nii.gz" for what in ("head", "brain", "mask")
        )
        nib.save(head, source)
        command = [tool, "-i", str(source), "-o", str(brain)]
        command += ["-m", str(mask)] if tool == "mri_synthstrip" else _hd_bet_device()
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            # HD-BET names its mask differently from version to version; the brain itself is the same in all.
            return np.asanyarray(read_image(mask if mask.exists() else brain).dataobj) != 0
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise AnomriError(
                f"{name}: {tool} failed ({said[-1] if said else 'without a word'}). Run it by hand and name its mask with "
                f"--brain-mask."
            ) from error


def _hd_bet_device() -> list[str]:
    import torch

    return [] if torch.cuda.is_available() else ["-device", "cpu"]
