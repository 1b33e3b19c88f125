"""What is known of the batch of an update and of the parts that it is split into: their samples and their weights."""

from collections.abc import Callable, Sequence
from typing import Any

from ksuit_runner.trainer.batch import Part, batch_size, report_shared, split_batch


class BatchParts:
    """Splits batches, and remembers of the latest one and of its parts how many samples they have and what they weigh.

    Args:
        fetched: Returns how many samples were fetched for a batch, or None if it was not fetched.
    """

    def __init__(self, fetched: Callable[[Any], int | None]) -> None:
        self._fetched = fetched
        self._noted: tuple[Any, int | None] = (None, None)
        self._samples: list[tuple[Any, int]] = []
        self._weights: list[tuple[Any, float]] = []
        self._has_reported = False

    def note(self, batch: Any, samples: int | None) -> None:
        """Take note of how many samples were fetched for a batch that is evaluated or split next, if that is known."""
        self._noted = batch, samples

    def samples(self, batch: Any) -> int | None:
        """Return how many samples were fetched for a batch, or for a part of it, if that is known."""
        if batch is self._noted[0]:
            return self._noted[1]
        for part, samples in self._samples:
            if part is batch:
                return samples
        return self._fetched(batch)

    def split(self, batch: Any, steps: int) -> Sequence[Part]:
        """Split a batch into at most so many parts, each with its share of the samples; see ``batch.split_batch``."""
        samples = self.samples(batch)
        parts = split_batch(batch, steps, samples)
        if samples is not None:
            size = samples if len(parts) == 1 else batch_size(batch, samples)
            self._samples = [(part, round(share * size)) for part, share in parts]
            if len(parts) > 1 and not self._has_reported:
                self._has_reported = True
                report_shared(batch, size)
        self._weights = []
        return parts

    def weigh(self, parts: Sequence[Part], weights: Sequence[float]) -> None:
        """Remember what the losses of parts weigh, in samples."""
        self._weights = [(part.batch, weight) for part, weight in zip(parts, weights, strict=True)]

    def weight(self, part: Any) -> float | None:
        """Return what the loss of a part weighs, in samples; None if the batch was not split."""
        for batch, weight in self._weights:
            if batch is part:
                return weight
        return None
