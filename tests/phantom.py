"""A brain of ellipsoids given by where it lies in mm, so that it can be scanned on any grid; and
detectors without training."""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from anomri.methods import registry as methods
from anomri.model.detector import Detector
from anomri.spec import ModelSpec, Thresholds

LESION_MM = (28.0, -14.0, 22.0)
RADIUS_MM = 14.0


def thresholding(*channels: str) -> Detector:
    """The method without training, with a threshold: the brightest 1 % of a scan."""
    rates = Thresholds((0.01,), (0.99,), 0.01, 1, 1)
    spec = ModelSpec(channels or ("flair",), "thresholding", thresholds=rates)
    return Detector(spec, methods.build(spec))


def places(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Voxel centres in mm (x, y, z, 3)."""
    return nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))


def scan(
    shape: Sequence[int], affine: np.ndarray, lesion: Sequence[float] = LESION_MM, seed: int = 0
) -> np.ndarray:
    """A brain of 130 x 165 x 120 mm around the origin with a bright lesion, on a grid (x, y, z)
    float64, up to 1000."""
    where = places(shape, affine)
    inside = ((where / [65, 82, 60]) ** 2).sum(-1) < 1
    noise = np.random.default_rng(seed).normal(0, 12, shape)
    bright = ((where - np.asarray(lesion)) ** 2).sum(-1) < RADIUS_MM**2
    return np.where(
        inside, np.clip(500 + 60 * np.sin(where[..., 0] / 15) + 350 * bright + noise, 5, 1000), 0
    )


def found_mm(path: Path) -> np.ndarray:
    """The centre in scanner mm of the largest lesion in a mask on disk, by the file's own
    header."""
    from scipy import ndimage

    image = nib.load(path)
    parts, _ = ndimage.label(np.asanyarray(image.dataobj) > 0, np.ones((3, 3, 3)))
    largest = np.argmax(np.bincount(parts.ravel())[1:]) + 1
    return nib.affines.apply_affine(image.affine, ndimage.center_of_mass(parts == largest))
