"""What the ranks tell each other about an update, in the same exchange as its gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class UpdateWord:
    """What a rank has to say about an update; after the exchange, what all of them have said, summed up.

    Attributes:
        said: Whether a callback or the training step has logged something, requested a checkpoint or stopped training
            since the ranks have last written their logs together: then they do so after this update.
        interrupted: Whether a signal has asked this rank to end: then all of them end after this update.
        numbers: What the trainer sums up: weights, counts and the like; as many on all ranks.
    """

    said: float = 0.0
    interrupted: float = 0.0
    numbers: list[float] = field(default_factory=list)

    def encode(self) -> list[float]:
        """Return it as numbers to be summed up."""
        return [self.said, self.interrupted, *self.numbers]

    def take(self, sums: Sequence[float]) -> None:
        """Replace what this rank says by the sums over all ranks."""
        self.said, self.interrupted, *self.numbers = sums
