"""What a run has to know about its datasets before it trains, found out from a few of their samples."""

import logging
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from ksuit_runner.data.iterable_source import is_map_style, is_stream
from ksuit_runner.data.probe import (
    Probe,
    drawn_samples,
    first_samples,
    first_shape,
    is_repeatable,
    probe_dataset,
    probe_stream,
)
from ksuit_runner.data.training_stream import TrainingStream
from ksuit_runner.errors import ConfigError

_LOGGER = logging.getLogger(__name__)


class Inspection:
    """Finds out shapes and digests of datasets, and whether their samples can be repeated; training is not disturbed.

    Args:
        datasets: Datasets by key.
        source_of: Returns what batches of a map-style dataset are fetched from, by its key.
        train: Key of the dataset to train on.
        batch_size: Samples per batch.
        training: What the run trains on, if that is a stream.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        source_of: Callable[[str], Any],
        train: str,
        batch_size: int,
        training: TrainingStream | None,
    ) -> None:
        self._datasets = datasets
        self._source_of = source_of
        self._train = train
        self._batch_size = batch_size
        self._training = training
        self._probes: dict[str, Probe] = {}

    @cached_property
    def input_shape(self) -> tuple[int, ...]:
        """See ``DataContainer.input_shape``."""
        shape = getattr(self._datasets[self._train], "input_shape", None) or first_shape(
            self._first_source(", so it needs an attribute 'input_shape'"), self._whole_batch(self._train)
        )
        if shape is None:
            raise self._lacks("input_shape", ", and its samples do not begin with a tensor")
        return tuple(shape)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """See ``DataContainer.output_shape``."""
        shape = getattr(self._datasets[self._train], "output_shape", None)
        if shape is None:
            raise self._lacks("output_shape", ", such as (classes,)")
        return tuple(shape)

    def known_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return ``input_shape`` and ``output_shape`` as far as they are known without reading data."""
        known = {name: getattr(self._datasets[self._train], name, None) for name in ("input_shape", "output_shape")}
        known["input_shape"] = known["input_shape"] or vars(self).get("input_shape")
        return {name: tuple(shape) for name, shape in known.items() if shape is not None}

    def first_samples(self) -> Any:
        """Return a batch of the first training samples."""
        return first_samples(self._first_source(), self._whole_batch(self._train))

    def drawn_samples(self, count: int, draw: int) -> Any:
        """Return a batch of training samples as they are drawn for the n-th time; see ``DataContainer``."""
        if self._training is None:
            last = len(self._datasets[self._train]) - 1
            spread = np.unique(np.linspace(0, last, count).astype(np.int64))
            return drawn_samples(self._source_of(self._train), spread, draw)
        return drawn_samples(self._first_source(), np.arange(count), draw)

    def describe(self, key: str) -> dict[str, Any]:
        """Return class, size and digest of a dataset."""
        dataset = self._datasets[key]
        return {
            "class": f"{type(dataset).__module__}.{type(dataset).__qualname__}",
            "size": len(dataset) if hasattr(dataset, "__len__") else None,
            "digest": self._probe(key).digest,
        }

    def check_repeatable(self) -> None:
        """Warn of map-style datasets that return other data for the same seeds."""
        for key, dataset in self._datasets.items():
            if not is_map_style(dataset):
                continue
            if not is_repeatable(self._source_of(key), self._whole_batch(key), self._probe(key)):
                _LOGGER.warning(
                    "warning: data.datasets.%s: a %s returns other data when the same samples are fetched again with "
                    "the same seeds, so a resume or another number of workers is not exact. Draw from torch, "
                    "numpy.random or random, which are seeded for each batch, or seed a generator of your own from one "
                    "of them in __getitem__; do not count calls or read the clock",
                    *(key, type(dataset).__name__),
                )

    def _first_source(self, remedy: str = "") -> Any:
        """Return what the first samples for training are fetched from, without moving a stream on."""
        if self._training is None:
            return self._source_of(self._train)
        if (source := self._training.first_source()) is None:
            raise ConfigError(
                f"the first samples of such a stream cannot be read without moving it on{remedy}",
                path=f"data.datasets.{self._train}",
            )
        return source

    def _probe(self, key: str) -> Probe:
        if key not in self._probes:
            dataset = self._datasets[key]
            self._probes[key] = (
                probe_stream(dataset)
                if is_stream(dataset)
                else probe_dataset(self._source_of(key), self._whole_batch(key))
            )
        return self._probes[key]

    def _whole_batch(self, key: str) -> int:
        """Return how many samples a batch has, which a collate function may depend on."""
        dataset = self._datasets[key]
        return min(self._batch_size, len(dataset)) if is_map_style(dataset) else self._batch_size

    def _lacks(self, attribute: str, more: str) -> ConfigError:
        name = type(self._datasets[self._train]).__name__
        return ConfigError(f"{name} has no attribute '{attribute}'{more}", path=f"data.datasets.{self._train}")
