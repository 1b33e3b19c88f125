"""A dataset for cross-validation."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Wave(Dataset[tuple[Tensor, Tensor]]):
    """Points on a noisy wave.

    Inputs are float32 of shape (1,), targets float32 of shape (1,).

    Args:
        length: Number of points.
    """

    output_shape = (1,)

    def __init__(self, length: int = 120) -> None:
        inputs = torch.linspace(-1, 1, length).unsqueeze(1)
        noise = torch.randn(length, 1, generator=torch.Generator().manual_seed(0))
        self.samples: Any = list(zip(inputs, torch.sin(4 * inputs) + 0.1 * noise, strict=True))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]
