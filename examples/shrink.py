"""Make the example scan from the published one: cropped to the head, 8 bits, T2 half as fine.

python examples/shrink.py ms01_flair.nii.gz ms01_t1.nii.gz ms01_t2.nii.gz examples/ms01
"""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np

FINEST_MM = 0.7
"""Pixels that are finer are averaged two by two."""
MARGIN = 4
"""Voxels of air that stay around the head."""
BRIGHTEST = 99.9
"""The percentile of the head that becomes 255."""


def shrink(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """The image with its head, its place in scanner space and its intensities, to 8 bits."""
    data, affine = image.get_fdata(dtype=np.float32), image.affine
    if image.header.get_zooms()[0] < FINEST_MM:
        halved = data[: data.shape[0] // 2 * 2, : data.shape[1] // 2 * 2]
        data = (halved[::2, ::2] + halved[1::2, ::2] + halved[::2, 1::2] + halved[1::2, 1::2]) / 4
        affine = affine @ np.array([[2, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 1, 0], [0, 0, 0, 1]])
    shown = np.argwhere((data > 0).any(axis=2))
    first = np.maximum(shown.min(axis=0) - MARGIN, 0)
    last = shown.max(axis=0) + MARGIN + 1
    data = data[first[0] : last[0], first[1] : last[1]]
    affine = affine @ nib.affines.from_matvec(np.eye(3), [*first, 0])
    slope = float(np.percentile(data[data > 0], BRIGHTEST)) / 255
    # The image is made anew, so that nothing of the old header stays but place and voxel size.
    small = nib.Nifti1Image(np.clip(np.rint(data / slope), 0, 255).astype(np.uint8), affine)
    small.header.set_slope_inter(slope, 0)
    small.set_sform(affine, code=1)
    small.set_qform(affine, code=1)
    small.header.set_xyzt_units("mm")
    return small


if __name__ == "__main__":
    *sources, target = map(Path, sys.argv[1:])
    for source in sources:
        nib.save(shrink(nib.load(source)), target / source.name)
