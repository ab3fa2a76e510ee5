"""Stack the previews of an evaluation into one picture with column titles: the README's figure.

python benchmarks/figure.py runs/accurate-test docs/brats18-test.png CASE [CASE ...]
"""

import sys
from pathlib import Path

import matplotlib
import matplotlib.image

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from anomri.reporting.pictures import COLUMNS


def main(result: str, target: str, *cases: str) -> None:
    rows = [
        matplotlib.image.imread(Path(result) / "previews" / f"{case}.row.jpg")[..., :3]
        for case in cases
    ]
    picture = np.concatenate(rows)
    height, width = picture.shape[:2]
    figure = plt.figure(figsize=(width / 100, height / 100 + 0.3), dpi=100, facecolor="black")
    axes = figure.add_axes((0, 0, 1, height / (height + 30)))
    axes.imshow(picture)
    axes.axis("off")
    panel = width / len(COLUMNS)
    for number, name in enumerate(("FLAIR", *COLUMNS[1:])):
        axes.text(
            (number + 0.5) * panel, -8, name, color="white", ha="center", va="bottom", fontsize=11
        )
    figure.savefig(target, facecolor="black")


if __name__ == "__main__":
    main(*sys.argv[1:])
