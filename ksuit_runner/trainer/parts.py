"""What is known of the batch of an update and of its parts: their samples and their weights."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ksuit_runner.data.fetch_batch import Part


class WeighedPart(NamedTuple):
    """A part of the batch of an update, on the device.

    Attributes:
        batch: The samples.
        number: Number of the part among those of the whole batch, from 0.
        weight: What its total loss weighs in the mean over the whole batch; 1 if it is the only part.
    """

    batch: Any
    number: int
    weight: float


class BatchParts:
    """Remembers of the latest batch, or of the parts of one, how many samples they have and what they weigh.

    Args:
        fetched: Returns how many samples were fetched for a batch, or None if it was not fetched.
        weight: Returns what a part's total loss is a mean over; None if batches are computed in one piece.
        leaves_out: Whether parts whose loss weighs nothing are not computed.
    """

    def __init__(
        self,
        fetched: Callable[[Any], int | None],
        weight: Callable[[Any], float | Tensor] | None = None,
        leaves_out: bool = False,
    ) -> None:
        self._fetched, self._weight, self._leaves_out = fetched, weight, leaves_out
        self._samples: list[tuple[Any, int | None]] = []
        self._weighed: Sequence[WeighedPart] = ()

    def note(self, batch: Any, samples: int | None) -> None:
        """Take note of how many samples were fetched for a batch that is evaluated next, if that is known."""
        self._samples = [(batch, samples)]

    def start(self, parts: Sequence[Part]) -> Sequence[WeighedPart]:
        """Take note of the parts of an update, and return those that are computed; weights take one transfer."""
        self._samples = [(part.batch, part.samples) for part in parts]
        if self._weight is None:
            return [WeighedPart(part.batch, part.number, 1.0) for part in parts]
        weights = as_numbers([self._weight(part.batch) for part in parts])
        self._weighed = [
            WeighedPart(part.batch, part.number, weight) for part, weight in zip(parts, weights, strict=True)
        ]
        return [part for part in self._weighed if part.weight] if self._leaves_out else self._weighed

    def samples(self, batch: Any) -> int | None:
        """Return how many samples were fetched for a batch, or for a part of it, if that is known."""
        for known, samples in self._samples:
            if known is batch:
                return samples
        return self._fetched(batch)

    def weight(self, batch: Any) -> float | None:
        """Return what the loss of a part weighs; None if it was not weighed."""
        for part in self._weighed:
            if part.batch is batch:
                return part.weight
        return None


def as_numbers(values: Sequence[float | Tensor]) -> list[float]:
    """Read scalars, those on a device in one transfer."""
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    if device is None:
        return [float(value) for value in values]
    if device.type == "cpu":
        return [value.item() if isinstance(value, Tensor) else value for value in values]
    return torch.stack([torch.as_tensor(value, device=device) for value in values]).tolist()
