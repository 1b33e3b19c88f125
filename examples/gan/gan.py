"""A generative adversarial network: a critic and a generator with optimizers of their own, which take turns."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.utils.data import Dataset

from ksuit_runner import SgdTrainer


class Ring(Dataset[Tensor]):
    """Points near a circle of radius 1, each of shape (2,).

    Args:
        size: Number of points.
        seed: Seed of the generator that makes them.
    """

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        angles = 2 * torch.pi * torch.rand(size, generator=generator)
        noise = 0.05 * torch.randn(size, 2, generator=generator)
        self.points = torch.stack([angles.cos(), angles.sin()], dim=1) + noise

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Tensor:
        return self.points[index]


class Gan(nn.Module):
    """A generator of points, and a critic that tells real ones from generated ones.

    Args:
        noise_dim: Size of the noise that a point is generated from.
        width: Width of the hidden layers.
    """

    def __init__(self, noise_dim: int = 4, width: int = 32) -> None:
        super().__init__()
        self.noise_dim = noise_dim
        self.generator = nn.Sequential(nn.Linear(noise_dim, width), nn.ReLU(), nn.Linear(width, 2))
        self.critic = nn.Sequential(nn.Linear(2, width), nn.LeakyReLU(0.2), nn.Linear(width, 1))

    def forward(self, noise: Tensor) -> Tensor:
        """Return generated points of shape (points, 2) for noise of shape (points, noise_dim)."""
        return self.generator(noise)


class GanTrainer(SgdTrainer):
    """Trains both with the hinge loss (Lim and Ye, Geometric GAN, 2017, arXiv:1705.02894)."""

    def training_step(self, batch: Tensor, model: nn.Module, turn: str | None = None) -> tuple[Any, Tensor]:
        """Return the loss of whose turn it is, and generated points, as many as in a batch of shape (points, 2)."""
        gan = model.module
        generated = model(torch.randn(len(batch), gan.noise_dim, device=batch.device))
        if turn is None:  # an evaluation: how far from the circle?
            return (generated.norm(dim=1) - 1).abs().mean(), generated
        if turn == "critic":
            loss = relu(1 - gan.critic(batch)).mean() + relu(1 + gan.critic(generated.detach())).mean()
        else:  # the gradients pass through the critic, and only the generator keeps them
            loss = -gan.critic(generated).mean()
        return {"total": loss, turn: loss.detach()}, generated
