"""The order in which batches are needed, from any update on: drawn from the seed, so nothing has to be replayed."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ksuit_runner.counter import Interval, UpdateCounter
from ksuit_runner.data.fetch import EVALUATION, Fetch
from ksuit_runner.random_keys import mix


def epoch_order(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """Return the order of a dataset's samples in an epoch of training.

    The generator is numpy's RandomState, which draws the same numbers in every version of numpy.

    Args:
        seed: Seed of the run.
        epoch: Epoch of training, from 1.
        length: Number of samples.

    Returns:
        A permutation of the indices, shape ``(length,)``.
    """
    key = mix(seed, "order", epoch)
    generator = np.random.RandomState([key & 0xFFFFFFFF, key >> 32])
    return generator.permutation(length).astype(np.int64, copy=False)


def evaluation_fetches(dataset_key: str, length: int, batch_size: int) -> Iterator[Fetch]:
    """Yield the batches of an evaluation: all samples in their own order, the last batch may be smaller."""
    for batch, start in enumerate(range(0, length, batch_size)):
        yield Fetch(dataset_key, EVALUATION, batch, np.arange(start, min(start + batch_size, length)))


class Plan:
    """All fetches of a run from its current update to its end, in the order in which they are consumed.

    After an update come the evaluations that are then due: those that count in updates or samples before those that
    count in epochs, as the hooks fire, and otherwise in the given order. Only the order of the current epoch is kept.

    Args:
        seed: Seed of the run.
        lengths: Number of samples by dataset key.
        train: Key of the training dataset.
        counter: Position, end and batch size of training; only its current position counts.
        evaluations: When which dataset is evaluated.
        eval_batch_size: Samples per batch of an evaluation.
    """

    def __init__(
        self,
        seed: int,
        lengths: Mapping[str, int],
        train: str,
        counter: UpdateCounter,
        evaluations: Sequence[tuple[Interval, str]],
        eval_batch_size: int,
    ) -> None:
        self._seed = seed
        self._lengths = lengths
        self._train = train
        self._counter = counter.at(counter.update)
        self._evaluations = sorted(evaluations, key=lambda evaluation: evaluation[0].every_n_epochs is not None)
        self._eval_batch_size = eval_batch_size

    def __iter__(self) -> Iterator[Fetch]:
        order_epoch, order = 0, np.empty(0, np.int64)
        counter, size = self._counter, self._counter.batch_size
        for update in range(counter.update, counter.end_update):
            completed_epochs, batch = divmod(update, counter.updates_per_epoch)
            epoch = completed_epochs + 1
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(self._seed, epoch, self._lengths[self._train])
            yield Fetch(self._train, epoch, batch, order[batch * size : (batch + 1) * size])
            if self._evaluations:
                yield from self._due(counter.at(update + 1))

    def _due(self, counter: UpdateCounter) -> Iterator[Fetch]:
        for interval, key in self._evaluations:
            if interval.is_due(counter):
                yield from evaluation_fetches(key, self._lengths[key], self._eval_batch_size)
