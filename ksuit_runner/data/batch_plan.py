"""The batches that a run needs, in order, from any update on: the order follows from the seed, nothing is replayed."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ksuit_runner.counter import Interval, UpdateCounter
from ksuit_runner.data.fetch_batch import EVALUATION, BatchRequest, PartSpan
from ksuit_runner.data.permutation import KeyedPermutation
from ksuit_runner.data.shared_pass import Reading, SharedPass
from ksuit_runner.distributed.world import World
from ksuit_runner.keyed_random import mix

LONGEST_DRAWN: Final = 1 << 16
"""Number of samples up to which an epoch's order is drawn as a whole, which takes a millisecond and half a megabyte."""

_BLOCK: Final = 1 << 13  # positions computed at once: in a millisecond, and within the processor's cache


class EpochOrder:
    """The order of a dataset's samples in an epoch of training: any part of it, without what comes before.

    A short order is drawn as a whole. A long one is a keyed permutation, of which a block at a time is computed: to
    start anywhere costs the same, and memory does not grow with the dataset.

    Args:
        seed: Seed of the run.
        epoch: Epoch of training, from 1.
        length: Number of samples.
    """

    def __init__(self, seed: int, epoch: int, length: int) -> None:
        self.epoch = epoch
        self._length = length
        self._permutation = None
        self._start, self._block = 0, np.empty(0, np.int64)
        if length > LONGEST_DRAWN:
            self._permutation = KeyedPermutation(seed, "order", epoch, length=length)
        elif length:
            self._block = _draw(mix(seed, "order", epoch), length)

    def part(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples from one position to before another, int64; positions beyond the end are omitted."""
        stop = min(stop, self._length)
        if not self._start <= start <= stop <= self._start + len(self._block):
            self._compute(start, stop)
        return self._block[start - self._start : stop - self._start]

    def _compute(self, start: int, stop: int) -> None:
        assert self._permutation is not None
        end = min(max(stop, start + _BLOCK), self._length)
        self._start, self._block = start, self._permutation(np.arange(start, end))


class _Generator(threading.local):
    """One for each thread, seeded before each use: a new one is seeded from the system first, which takes 80 us."""

    def __init__(self) -> None:
        # Of all generators of numpy, RandomState alone draws the same numbers in every version.
        self.of_thread = np.random.RandomState(0)


_GENERATOR = _Generator()


def _draw(key: int, length: int) -> NDArray[np.int64]:
    generator = _GENERATOR.of_thread
    generator.seed([key & 0xFFFFFFFF, key >> 32])
    return generator.permutation(length).astype(np.int64, copy=False)


def evaluation_requests(
    dataset_key: str, length: int, batch_size: int, numbers: Iterable[int] | None = None
) -> Iterator[BatchRequest]:
    """Yield the requests of an evaluation: samples in dataset order; the last batch of a dataset may be smaller.

    Args:
        dataset_key: Key of the dataset.
        length: Number of samples.
        batch_size: Samples per batch.
        numbers: Numbers of the batches; by default all.
    """
    numbers = range(-(-length // batch_size)) if numbers is None else numbers
    for position, batch in enumerate(numbers):
        start = batch * batch_size
        indices = np.arange(start, min(start + batch_size, length))
        yield BatchRequest(dataset_key, EVALUATION, batch, indices, begins=position == 0)


def cut(size: int, parts: int, own: range) -> tuple[int, int, tuple[PartSpan, ...]]:
    """Cut a batch into parts, as even as possible; with fewer samples than parts, some are empty.

    Args:
        size: Number of samples of the batch.
        parts: Number of parts.
        own: The parts that are wanted.

    Returns:
        The first sample of the wanted parts and the one after the last, and those of the parts that are not empty,
        within these.
    """
    ends = [size * number // parts for number in range(own.start, own.stop + 1)]
    spans = [
        PartSpan(number, start - ends[0], stop - ends[0])
        for number, (start, stop) in zip(own, pairwise(ends), strict=True)
    ]
    return ends[0], ends[-1], tuple(span for span in spans if span.stop > span.start)


class TrainingOrder(Protocol):
    """Maps positions in an epoch to samples, see ``order.Order``."""

    def part(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the samples from one position to before another; positions beyond the end are omitted."""


class Evaluation(NamedTuple):
    """An evaluation of a dataset that is announced.

    Attributes:
        interval: When it takes place.
        dataset_key: Key of the dataset.
        batch_size: Samples per batch; None takes that of the data.
        max_batches: Number of batches; None takes all.
        group: Evaluations of the same group read the same batches in one pass where they coincide; None is by itself.
        is_shared: Whether the ranks share the batches, see ``SharedPass``.
    """

    interval: Interval
    dataset_key: str
    batch_size: int | None = None
    max_batches: int | None = None
    group: int | None = None
    is_shared: bool = False


class BatchPlan:
    """All batch requests of a run from its current update to its end, in the order in which they are consumed.

    The start and each update are followed by the evaluations that are due then, as the hooks fire: those that are due
    because of the epoch come last, otherwise they have the given order.

    Args:
        lengths: Number of samples by dataset key.
        train: Key of the training dataset.
        order: Order of its samples.
        counter: Position, end and batch size of training; the plan starts where the counter is now.
        evaluations: When which dataset is evaluated.
        eval_batch_size: Samples per batch of an evaluation.
        parts: Number of parts of the batch of an update.
        world: The ranks that share the batches; each requests its own parts.
        in_step: Whether all ranks evaluate as many batches, see ``SharedPass``.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        train: str,
        order: TrainingOrder,
        counter: UpdateCounter,
        evaluations: Sequence[Evaluation],
        eval_batch_size: int,
        parts: int = 1,
        world: World | None = None,
        in_step: bool = False,
    ) -> None:
        self._lengths = lengths
        self._train = train
        self._order = order
        self._counter = counter.at(counter.update)
        self._evaluations = evaluations
        self._eval_batch_size = eval_batch_size
        self._parts = parts
        self._world = world or World()
        self._in_step = in_step

    def __iter__(self) -> Iterator[BatchRequest]:
        counter, size, ahead = self._counter, self._counter.batch_size, self._counter.at(self._counter.update)
        parts, own = self._parts, self._world.own(self._parts)
        full = cut(size, parts, own)
        if counter.update == 0:
            yield from self._due(ahead)
        next_due = self._next_due(ahead)
        for update in range(counter.update, counter.end_update):
            completed_epochs, batch = divmod(update, counter.updates_per_epoch)
            epoch = completed_epochs + 1
            samples = self._order.part(epoch, batch * size, (batch + 1) * size)
            start, stop, spans = full if len(samples) == size else cut(len(samples), parts, own)
            yield BatchRequest(self._train, epoch, batch, samples[start:stop], parts, spans)
            if update + 1 == next_due:
                ahead.update = next_due
                yield from self._due(ahead)
                next_due = self._next_due(ahead)

    def _next_due(self, counter: UpdateCounter) -> int | None:
        updates = (item.interval.next_due(counter) for item in self._evaluations)
        return min((update for update in updates if update is not None), default=None)

    def _due(self, counter: UpdateCounter) -> Iterator[BatchRequest]:
        passes: dict[tuple[bool, int], list[Evaluation]] = {}
        for number, item in enumerate(self._evaluations):
            if item.interval.is_due(counter):
                group = -1 - number if item.group is None else item.group
                passes.setdefault((item.interval.follows_epoch(counter), group), []).append(item)
        for _, together in sorted(passes.items(), key=lambda item: item[0][0]):
            key, length = together[0].dataset_key, self._lengths[together[0].dataset_key]
            size = together[0].batch_size or self._eval_batch_size
            readings = [Reading(item.max_batches, item.is_shared) for item in together]
            turns = SharedPass(readings, self._world, self._in_step).turns(-(-length // size))
            yield from evaluation_requests(key, length, size, (turn.number for turn in turns))
