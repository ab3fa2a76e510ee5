"""The method as its description reads, in plain eager float32 and nothing clever: what every speed
is a ratio to.

Kascenas et al. 2022: every voxel above zero counts for the percentile, every slice is computed
whole (128 x 128), filters are standardised at every pass, the median is SciPy's, Dice is tried at
1,000 thresholds one after another.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

CHANNELS = ("flair", "t1", "t1ce", "t2")


class StandardisedConv(nn.Conv2d):
    """A 3 x 3 convolution whose filters have mean 0 and standard deviation 1 at every pass."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="reflect"), weight, self.bias)


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, each followed by Swish and group norm."""
    divisors = [k for k in range(1, outputs + 1) if outputs % k == 0]
    groups = divisors[len(divisors) // 2]
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [StandardisedConv(channels, outputs, 3), nn.SiLU(), nn.GroupNorm(groups, outputs)]
    return nn.Sequential(*layers)


class Network(nn.Module):
    """The published U-Net."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512)) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList([block(4, widths[0]), *(block(a, b) for a, b in pairs)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairs])
        self.join = nn.ModuleList([block(2 * a, a) for a, _ in pairs])
        self.last = nn.Conv2d(widths[0], 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 4, h, w) -> the same."""
        kept = []
        for level, down in enumerate(self.down):
            x = down(x if level == 0 else functional.avg_pool2d(x, 2))
            kept.append(x)
        for level in (2, 1, 0):
            x = self.join[level](torch.cat([self.up[level](x), kept[level]], 1))
        return self.last(x)


def prepare(folder: Path) -> tuple[Tensor, list[int], nib.Nifti1Image]:
    """A BraTS case as slices (n, 4, 128, 128), their places, and an image whose header a map can
    have."""
    volumes = []
    for channel in CHANNELS:
        image = nib.load(folder / f"{folder.name}_{channel}.nii.gz")
        data = image.get_fdata()
        volumes.append(data / np.percentile(data[data > 0], 99))
    volume = np.stack(volumes)
    places = [z for z in range(volume.shape[3]) if volume[..., z].mean(0).sum() > 0.5]
    places = list(range(places[0], places[-1] + 1))
    slices = torch.from_numpy(volume[..., places]).float().permute(3, 0, 1, 2)
    return functional.interpolate(slices, size=(128, 128), mode="bilinear"), places, image


def pack(folder: Path, out: Path) -> None:
    """Slices of a BraTS case and of its label, on disk for training."""
    slices, places, _ = prepare(folder)
    label = nib.load(folder / f"{folder.name}_seg.nii.gz").get_fdata() > 0
    label_slices = torch.from_numpy(label[None][..., places]).float().permute(3, 0, 1, 2)
    labels = functional.interpolate(label_slices, size=(128, 128), mode="bilinear") > 0.5
    np.savez(out, slices=slices.numpy(), labels=labels.numpy())


def score(network: Network, x: Tensor) -> NDArray[np.float32]:
    """The anomaly map (n, 128, 128) of a scan's slices, 16 at once."""
    with torch.no_grad():
        reconstruction = torch.cat([network(x[k : k + 16]) for k in range(0, len(x), 16)])
    residual = (x - reconstruction).abs().mean(1)
    foreground = (x.sum(1) > 0.01).float()
    inside = functional.avg_pool2d(foreground[:, None], 5, 1, 2)[:, 0] > 0.95
    return np.stack([ndimage.median_filter(one, 5) for one in (residual * inside).numpy()])


def detect(network: Network, folder: Path, out: Path) -> None:
    """From a case's files to a map on its grid."""
    x, places, image = prepare(folder)
    scores = torch.from_numpy(score(network, x))[:, None]
    whole = np.zeros(image.shape, np.float32)
    size = image.shape[:2]
    whole[..., places] = (
        functional.interpolate(scores, size=size, mode="bilinear")[:, 0].permute(1, 2, 0).numpy()
    )
    nib.save(nib.Nifti1Image(whole, image.affine), out)


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    """The published one."""
    return torch.optim.Adam(network.parameters(), 1e-4, amsgrad=True, weight_decay=1e-5)


def training_step(network: Network, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """One step on a batch (16, 4, 128, 128)."""
    foreground = (x.sum(1, keepdim=True) > 0.01).float()
    noise = functional.interpolate(
        0.2 * torch.randn(len(x), 4, 16, 16), size=(128, 128), mode="bilinear", align_corners=True
    )
    loss = ((network(x + noise * foreground) - x) * foreground).square().mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 0.5)
    optimizer.step()


def evaluate(scores: NDArray[np.float32], labels: NDArray[np.bool_]) -> tuple[float, float]:
    """Average precision, and the best Dice of 1,000 thresholds, over all pixels."""
    from sklearn.metrics import average_precision_score

    dices = []
    for threshold in np.arange(1000) / 1000:
        mask = scores > threshold
        dices.append(2 * (mask & labels).sum() / max(mask.sum() + labels.sum(), 1))
    return float(average_precision_score(labels.ravel(), scores.ravel())), float(max(dices))


if __name__ == "__main__":
    # python benchmarks/plain.py CASE OUT.nii.gz
    detect(Network(), Path(sys.argv[1]), Path(sys.argv[2]))
