"""Iterable datasets of unknown length (streams), read batch by batch from any position.

A stream says in one of three ways how to continue in its middle:

- It can be read from anywhere: ``iterate(position)`` iterates from the sample at a position, which counts from the
  beginning of the run, and does not end before training does. Any number of workers reads it, each its own batches,
  and any number of ranks.
- It has a state: ``state_dict()`` and ``load_state_dict(state)``, as those of ``torchdata`` and of Hugging Face have.
  The state after each batch comes with it, and is part of the checkpoint.
- It has ``__iter__`` only: to continue, it is read again from its beginning.

The last two begin again when they end, and are read by one process; of several ranks each reads all of it, and keeps
its own parts.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, default_collate

from ksuit_runner.data.collators import CollateFn
from ksuit_runner.errors import KsuitError, named_type
from ksuit_runner.keyed_random import mix, seed_all


class Carried(NamedTuple):
    """A batch, and the state of its dataset after it."""

    batch: Any
    state: Mapping[str, Any]


class StreamOrder:
    """The positions of a stream in the order in which it comes.

    Args:
        samples_per_epoch: Number of samples that count as an epoch; None if a run is a single one.
    """

    def __init__(self, samples_per_epoch: int | None) -> None:
        self.samples_per_epoch = samples_per_epoch

    def part(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the positions from one in an epoch to before another, counted from the beginning of the run."""
        return np.arange(start, stop) + (epoch - 1) * (self.samples_per_epoch or 0)


class IterableSource:
    """A stream as a dataset whose samples are fetched by their positions, one batch, or own part of one, after another.

    Args:
        dataset: The stream.
        collate_fn: Its collate function; torch's if None.
        key: Its key in the config.
        seed: Seed of the run; what was drawn for earlier batches is drawn again where they have to be read again.
        batch_size: Samples per batch.
        batches_per_epoch: Batches per epoch; None if a run is a single one.
        state: State of the stream to continue from, for one that has a state.
        position: Position that this state belongs to.
        parts: Number of parts of a batch.
        last_part: Part after the last one of a batch that is fetched here.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: CollateFn | None,
        key: str,
        seed: int,
        batch_size: int,
        batches_per_epoch: int | None = None,
        state: Mapping[str, Any] | None = None,
        position: int = 0,
        parts: int = 1,
        last_part: int = 1,
    ) -> None:
        self.dataset = dataset
        self._collate = collate_fn or default_collate
        self._key = key
        self._seed = seed
        self._batch_size = batch_size
        self._batches_per_epoch = batches_per_epoch
        self._state = state
        self._position = position if state is not None else 0
        self._ends = sorted({batch_size * (part + 1) // parts for part in range(parts)} - {0})
        self._parts = parts
        self._last_end = batch_size * last_part // parts
        self._iterator: Iterator[Any] | None = None

    def __getitems__(self, indices: NDArray[np.int64]) -> list[Any]:
        """Return the samples at consecutive positions.

        Raises:
            KsuitError: The stream has ended, and cannot begin again.
        """
        start, count = int(indices[0]), len(indices)
        if is_seekable(self.dataset):
            if self._iterator is None or start != self._position:
                self._iterator = iter(self.dataset.iterate(start))
            samples = list(islice(self._iterator, count))
            if len(samples) < count:
                raise KsuitError(
                    f"{type(self.dataset).__name__}.iterate({start}) has ended after {len(samples)} samples. It has to "
                    "go on for as long as the run: where the data ends, begin again (`position % length`)",
                    path=f"data.datasets.{self._key}",
                )
        else:
            if self._position < start:
                self._skip_to(start)
            samples = self._read(count)
        self._position = start + count
        return samples

    def collate_fn(self, samples: list[Any]) -> Any:
        """Return the batch; the last one of an update comes with the state of the stream after the whole batch."""
        batch = self._collate(samples)
        within = self._position % self._batch_size
        if not has_state(self.dataset) or within != self._last_end % self._batch_size:
            return batch
        if within:
            self._skip_to(self._position - within + self._batch_size)
        return Carried(batch, deepcopy(self.dataset.state_dict()))

    def _skip_to(self, start: int) -> None:
        """Read the parts before a position, each with the random numbers that it had."""
        while self._position < start:
            end = self._seed_at(self._position)
            self._read(end - self._position)
            self._position = end
        self._seed_at(start)

    def _seed_at(self, position: int) -> int:
        """Seed the generators for the part that begins at a position, and return where it ends."""
        batch, within = divmod(position, self._batch_size)
        epoch, number = divmod(batch, self._batches_per_epoch) if self._batches_per_epoch else (0, batch)
        end = self._ends[bisect_right(self._ends, within)]
        part = [] if self._parts == 1 else [-(-end * self._parts // self._batch_size) - 1]
        seed_all(mix(self._seed, self._key, epoch + 1, number, *part))
        return position - within + end

    def _read(self, count: int) -> list[Any]:
        if self._iterator is None:
            if self._state is not None:
                self.dataset.load_state_dict(deepcopy(dict(self._state)))
            self._iterator = iter(self.dataset)
        samples = list(islice(self._iterator, count))
        while len(samples) < count:
            self._iterator = iter(self.dataset)
            more = list(islice(self._iterator, count - len(samples)))
            if not more:
                name = type(self.dataset).__name__
                raise KsuitError(
                    f"{name} has ended after {self._position + len(samples)} samples, and has no more when it is "
                    "iterated again",
                    path=f"data.datasets.{self._key}",
                )
            samples += more
        return samples


class EvaluatedSource:
    """A stream from its beginning to its end, as a dataset that is asked for as many samples as a batch has.

    Args:
        dataset: The stream.
        collate_fn: Its collate function; torch's if None.
    """

    def __init__(self, dataset: Any, collate_fn: CollateFn | None) -> None:
        self._collate = collate_fn or default_collate
        self._dataset = dataset
        self._iterator: Iterator[Any] | None = None

    def __getitems__(self, indices: NDArray[np.int64]) -> list[Any]:
        """Return the next samples, fewer at the end.

        Raises:
            KsuitError: There is none at all.
        """
        if self._iterator is not None:
            return list(islice(self._iterator, len(indices)))
        self._iterator = iter(self._dataset.iterate(0) if is_seekable(self._dataset) else self._dataset)
        if samples := list(islice(self._iterator, len(indices))):
            return samples
        raise KsuitError(
            f"{named_type(self._dataset)} has no samples; a stream has to begin again whenever it is iterated "
            "over, which a generator does not"
        )

    def collate_fn(self, samples: list[Any]) -> tuple[Any, int]:
        """Return the batch, None if there is none, and the number of its samples."""
        return (self._collate(samples) if samples else None), len(samples)


def is_map_style(dataset: Any) -> bool:
    """Whether samples are fetched by their index."""
    has_items = hasattr(dataset, "__getitem__") or hasattr(dataset, "__getitems__")
    # What `isinstance` says, of a proxy as well; but that asks the metaclass: 5 us, at every evaluation.
    return hasattr(dataset, "__len__") and has_items and IterableDataset not in dataset.__class__.__mro__


def is_stream(dataset: Any) -> bool:
    """Whether a dataset can only be iterated over."""
    return not is_map_style(dataset) and (is_seekable(dataset) or hasattr(dataset, "__iter__"))


def is_seekable(dataset: Any) -> bool:
    """Whether a stream can be read from any position."""
    return callable(getattr(dataset, "iterate", None))


def has_state(dataset: Any) -> bool:
    """Whether a stream has a state that says where it continues."""
    return not is_seekable(dataset) and hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
