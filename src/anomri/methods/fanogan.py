"""f-AnoGAN: a generator of healthy slices and an encoder (Schlegl et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from anomri.methods.base import Method, Objective, Preset
from anomri.methods.networks.gan import GRID, Downward, SliceGenerator
from anomri.slices import Box
from anomri.spec import Training

CRITIC_TURNS = 5
"""Steps of the critic to one of the generator."""
PENALTY = 10.0
GAN_BETAS = (0.0, 0.9)
"""Adam's, for critic and generator."""
FULL = Training(
    steps=67_200,
    batch_size=32,
    learning_rate=1e-3,
    schedule="constant",
    weight_decay=0.0,
    gradient_clip=100.0,
)
SMALL = replace(FULL, steps=600, batch_size=8, validate_every=50, validation_slices=128)


class FAnoGAN(Method):
    """A Wasserstein GAN with gradient penalty (Gulrajani et al.

    2017) and, after it, an encoder (``izi_f``). The critic has a turn at each step of the first
    ``gan_share`` of the training, the generator at every fifth; then both rest and the encoder
    learns |x - G(E(x))|^2 + ``kappa`` * |f(x) - f(G(E(x)))|^2, with f the critic's last features.
    The rate is 1e-3 for both, and ``encoder_rate`` times that for the encoder: 1e-5 in the paper,
    more in ``small``, whose few steps would not move it (its batches of 8, too, are what a
    processor has time for). The share is ours; so is a linear last layer, since our slices are not
    confined to (-1, 1). The score is the image residual: the feature residual is one number a
    slice, and at kappa 1e-8 moves no voxel.
    """

    fixed_size = True
    exportable = True
    PRESETS: ClassVar[dict[str, Preset]] = {
        "paper": Preset({}, FULL),
        "small": Preset({"width": 8, "encoder_rate": 1.0}, SMALL),
        "demo": Preset(
            {"width": 8, "encoder_rate": 1.0}, replace(SMALL, steps=150, validate_every=25)
        ),
    }
    side_multiple = GRID
    encoder_begun: Tensor

    def __init__(
        self,
        channels: Sequence[str],
        width: int = 64,
        latent: int = 128,
        kappa: float = 1e-8,
        gan_share: float = 0.75,
        encoder_rate: float = 0.01,
    ) -> None:
        super().__init__()
        self.generator = SliceGenerator(len(channels), width, latent)
        self.critic = Downward(len(channels), width, 1)
        self.encoder = Downward(len(channels), width, latent)
        self.latent, self.kappa = latent, kappa
        self.gan_share, self.encoder_rate = gan_share, encoder_rate
        self.register_buffer("encoder_begun", torch.zeros((), dtype=torch.bool))

    def objectives(self) -> list[Objective]:
        """Critic and generator first, then the encoder, which has at least the last step."""

        def encoder_turn(step: int, steps: int) -> bool:
            return step >= min(round(self.gan_share * steps), steps - 1)

        def critic_turn(step: int, steps: int) -> bool:
            return not encoder_turn(step, steps)

        def generator_turn(step: int, steps: int) -> bool:
            return critic_turn(step, steps) and step % CRITIC_TURNS == CRITIC_TURNS - 1

        return [
            Objective(self.critic, "critic", 1.0, GAN_BETAS, critic_turn),
            Objective(self.generator, "generator", 1.0, GAN_BETAS, generator_turn),
            Objective(self.encoder, "encoder", self.encoder_rate, active=encoder_turn),
        ]

    def forward(
        self,
        x: Tensor,
        foreground: Tensor,
        generator: Generator,
        box: Box | None = None,
        objective: str | None = None,
    ) -> Tensor:
        """The loss of an objective.

        Without one, the encoder's on the foreground; NaN before the encoder's training has begun.
        """
        for network in (self.critic, self.generator, self.encoder):
            network.requires_grad_(network is getattr(self, objective or "encoder"))
        # At rest the generator's batch norm must not go on averaging.
        self.generator.train(self.training and objective in ("critic", "generator"))
        if objective == "critic":
            return self.critic_loss(x, generator)
        if objective == "generator":
            return -self.critic(self.generator(self._draw(len(x), generator, x.device))).mean()
        if objective == "encoder":
            self.encoder_begun.fill_(True)
        reconstruction = self.generator(self.encoder(x))
        features = (self.critic.describe(reconstruction) - self.critic.describe(x)).square().mean()
        loss = ((reconstruction - x) * foreground[:, None]).square().mean() + self.kappa * features
        return torch.where(self.encoder_begun, loss, torch.nan)

    def critic_loss(self, x: Tensor, generator: Generator) -> Tensor:
        """The Wasserstein loss of the critic + the penalty on gradients off norm 1."""
        with torch.no_grad():
            made_up = self.generator(self._draw(len(x), generator, x.device))
        share = torch.rand((len(x), 1, 1, 1), generator=generator, device=x.device)
        between = (share * x + (1 - share) * made_up).requires_grad_()
        (gradient,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        return self.critic(made_up).mean() - self.critic(x).mean() + PENALTY * penalty

    def reconstruct(self, x: Tensor, box: Box | None = None) -> Tensor:
        """The slice that the generator makes at the place the encoder finds.

        Always of the whole grid.
        """
        return self.generator(self.encoder(x)).float()

    def _draw(self, count: int, generator: Generator, device: torch.device) -> Tensor:
        return torch.randn((count, self.latent), generator=generator, device=device)
