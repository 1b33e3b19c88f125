"""Mean, spread and size of what a model returns, over any number of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ksuit_runner.tensors.device import widest_float

STATISTICS: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "mean": lambda total, squares, count, largest: total / count,
    "std": lambda total, squares, count, largest: (squares / count - (total / count).square()).clamp(min=0).sqrt(),
    "abs_max": lambda total, squares, count, largest: largest,
}
"""Name -> a statistic, of the sum of values and that of their squares, their number, and the largest absolute value."""


class Moments:
    """What STATISTICS are made of, by name; an accumulator for ``PartSums``.

    Attributes:
        held: For each name a tensor of shape (4,) in float64, on the device: the arguments of a statistic.
    """

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add the elements of a tensor that is not empty."""
        values = values.detach().to(widest_float(values.device))
        count = torch.full_like(values.sum(), values.numel())
        self._add(name, torch.stack([values.sum(), values.square().sum(), count, values.abs().max()]))

    def _add(self, name: str, new: Tensor) -> None:
        if name in self.held:
            old = self.held[name]
            new = torch.cat([old[:3] + new[:3], torch.maximum(old[3:], new[3:])])
        self.held[name] = new

    def merge(self, other: Moments) -> None:
        """Add what another one has."""
        for name, moments in other.held.items():
            self._add(name, moments)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what it holds."""
        return dict(self.held)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], device: torch.device) -> None:
        """Restore it, on a device."""
        self.held = {name: moments.to(device) for name, moments in state_dict.items()}
