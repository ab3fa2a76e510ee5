"""The variational autoencoder, with reconstruction (Baur et al.

2021) or restoration (You et al., MIDL 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from anomri.methods.base import LAPTOP, Method, Preset
from anomri.methods.draws import normal
from anomri.methods.networks.timed_unet import Decoder, Encoder
from anomri.slices import Box
from anomri.spec import Training

GRID = 128
SMALL = replace(LAPTOP, steps=600, crop_to_brain=False)
PAPER_WIDTHS, SMALL_WIDTHS = [64, 128, 256, 512], [16, 32, 64, 128]


class VAE(Method):
    """A variational autoencoder: the network of the DAE without skips, through one vector.

    A convolution as large as the coarsest map (16 x 16 of a slice of 128 x 128: the grid is fixed)
    gives 2 x ``latent`` = 256 channels, the means and log variances of the posterior; a transposed
    one leads back. The loss is the squared error on the foreground + ``kl_weight`` * KL, each
    averaged (over pixels; over the latent dimensions): the paper does not say how they are reduced,
    and summed they would let the KL drown the image.

    Restoration looks for the healthy slice y near x: ``restoration_steps`` gradient steps from y =
    x on |f(y) - y|^2 + KL + ``restoration_weight`` * TV(x - y), the first two weighed against each
    other as in training, where TV, total variation, is the price of leaving the image. 0 steps:
    plain reconstruction. You et al. tune rate and weight by hand. Ours: 100 steps of 0.01 take a
    pixel 1 - 0.98^100 = 87 % of the way to what the network makes of it; and a lone pixel, whose TV
    grows by 4 a unit, stays where its error is below 2 x 0.1 = 0.2, the spread of healthy tissue,
    while of a region only the rim is held back.
    """

    fixed_size = True
    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset({"widths": PAPER_WIDTHS}, Training()),
        "small": Preset({"widths": SMALL_WIDTHS}, SMALL),
        "demo": Preset({"widths": SMALL_WIDTHS}, replace(SMALL, steps=200, learning_rate=2e-3)),
    }

    def __init__(
        self,
        channels: Sequence[str],
        widths: Sequence[int] = (64, 128, 256, 512),
        latent: int = 128,
        kl_weight: float = 1e-3,
        restoration_steps: int = 0,
        restoration_rate: float = 0.01,
        restoration_weight: float = 0.1,
    ) -> None:
        super().__init__()
        coarsest = GRID >> (len(widths) - 1)
        self.encoder = Encoder(len(channels), widths)
        self.to_latent = nn.Conv2d(widths[-1], 2 * latent, coarsest)
        self.from_latent = nn.ConvTranspose2d(latent, widths[-1], coarsest)
        self.decoder = Decoder(len(channels), widths)
        self.side_multiple = GRID
        self.exportable = restoration_steps == 0
        self.kl_weight = kl_weight
        self.restoration_steps = restoration_steps
        # A step goes forward and, at twice the price, backward.
        self.passes = 3 * restoration_steps or 1
        self.restoration_rate = restoration_rate
        self.restoration_weight = restoration_weight

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log variances of the latent vector, (n, latent, 1, 1) each."""
        mean, log_variance = self.to_latent(self.encoder(x)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 20)

    def decode(self, latent: Tensor) -> Tensor:
        """The slices (n, c, 128, 128) of latent vectors."""
        return self.decoder(self.from_latent(latent)).float()

    def forward(
        self, x: Tensor, foreground: Tensor, generator: Generator, box: Box | None = None
    ) -> Tensor:
        """Squared error on the foreground, mean over all pixels, + ``kl_weight`` * mean KL."""
        mean, log_variance = self.posterior(x)
        noise = normal(mean.shape, generator)
        reconstruction = self.decode(mean + noise * (0.5 * log_variance).exp())
        error = ((reconstruction - x) * foreground[:, None]).square().mean()
        return error + self.kl_weight * kl_divergence(mean, log_variance).mean()

    def reconstruct(self, x: Tensor, box: Box | None = None) -> Tensor:
        """The slice of the posterior's mean, or the restored slice; always of the whole grid."""
        return self.restore(x) if self.restoration_steps else self.decode(self.posterior(x)[0])

    def restore(self, x: Tensor) -> Tensor:
        """The healthy slices near ``x``, of the same shape.

        Every slice of a batch goes its own way. A step that would raise a slice's objective is not
        taken, and its rate is halved.
        """
        inside = (x != 0).any(dim=1, keepdim=True)
        restored, rate = x, torch.full((len(x), 1, 1, 1), self.restoration_rate, device=x.device)
        objective, gradient = self._slope(restored, x, inside)
        for _ in range(self.restoration_steps):
            tried = restored - rate * gradient
            tried_objective, tried_gradient = self._slope(tried, x, inside)
            lower = (tried_objective < objective)[:, None, None, None]
            objective = torch.where(lower[:, 0, 0, 0], tried_objective, objective)
            restored, gradient = (
                torch.where(lower, tried, restored),
                torch.where(lower, tried_gradient, gradient),
            )
            rate = torch.where(lower, rate, rate / 2)
        return restored

    def _slope(self, restored: Tensor, x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            place = restored.detach().requires_grad_()
            objective = self.restoration_objective(place, x, inside)
            (gradient,) = torch.autograd.grad(objective.sum(), place)
        return objective.detach(), gradient * inside

    def restoration_objective(self, restored: Tensor, x: Tensor, inside: Tensor) -> Tensor:
        """What restoration lowers, one value a slice (n,).

        ``inside`` (n, 1, h, w) is where there is brain.
        """
        mean, log_variance = self.posterior(restored)
        error = ((self.decode(mean) - restored) * inside).square().mean(dim=(1, 2, 3))
        objective = error + self.kl_weight * kl_divergence(mean, log_variance).mean(dim=(1, 2, 3))
        # Times the pixels of a slice: a step then moves a pixel in proportion to its own error.
        return x[0].numel() * objective + self.restoration_weight * total_variation(restored - x)


class VAERestoration(VAE):
    """The same trained network with the restoration score, as a method of its own.

    100 steps as in the paper; ``small`` takes 25 steps four times as long, which a processor has
    time for.
    """

    PRESETS: ClassVar[dict[str, Preset]] = {
        name: Preset(
            {**preset.settings, "restoration_steps": steps, "restoration_rate": rate},
            preset.training,
            weights_of="vae",
        )
        for (name, preset), (steps, rate) in zip(
            VAE.PRESETS.items(), ((100, 0.01), (25, 0.04), (25, 0.04)), strict=True
        )
    }


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL of N(mean, variance) from N(0, 1), elementwise."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def total_variation(x: Tensor) -> Tensor:
    """Sum of absolute differences of neighbouring pixels of (n, c, h, w): (n,)."""
    return x.diff(dim=2).abs().sum(dim=(1, 2, 3)) + x.diff(dim=3).abs().sum(dim=(1, 2, 3))
