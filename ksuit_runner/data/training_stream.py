"""The stream that a run trains on: what reads it, and its state after each update."""

import logging
from collections.abc import Mapping
from typing import Any

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.collators import CollateFn
from ksuit_runner.data.fetch_batch import EVALUATION, BatchRequest
from ksuit_runner.data.iterable_source import Carried, IterableSource, has_state, is_seekable
from ksuit_runner.data.probe import continues_anywhere
from ksuit_runner.distributed.world import World

_LOGGER = logging.getLogger(__name__)


class TrainingStream:
    """Makes the source of a training stream at any update.

    Args:
        dataset: The stream.
        collate_fn: Its collate function; torch's if None.
        key: Its key in the config.
        seed: Seed of the run.
        batch_size: Samples per update.
        world: The ranks of the run: each reads the stream, and keeps its own parts of the batches.
    """

    def __init__(
        self, dataset: Any, collate_fn: CollateFn | None, key: str, seed: int, batch_size: int, world: World
    ) -> None:
        self._dataset = dataset
        self._arguments = (dataset, collate_fn, key, seed, batch_size)
        self._world = world
        self._key = key
        self._states: dict[int, Mapping[str, Any]] = {}  # by update, of the newest ones
        self._updates_per_epoch = 0

    def first_source(self) -> IterableSource | None:
        """Return a source of the first samples; None for a stream that this would move on."""
        is_moved = has_state(self._dataset) or hasattr(self._dataset, "__next__")
        return None if is_moved else IterableSource(*self._arguments)

    def source(self, counter: UpdateCounter, parts: int) -> IterableSource:
        """Return what reads the stream from the counter's position on, in so many parts of each batch."""
        self._updates_per_epoch = counter.updates_per_epoch
        batches = counter.updates_per_epoch if counter.has_epochs else None
        last_part = self._world.own(parts).stop
        state = self._states.get(counter.update)
        return IterableSource(*self._arguments, batches, state, counter.sample, parts, last_part)

    def most_workers(self, num_workers: int) -> int:
        """Return how many of so many workers can read the stream."""
        return num_workers if is_seekable(self._dataset) else min(1, num_workers)

    def unpack(self, batch: Any, request: BatchRequest) -> Any:
        """Return what was fetched for an update, and remember the state of the stream that comes with it."""
        if type(batch) is not Carried:
            return batch
        assert request.epoch != EVALUATION
        update = (request.epoch - 1) * self._updates_per_epoch + request.batch + 1
        # An update that fails leaves the state after the one before.
        before = {key: state for key, state in self._states.items() if key == update - 1}
        self._states = {**before, update: batch.state}
        return batch.batch

    def state_dict(self, update: int) -> dict[str, Any]:
        """Return the state after an update, the last one or the one before; empty if the stream has none."""
        if update not in self._states:
            return {}
        return {"stream": {"class": type(self._dataset).__name__, "state": self._states[update]}}

    def load_state_dict(self, state_dict: Mapping[str, Any], update: int) -> None:
        """Restore the state after an update."""
        stored, name = state_dict.get("stream"), type(self._dataset).__name__
        self._states = {}
        if stored is None:
            return
        if stored["class"] == name and has_state(self._dataset):
            self._states = {update: stored["state"]}
        else:
            _LOGGER.warning(
                "warning: data.datasets.%s: the checkpoint has the state of a %s; this %s is read from its beginning",
                *(self._key, stored["class"], name),
            )

    def check(self, num_workers: int) -> None:
        """Say what about the stream makes a resume slow or not exact."""
        name = type(self._dataset).__name__
        if is_seekable(self._dataset):
            if not continues_anywhere(self._dataset):
                _LOGGER.warning(
                    "warning: data.datasets.%s: %s.iterate(1) does not begin with the second sample of iterate(0), so "
                    "that a resume or another number of workers is not exact. The position counts samples; draw what "
                    "belongs to a sample when it is yielded, and nothing before the first one",
                    *(self._key, name),
                )
            return
        if not has_state(self._dataset):
            _LOGGER.warning(
                "warning: data.datasets.%s: a %s cannot be read from its middle, so that a resume reads it from its "
                "beginning up to where the run was. Give it a method iterate(position), or state_dict and "
                "load_state_dict",
                *(self._key, name),
            )
        if num_workers > 1:
            _LOGGER.info("data.datasets.%s: one worker reads it, as it has no method iterate(position)", self._key)
