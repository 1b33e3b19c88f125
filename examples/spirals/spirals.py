"""Points on the arms of a spiral, and a small network that tells the arms apart."""

from math import pi, prod
from typing import Literal

import torch
from torch import Tensor, nn

from ksuit_runner import TensorDataset

SEEDS = {"train": 0, "validation": 1, "test": 2}


class Spirals(TensorDataset):
    """Points in the plane, each on one of several arms of a spiral; the arm is to be told.

    Inputs are float32 of shape (2,), targets int64 class indices.

    Args:
        split: Which points: of training, validation or test.
        length: Number of points.
        arms: Number of arms.
        noise: Standard deviation of the angle, in radians.
    """

    def __init__(
        self, split: Literal["train", "validation", "test"], length: int = 600, arms: int = 3, noise: float = 0.1
    ) -> None:
        generator = torch.Generator().manual_seed(SEEDS[split])
        targets = torch.arange(length) % arms
        radius = torch.rand(length, generator=generator).sqrt()
        angle = 4 * radius + 2 * pi * targets / arms + noise * torch.randn(length, generator=generator)
        inputs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        super().__init__(inputs, targets, output_shape=(arms,))


class Network(nn.Module):
    """Two hidden layers.

    Args:
        input_shape: Shape of one input; filled in from the data.
        output_shape: Shape of one output; filled in from the data.
        width: Units of each hidden layer.
    """

    def __init__(self, input_shape: tuple[int, ...], output_shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(prod(input_shape), width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, *output_shape),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs of shape (samples, *input_shape) to scores of shape (samples, *output_shape)."""
        scores: Tensor = self.layers(inputs.flatten(1))
        return scores
