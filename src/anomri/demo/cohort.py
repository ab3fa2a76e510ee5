"""A synthetic cohort that looks like brain MRI, made offline from the MNI152 template.

It serves the demo and the tests. Each subject is the template's tissue, warped at random, given
the intensities of four MR contrasts, and degraded as by a scanner. Coordinates are those of the
template, in mm: x to the right, y to the front, z to the top.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from anomri.files import output_folder, write_text
from anomri.optional import import_extra
from anomri.scans.case import Case
from anomri.scans.nifti import write_image
from anomri.scans.splits import write_splits

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Images = dict[str, Array]
Axes = tuple[Array, Array, Array]

FIELD_MM = 240.0  # width of the square axial field of view
BOTTOM_MM, TOP_MM, SLICE_MM = -80.0, 92.0, 2.0  # first slice, end and spacing of the slices
BLUR = (
    0.35  # deviation of the Gaussian that stands for the size of a voxel, as a share of its width
)
TEMPLATE_BOX = np.s_[20:177, 21:213, 0:161]  # voxels of the template around its brain
TEMPLATE_ORIGIN = (98 - 20, 134 - 21, 72)  # the voxel among them that lies at 0, 0, 0 mm
INFARCT_SHARE = 0.2  # of the lesions are old infarcts; the others are tumours

# Intensity of CSF, grey and white matter; weights of the template's own T1 detail and of vessels,
# which contrast agent brightens and flow darkens on T2.
CONTRASTS = {
    "flair": (0.20, 0.76, 0.62, -0.5, 0.0),
    "t1": (0.27, 0.63, 0.88, 1.0, 0.05),
    "t1ce": (0.29, 0.66, 0.88, 0.9, 1.1),
    "t2": (1.25, 0.62, 0.43, -0.7, -0.45),
}
# Additions at full strength in oedema, solid core, enhancing rim and necrosis of a tumour ...
TUMOUR = {
    "flair": (0.34, 0.26, 0.20, 0.0),
    "t1": (-0.20, -0.27, -0.18, -0.42),
    "t1ce": (-0.20, -0.15, 0.55, -0.40),
    "t2": (0.42, 0.33, 0.25, 0.62),
}
# ... and in gliosis (twice: all around and next to the cavity), nothing, and the cavity of an
# infarct.
INFARCT = {
    "flair": (0.28, 0.28, 0.0, -0.40),
    "t1": (-0.15, -0.15, 0.0, -0.55),
    "t1ce": (-0.15, -0.15, 0.0, -0.55),
    "t2": (0.25, 0.25, 0.0, 0.75),
}

README = """\
These images are SYNTHETIC. They show no person and must not be used for medical or scientific
conclusions. anomri made them from the MNI152 average brain that comes with nilearn (T1 image,
grey-matter and white-matter maps, brain mask): tissue maps are warped at random, turned into
FLAIR, T1, T1ce and T2 intensities, and given a bias field and noise. Lesions are random shapes;
<case>_seg.nii.gz holds their outlines (1 = lesion). splits.csv names the healthy cases for
training and validation, and the cases with lesions for testing.

The template is the ICBM 152 nonlinear atlas, release 2009a, used and modified under its licence:
Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological
Institute, McGill University. Permission to use, copy, modify, and distribute this software and its
documentation for any purpose and without fee is hereby granted, provided that the above copyright
notice appear in all copies. The authors and McGill University make no representations about the
suitability of this software for any purpose. It is provided "as is" without express or implied
warranty. The authors are not responsible for any data loss, equipment damage, property loss, or
injury to subjects or patients resulting from the use or misuse of this software package.
Please cite: Fonov V, Evans AC, Botteron K, Almli CR, McKinstry RC, Collins DL. Unbiased average
age-appropriate atlases for pediatric studies. NeuroImage 54(1):313-327, 2011.
doi:10.1016/j.neuroimage.2010.07.033
"""


@dataclass(frozen=True)
class Lesion:
    """A random lesion: index of its central voxel, radius in mm, strengths without unit."""

    voxel: tuple[int, int, int]
    radius: float
    infarct: bool
    contrast: float
    enhancement: float
    necrosis: float


def make_cohort(
    folder: Path,
    *,
    healthy: int = 12,
    lesioned: int = 6,
    seed: int = 0,
    spacing_mm: float = 1.875,
    progress: Callable[[str], None] | None = None,
) -> list[str]:
    """Write a cohort in the BraTS layout, with ``splits.csv`` and ``README.txt``; returns its
    names.

    The last two healthy cases are for validation, the others for training (always the first one).
    Cases with lesions are for testing; only they have a ``_seg`` file. A case depends on ``seed``
    and its own name alone. ``progress`` is called with the name of each case that is written.
    """
    output_folder(folder)
    plan = [("healthy", number) for number in range(1, healthy + 1)]
    plan += [("lesion", number) for number in range(1, lesioned + 1)]
    names = []
    template_maps(BLUR * spacing_mm)  # once, before the threads ask for it
    # Two at a time: interpolation and compression release the interpreter's lock, and memory stays
    # below 1 GB.
    with ThreadPoolExecutor(2) as pool:
        for name in pool.map(partial(_write_case, folder, seed, spacing_mm), plan):
            names.append(name)
            if progress is not None:
                progress(name)
    validation = names[max(1, healthy - 2) : healthy]
    splits = dict.fromkeys(names[:healthy], "train") | dict.fromkeys(validation, "val")
    write_splits(
        folder / "splits.csv", [Case(name, {}, split=splits.get(name, "test")) for name in names]
    )
    write_text(folder / "README.txt", README)
    return names


def make_one(folder: Path, *, seed: int = 0, spacing_mm: float = 1.875) -> Path:
    """Write one case with a lesion, the same as in `make_cohort`; returns its folder."""
    return folder / _write_case(output_folder(folder), seed, spacing_mm, ("lesion", 1))


def make_subject(
    rng: Generator, *, lesions: bool, spacing_mm: float
) -> tuple[Images, Mask, NDArray[np.float64]]:
    """Make one subject: images by channel, lesion label and affine, all on an axial LPS grid.

    Images are (x, y, z) float32 with whole numbers, at least 1 in the brain and 0 outside it. The
    label is bool. The affine (4, 4) takes voxel indices to mm. In-plane spacing is the nearest to
    ``spacing_mm`` that divides the field of view; slices are 2 mm apart, or ``spacing_mm`` if that
    is more.
    """
    axes, affine = voxel_grid(spacing_mm)
    maps = template_maps(BLUR * spacing_mm)
    points = warp(rng, axes)
    drawn = draw_lesions(rng, sample(maps["wm"], points), axes) if lesions else []
    for lesion in drawn:
        if not lesion.infarct:  # a tumour takes up room and pushes the tissue away
            scale_about(points, [axis[lesion.voxel] for axis in points], 2.2 * lesion.radius, 0.3)
    brain = sample(maps["brain"], points) > 0.5 + 0.1 * smooth_noise(rng, axes, 12).clip(-3, 3)
    tissue = {
        name: sample(volume, points, brain) for name, volume in maps.items() if name != "brain"
    }
    vessels = draw_vessels(rng, axes, points, tissue)
    images = mix_contrasts(rng, axes, tissue, vessels)
    label = np.zeros(brain.shape, dtype=bool)
    for lesion in drawn:
        label |= paint_lesion(rng, axes, images, tissue, lesion)
    for image in images.values():
        acquire(rng, axes, image, brain)
    return images, label & brain, affine


def voxel_grid(spacing_mm: float) -> tuple[Axes, NDArray[np.float64]]:
    """An axial LPS grid over the template: coordinates along its axes in mm, and its affine (4,
    4)."""
    width = max(8, round(FIELD_MM / spacing_mm))
    pixel, step = FIELD_MM / width, max(SLICE_MM, spacing_mm)
    depth = round((TOP_MM - BOTTOM_MM) / step)
    # The brain is in the middle of the field of view; the template's middle is 18 mm behind its
    # origin.
    affine = np.diag([-pixel, -pixel, step, 1.0])
    affine[:3, 3] = (FIELD_MM - pixel) / 2, (FIELD_MM - pixel) / 2 - 18, BOTTOM_MM
    x, y, z = (
        affine[i, 3] + affine[i, i] * np.arange(n) for i, n in enumerate((width, width, depth))
    )
    return (x.astype(np.float32), y.astype(np.float32), z.astype(np.float32)), affine


@lru_cache(maxsize=2)
def template_maps(blur_mm: float) -> Images:
    """Maps of the template on its 1 mm grid, (x, y, z) float32, blurred by a Gaussian of
    ``blur_mm``.

    They are the fractions of CSF (``csf``), grey (``gm``) and white matter (``wm``), the rest of
    the T1 image (``detail``), CSF deep in the brain (``ventricles``) and the brain mask
    (``brain``).
    """
    datasets = import_extra("nilearn.datasets", "demo", "the synthetic cohort")
    loaders = (
        datasets.load_mni152_template,
        datasets.load_mni152_gm_template,
        datasets.load_mni152_wm_template,
        datasets.load_mni152_brain_mask,
    )
    t1, gm, wm, brain = (
        np.asarray(load(resolution=1).dataobj, np.float32)[TEMPLATE_BOX] for load in loaders
    )
    # An average of many brains loses the sulci in the tissue maps, but T1 is still dark there.
    csf = np.maximum(brain - gm - wm, np.clip((0.59 - t1) / 0.27, 0, 1) * brain)
    sharp = np.stack([csf, gm, wm]).clip(0, 1) ** 2
    csf, gm, wm = sharp / np.maximum(sharp.sum(axis=0), 1e-6)
    detail = (t1 - (0.28 * csf + 0.65 * gm + 0.87 * wm)).clip(-0.12, 0.12) * brain
    ventricles = csf * (ndimage.distance_transform_edt(brain) > 28)
    maps = {"csf": csf, "gm": gm, "wm": wm, "detail": detail, "ventricles": ventricles}
    maps = {name: ndimage.gaussian_filter(volume, blur_mm) for name, volume in maps.items()}
    return maps | {"brain": ndimage.gaussian_filter(brain, 2.0)}


def smooth_noise(rng: Generator, axes: Axes, scale_mm: float) -> Array:
    """A smooth Gaussian random field, (x, y, z) float32: mean 0, deviation 1, detail
    ``scale_mm``."""
    weights = []
    for axis in axes:
        knots = np.arange(
            axis.min() - 3 * scale_mm, axis.max() + 3 * scale_mm, scale_mm, dtype=np.float32
        )
        kernel = np.exp(-0.5 * ((axis[:, None] - knots) / (0.8 * scale_mm)) ** 2)
        weights.append(kernel / np.sqrt((kernel**2).sum(axis=1, keepdims=True)))
    field = rng.standard_normal([kernel.shape[1] for kernel in weights], dtype=np.float32)
    # Separable: a product for each axis, the whole grid last, is much faster than interpolation.
    along_x, along_y, along_z = weights
    field = np.matmul(along_y, field @ along_z.T)
    return np.asarray(along_x @ field.reshape(len(field), -1), np.float32).reshape(
        [len(axis) for axis in axes]
    )


def warp(rng: Generator, axes: Axes) -> Array:
    """Draw where in the template each voxel of a subject lies: (3, x, y, z) float32, in mm."""
    # On average 5 % smaller than the template, which is larger than most brains.
    matrix = np.diag(rng.normal(1.05, 0.035, 3).clip(0.98, 1.12)) + rng.normal(
        0, 0.03, (3, 3)
    ).clip(-0.06, 0.06)
    shift = rng.normal(0, 3, 3) * (1, 1, 0.5)
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    # Folds differ between people more than the smooth inside of the skull: damp the warp towards
    # it.
    outwards = np.sqrt((x / 72) ** 2 + ((y + 18) / 90) ** 2 + ((z - 6) / 76) ** 2)
    amplitude = (2.4 * (1 - (outwards - 0.75) / 0.3)).clip(0.5, 2.4)
    points = np.empty((3, *(len(axis) for axis in axes)), dtype=np.float32)
    for i in range(3):
        row = matrix[i].astype(np.float32)
        points[i] = (
            row[0] * x + row[1] * (y + 18) + row[2] * z + np.float32(shift[i] - 18 * (i == 1))
        )
        points[i] += 2.5 * smooth_noise(rng, axes, 60) + amplitude * smooth_noise(rng, axes, 13)
    # Ventricles: sampling nearer to their centres makes them wider; each side has its own width.
    common = rng.uniform(-0.25, 0.4)
    for side in (-1, 1):
        scale_about(points, (14.0 * side, -14.0, 14.0), 26.0, common + rng.normal(0, 0.06))
    return points


def scale_about(points: Array, centre: ArrayLike, reach: float, strength: float) -> None:
    """Magnify ``points`` in place: by 1 / (1 - ``strength``) at ``centre``, less over ``reach``
    mm."""
    offset = points - np.asarray(centre, dtype=np.float32)[:, None, None, None]
    falloff = np.exp(-np.square(offset).sum(axis=0) / np.float32(2 * (reach / 2) ** 2))
    points -= np.float32(strength) * falloff * offset


def sample(volume: Array, points: Array, where: Mask | None = None) -> Array:
    """Interpolate a map at ``points`` (3, x, y, z) in mm: (x, y, z) float32.

    The result is zero outside the map and outside ``where``.
    """
    inside = np.ones(points.shape[1:], dtype=bool) if where is None else where
    voxels = points[:, inside] + np.array(TEMPLATE_ORIGIN, dtype=np.float32)[:, None]
    values = np.zeros(inside.shape, dtype=np.float32)
    values[inside] = ndimage.map_coordinates(volume, voxels, order=1, output=np.float32)
    return values


def draw_lesions(rng: Generator, wm: Array, axes: Axes) -> list[Lesion]:
    """Draw one to three separate lesions with centres in the white matter ``wm`` (x, y, z)."""
    voxels = np.argwhere((wm > 0.8) & (axes[2] > -40))
    places = np.stack([axis[index] for axis, index in zip(axes, voxels.T, strict=True)], axis=1)
    free = np.full(len(places), np.inf)
    lesions: list[Lesion] = []
    for _ in range(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15])):
        # Log-uniform from 5 to 25 mm, the first at least 11 mm: small lesions mostly accompany a
        # large one.
        radius = float(
            np.exp(rng.uniform(np.log(5 if lesions else 11), np.log(14 if lesions else 25)))
        )
        choice = np.flatnonzero(free > radius + 5)
        if not len(choice):
            break
        here = rng.choice(choice)
        free = np.minimum(free, np.linalg.norm(places - places[here], axis=1) - radius)
        infarct = bool(rng.random() < INFARCT_SHARE)
        enhancement = 0.0 if infarct else rng.uniform(0.4, 1.1) * (rng.random() < 0.7)
        necrosis = 1.0 if infarct else rng.uniform(0.5, 1.0) * (radius > 11) * (rng.random() < 0.7)
        i, j, k = (int(index) for index in voxels[here])
        lesions.append(
            Lesion((i, j, k), radius, infarct, rng.uniform(0.7, 1.1), enhancement, necrosis)
        )
    return lesions


def paint_lesion(
    rng: Generator, axes: Axes, images: Images, tissue: Images, lesion: Lesion
) -> Mask:
    """Add a lesion to ``images`` in place, and return its outline, (x, y, z) bool."""
    offsets = (axis - axis[index] for axis, index in zip(axes, lesion.voxel, strict=True))
    x, y, z = np.meshgrid(*offsets, indexing="ij", sparse=True)
    away = np.sqrt(x**2 + y**2 + z**2) / np.float32(lesion.radius)
    # Bounded, so that the centre always belongs to the lesion. Oedema spreads along white matter.
    ragged = smooth_noise(rng, axes, max(5.0, 0.5 * lesion.radius)).clip(-2, 2)
    depth = (
        1
        - away
        + 0.28 * ragged * (1.8 - away).clip(0, 1)
        + 0.25 * (tissue["wm"] - tissue["gm"]).clip(-1, 0.2)
    )
    core_size, rim_mm = (0.7, 1.5) if lesion.infarct else (0.5, 3.5)
    core_depth = core_size - away + 0.1 * ragged + 0.1 * smooth_noise(rng, axes, 6).clip(-2, 2)
    core = soft_step(core_depth * lesion.radius, 0.7)
    spared = (1.4 - 1.6 * tissue["csf"]).clip(0, 1)
    whole = np.maximum(soft_step(depth * lesion.radius, 1.2) * spared, core)
    inner = soft_step(core_depth * lesion.radius - rim_mm, 0.7)
    rim, oedema = core - inner, whole - core
    uneven = lesion.contrast * (1 + 0.12 * smooth_noise(rng, axes, 6))
    for channel, image in images.items():
        swollen, solid, bright, dead = (INFARCT if lesion.infarct else TUMOUR)[channel]
        shell = solid + lesion.enhancement * (bright - solid)
        centre = shell + lesion.necrosis * (dead - shell)
        image += (swollen * oedema + shell * rim + centre * inner) * uneven
        np.maximum(image, 0.2, out=image)  # no darker than CSF
    return np.asarray(whole > 0.5)


def soft_step(depth_mm: Array, width_mm: float) -> Array:
    """Rise from 0 to 1 where ``depth_mm`` passes zero, over about four ``width_mm``."""
    return np.asarray(0.5 + 0.5 * np.tanh(depth_mm / (2 * width_mm)), dtype=np.float32)


def draw_vessels(rng: Generator, axes: Axes, points: Array, tissue: Images) -> Array:
    """Draw veins, midline sinuses and choroid plexus, which take up contrast agent.

    Returns (x, y, z) float32 from 0 to 1.
    """
    scale = 14.0
    # Two random fields vanish together along curves, which run through space as vessels do.
    off_axis = smooth_noise(rng, axes, scale) ** 2 + smooth_noise(rng, axes, scale) ** 2
    veins = np.exp(-off_axis / (2 * (1.4 / scale) ** 2)) * (2 * tissue["csf"]).clip(0, 1)
    x, y, z = points
    midline = 0.4 * np.exp(-0.5 * (x / 1.5) ** 2) * tissue["csf"] * (1 - tissue["ventricles"])
    from_choroid = (np.abs(x) - 23) ** 2 / 5**2 + (y + 40) ** 2 / 7**2 + (z - 9) ** 2 / 6**2
    choroid = 0.8 * np.exp(-0.5 * from_choroid) * tissue["ventricles"]
    return np.asarray(np.maximum(np.maximum(veins, midline), choroid), dtype=np.float32)


def mix_contrasts(rng: Generator, axes: Axes, tissue: Images, vessels: Array) -> Images:
    """Mix tissue fractions into a noiseless image for each channel, (x, y, z) float32.

    White matter on T1 is near 0.9.
    """
    # Next to the ventricles healthy white matter is a little brighter on FLAIR and T2, more with
    # age.
    caps = (
        ndimage.gaussian_filter(tissue["ventricles"], 1.5) * tissue["wm"] * rng.uniform(0.05, 0.5)
    )
    regional = smooth_noise(rng, axes, 25) * (tissue["gm"] + tissue["wm"])
    images = {}
    for channel, weights in CONTRASTS.items():
        csf, gm, wm, detail, enhancement = (
            float(w) for w in weights * rng.normal(1, 0.035, 5).clip(0.93, 1.07)
        )
        image = csf * tissue["csf"] + gm * tissue["gm"] + wm * tissue["wm"]
        image += detail * tissue["detail"] + enhancement * vessels
        image *= (
            1
            + 0.02 * smooth_noise(rng, axes, 4)
            + 0.02 * smooth_noise(rng, axes, 9)
            + 0.03 * regional
        )
        if channel in ("flair", "t2"):
            image += caps
        images[channel] = np.asarray(image, dtype=np.float32)
    return images


def acquire(rng: Generator, axes: Axes, image: Array, brain: Mask) -> None:
    """Turn a noiseless image into a scan, in place: bias field, Rician noise, gain, whole
    numbers."""
    signal = (image * np.exp(rng.uniform(0.05, 0.15) * smooth_noise(rng, axes, 70)))[brain]
    deviation = np.float32(rng.uniform(0.012, 0.032))
    real, imaginary = deviation * rng.standard_normal((2, len(signal)), dtype=np.float32)
    # Scanners have no common unit: the gain spans two orders of magnitude, within what int16 holds.
    gain = np.exp(rng.uniform(np.log(150), np.log(12000)))
    image[:] = 0
    image[brain] = np.rint(np.hypot(signal + real, imaginary) * gain).clip(
        1, np.iinfo(np.int16).max
    )


def _write_case(folder: Path, seed: int, spacing_mm: float, planned: tuple[str, int]) -> str:
    kind, number = planned
    name = f"synthetic_{kind}_{number:03d}"
    lesions = kind == "lesion"
    rng = np.random.default_rng([seed, int(lesions), number])
    images, label, affine = make_subject(rng, lesions=lesions, spacing_mm=spacing_mm)
    files: dict[str, NDArray[Any]] = {
        channel: image.astype(np.int16) for channel, image in images.items()
    }
    if lesions:
        files["seg"] = label.astype(np.uint8)
    place = output_folder(folder / name)
    for ending, data in files.items():
        nifti = nib.Nifti1Image(data, affine)
        nifti.header.set_xyzt_units("mm")
        nifti.header["descrip"] = b"synthetic, not a patient"
        write_image(place / f"{name}_{ending}.nii.gz", nifti)
    return name
