"""Curve fitting with L-BFGS, whose step evaluates the loss as often as its line search needs it."""

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Wave(Dataset[tuple[Tensor, Tensor]]):
    """Points of a wave: a place of shape (1,) and the height there of shape (1,).

    Args:
        size: Number of points, evenly spread.
        shift: Shift of the places, in distances between them.
    """

    input_shape = output_shape = (1,)

    def __init__(self, size: int, shift: float = 0.0) -> None:
        self.places = 2 * (torch.arange(size).float().unsqueeze(1) + shift) / size - 1
        self.heights = (4 * self.places).sin()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.places[index], self.heights[index]
