"""A pass over the batches of an evaluation: which of them a rank reads, and for whom."""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

from ksuit_runner.distributed.world import World

EvaluationWatcher = Callable[[Sequence[str], str, int, int | None], None]
"""Takes the names of those that read a batch, the key of the dataset, the number of the batch, and of how many."""


class Reading(NamedTuple):
    """What one of those that share a pass reads.

    Attributes:
        max_batches: Number of batches, the first ones; None reads all.
        is_shared: Whether the ranks share the batches, so that batch b is that of rank ``b % ranks``. Otherwise each
            rank reads all of them.
    """

    max_batches: int | None = None
    is_shared: bool = False


class Turn(NamedTuple):
    """A batch that this rank reads.

    Attributes:
        first: Number of the first batch that some rank reads at the same time.
        number: Number of the batch.
    """

    first: int
    number: int


class SharedPass:
    """A pass over the batches of a dataset, shared by several readers and by the ranks.

    Args:
        readings: What the readers read.
        world: The ranks of the run.
        in_step: Whether all ranks have to do the same with as many batches, because the model's forward pass waits for
            the others. Then a rank without a batch of its own repeats the last one, and what it finds does not count.
    """

    def __init__(self, readings: Sequence[Reading], world: World, in_step: bool = False) -> None:
        self._readings = readings
        self._rank, self._size = world.rank, world.size
        self._in_step = in_step and world.size > 1
        self._is_divided = all(reading.is_shared for reading in readings)

    @property
    def max_batches(self) -> int | None:
        """Number of batches that some reader reads; None if one reads all."""
        known = [most for most, _ in self._readings if most is not None]
        return max(known) if len(known) == len(self._readings) else None

    def end(self, batches: int | None = None) -> int | None:
        """Number of batches that are read of a dataset with so many; None if that is not known."""
        known = [number for number in (self.max_batches, batches) if number is not None]
        return min(known, default=None)

    def turns(self, batches: int | None = None) -> Iterator[Turn]:
        """Yield the batches of this rank, in order.

        Args:
            batches: Number of batches of the dataset; None if it is not known: then the batches go on without end, and
                where the ranks are in step, each of them reads all.
        """
        stop = self.end(batches)
        if self._in_step and self._is_divided and batches is not None:
            assert stop is not None
            for first in range(0, stop, self._size):
                yield Turn(first, min(first + self._rank, stop - 1))
            return
        for number in count() if stop is None else range(stop):
            turn = Turn(number, number)
            if self._size == 1 or self.readers(turn):
                yield turn

    def readers_from(self, turn: Turn) -> list[int]:
        """Return the indices of those that read some batch from here on, on this rank or another one."""
        return [index for index, (most, _) in enumerate(self._readings) if most is None or turn.first < most]

    def readers(self, turn: Turn) -> dict[int, bool]:
        """Return the index of each reader that reads a batch, and whether what it finds counts on this rank."""
        found = dict.fromkeys(self.readers_from(turn), True)
        if self._size == 1:
            return found
        is_own = turn.number % self._size == self._rank
        for index in list(found):
            most, is_shared = self._readings[index]
            found[index] = (is_own or not is_shared) and (most is None or turn.number < most)
            if not (found[index] or self._in_step):
                del found[index]
        return found
