"""What deepbet's mask is worth in FLAIR and T2, against its mask in T1, on whole heads.

python benchmarks/skulls.py ../shared/data/whole_head
"""

import argparse
from pathlib import Path

import numpy as np

from anomri.scans.find import find_cases
from anomri.scans.read import read_volume
from anomri.scans.skull import find_in_channel

CHANNELS = ("t1", "flair", "t2")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heads", type=Path)
    for case in find_cases(parser.parse_args().heads):
        # The first channel gives the grid: that of the map, as in `anomri detect`.
        volume = read_volume(case, ("flair", "t1", "t2"), resampled=True)
        number = {name: volume.channels.index(name) for name in CHANNELS}
        masks = {name: find_in_channel(volume, number[name], "deepbet") for name in CHANNELS}
        covered = volume.channel(number["t1"]) > 0

        def ml(mask: np.ndarray, voxel_mm3: float = volume.geometry.voxel_mm3) -> str:
            return f"{mask.sum() * voxel_mm3 / 1000:,.0f} ml"

        print(f"{case.name}: T1 {ml(masks['t1'])}")
        for name in ("flair", "t2"):
            # Compared only where T1 shows something: its field may be smaller.
            one, t1 = masks[name] & covered, masks["t1"] & covered
            dice = 2 * (one & t1).sum() / (one.sum() + t1.sum())
            print(
                f"  {name}: {ml(masks[name])}, of it {ml(masks[name] & ~covered)} beyond T1; Dice "
                f"{dice:.3f}; lacks {ml(t1 & ~one)} of T1's mask, has {ml(one & ~t1)} more"
            )
