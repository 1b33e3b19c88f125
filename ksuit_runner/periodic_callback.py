"""Base classes of callbacks that act at intervals, and of those that evaluate a dataset."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ksuit_runner.callback_base import CallbackBase, template
from ksuit_runner.config.types import DatasetKey
from ksuit_runner.counter import Interval, UpdateCounter
from ksuit_runner.keyed_random import mix, seed_all


class PeriodicCallback(CallbackBase):
    """A callback that acts every n epochs, updates or samples: override ``_periodic_callback``.

    Where several of these are given, it acts whenever one of them is due, and once where they coincide.

    Args:
        every_n_epochs: Act after every n-th epoch.
        every_n_updates: Act after every n-th update.
        every_n_samples: Act after the update with which another n samples have been seen.
        at_start: Act before the first update.
        at_end: Act after the last update, wherever a run ends, also if a callback ends it early.
        **kwargs: Passed on to CallbackBase.

    Attributes:
        is_repeatable: Whether another callback of this class logs the same values after the same update. Not if they
            cover the updates of an interval, or are measured: two such callbacks whose intervals meet cannot share
            a metric, which is checked before training.

    Raises:
        ConfigError: None of these is given, or an interval is not a positive whole number.
    """

    is_repeatable: ClassVar[bool] = True

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_updates: int | None = None,
        every_n_samples: int | None = None,
        at_start: bool = False,
        at_end: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.interval = Interval(every_n_epochs, every_n_updates, every_n_samples, at_start, at_end)

    @template
    def periodic_callback(self, update_counter: UpdateCounter) -> None:
        """Called when the interval is due, after ``after_update`` and ``after_epoch``, or at the start or the end."""
        self._periodic_callback(update_counter=update_counter)

    def _periodic_callback(self, update_counter: UpdateCounter) -> None: ...


class DatasetCallback(PeriodicCallback):
    """A periodic callback that evaluates a dataset, in order, with the model in evaluation mode.

    By default it also evaluates at the end of a run, which may be inside an epoch.

    The batches come through the workers that also fetch training data, ahead of time. A subclass defines what is done
    with a batch (``_process_batch``) and with the results (``_process_results``).

    Args:
        dataset_key: Key of the dataset under ``data.datasets``.
        at_end: Evaluate at the end of the run, too.
        **kwargs: Passed on to PeriodicCallback.
    """

    def __init__(self, dataset_key: DatasetKey, at_end: bool = True, **kwargs: Any) -> None:
        super().__init__(at_end=at_end, **kwargs)
        self.dataset_key = dataset_key

    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        self.evaluate(update_counter)

    def evaluate(self, update_counter: UpdateCounter) -> None:
        """Evaluate the dataset once, with the live weights and with all others that are offered for evaluation."""
        models = self.trainer.evaluation_models
        with self.trainer.evaluation():
            for number, batch in enumerate(self.data_container.evaluation_batches(self.dataset_key)):
                # Each evaluation draws the same for a batch, so that values of two updates can be compared.
                seed_all(mix(self.data_container.seed, "evaluation", self.dataset_key, number))
                self._process_batch(self.trainer.to_device(batch), models)
        # The models that are offered may have drawn, too.
        seed_all(mix(self.data_container.seed, "results", str(self.name), update_counter.update))
        self._process_results(update_counter)

    @property
    def sum_dtype(self) -> torch.dtype:
        """Type to sum up in: float64, or float32 on MPS, which lacks it."""
        return torch.float32 if self.trainer.device.type == "mps" else torch.float64

    def metric_key(self, metric: str, weights: str) -> str:
        """Return the key of a metric: ``accuracy/test`` for the live weights, ``accuracy/test/ema`` for others."""
        return "/".join(part for part in (metric, self.dataset_key, weights) if part)

    @abstractmethod
    def _process_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        """Process one batch.

        Args:
            batch: The samples, on the device, as they collate: mostly ``(inputs, targets)``, both of shape
                (samples, ...); the last batch may be smaller.
            models: Models to evaluate by the name of their weights; the live ones have the empty name.
        """

    @abstractmethod
    def _process_results(self, update_counter: UpdateCounter) -> None:
        """Log the results of all batches, and reset them."""
