"""Base classes of callbacks that act at intervals, and of those that evaluate a dataset."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from sys import maxsize
from typing import Any, ClassVar

import torch
from torch import nn

from ksuit_runner.callback_base import CallbackBase, template
from ksuit_runner.config.types import DatasetKey, PositiveInt, check_numbers
from ksuit_runner.counter import Interval, UpdateCounter
from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import mix, seed_all
from ksuit_runner.tensors.device import widest_float
from ksuit_runner.trainer.evaluation_pass import BatchReader, go_through
from ksuit_runner.trainer.gathered import Gathered
from ksuit_runner.trainer.stored_weights import weights_at


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
        is_repeatable: Whether another callback of this class would log the same values after the same update: not if
            they are measured, or cover the updates since the last log. Two callbacks that are not repeatable and whose
            intervals meet must not log the same metric, which is checked before training.
        is_idle: Whether ``periodic_callback`` would do nothing in this run, and is not called; a constructor sets it.

    Raises:
        ConfigError: None of these is given, or an interval is not a positive whole number.
    """

    is_repeatable: ClassVar[bool] = True
    is_idle: bool = False

    def __init__(
        self,
        every_n_epochs: PositiveInt | None = None,
        every_n_updates: PositiveInt | None = None,
        every_n_samples: PositiveInt | None = None,
        at_start: bool = False,
        at_end: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.interval = Interval(every_n_epochs, every_n_updates, every_n_samples, at_start, at_end)
        self._until_due = range(0)  # updates before the one with which the interval is due next

    @property
    def sum_dtype(self) -> torch.dtype:
        """Type to sum up in: float64, or float32 on MPS, which lacks it."""
        return widest_float(self.trainer.device)

    @template
    def periodic_callback(self, update_counter: UpdateCounter) -> None:
        """Called when the interval is due, after ``after_update`` and ``after_epoch``, or at the start or the end."""
        self._periodic_callback(update_counter=update_counter)

    def _periodic_callback(self, update_counter: UpdateCounter) -> None: ...

    def follows(self, update_counter: UpdateCounter) -> bool:
        """Whether the callback acts after the update that is being computed; for hooks that prepare for it.

        Asking at every update costs next to nothing. An end that comes early (``at_end``) is not foreseen.
        """
        update = update_counter.update
        if update not in self._until_due:
            due = self.interval.next_due(update_counter)
            self._until_due = range(update, maxsize if due is None else due)
        return update + 1 == self._until_due.stop


class DatasetCallback(PeriodicCallback):
    """A periodic callback that evaluates a dataset, in order, with the model in evaluation mode.

    A subclass defines what is done with a batch (``_process_batch``) and with the results (``_process_results``). By
    default it also evaluates at the end of a run, which may be inside an epoch. The batches are fetched ahead of time,
    by the workers that fetch training data as well.

    Callbacks that follow each other in the config and evaluate the same dataset in batches of the same size at the same
    update share one pass over it: a batch is fetched and moved to the device once. Each gets the same results, errors
    and random numbers as if it were alone.

    On several ranks, every rank evaluates all batches, unless the callback says ``shares_work``: then each rank
    evaluates some of them, and adds what it finds to ``self.gathered``, which puts together what all ranks have found.
    The results are those of one process, to the last bit::

        shares_work = True

        def _process_batch(self, batch, models):
            inputs, targets = batch
            for weights, model in models.items():
                errors = (self.trainer.predict(inputs, model) - targets).abs()
                self.gathered.add(weights, errors.sum(), count=errors.numel())

        def _process_results(self, update_counter):
            for weights, total in self.gathered.totals.items():
                self.writer.add_scalar(self.metric_key("mean_error", weights), total.mean)

    Args:
        dataset_key: Key of the dataset under ``data.datasets``.
        batch_size: Samples per batch; None takes ``data.eval_batch_size``.
        max_batches: Evaluate only so many batches, the first ones; None evaluates all.
        at_end: Evaluate at the end of the run, too.
        weights_of: Evaluate once, after training, with the weights of the checkpoint that has this tag, such as the
            best one. The names of the weights, and so the keys of metrics, begin with the tag:
            ``accuracy/test/best``, ``accuracy/test/best/ema``.
        **kwargs: Passed on to PeriodicCallback.

    Attributes:
        shares_batch: Whether the callback leaves the batch and the outputs of models as they are, and does not depend
            on hooks in the models. Then outputs are computed once for all such callbacks, and otherwise the callback
            gets a copy of the batch. A class with a ``_process_batch`` of its own does not inherit it.
        shares_work: Whether all that ``_process_batch`` finds goes through ``gathered``, so that the ranks can share
            the batches. A class with a ``_process_batch`` of its own does not inherit it.
        gathered: Collects sums, means and rows of batches, and provides those of the whole dataset in
            ``_process_results``, see ``Gathered``.

    Raises:
        ConfigError: A number is smaller than 1, or there is an interval beside ``weights_of``.
    """

    shares_batch: ClassVar[bool] = False
    shares_work: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("shares_batch", "shares_work"):
            if "_process_batch" in vars(cls) and name not in vars(cls):
                setattr(cls, name, False)

    def __init__(
        self,
        dataset_key: DatasetKey,
        batch_size: PositiveInt | None = None,
        max_batches: PositiveInt | None = None,
        at_end: bool = True,
        weights_of: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(at_end=at_end, **kwargs)
        if weights_of is not None and self.interval != Interval(at_end=True):
            raise ConfigError("weights_of: it means one evaluation after training; leave out at_start and every_n_*")
        switches = any(member.switches_weights for member in self.trainer.optimizers.members.values())
        if weights_of is not None and switches and self.trainer.strategy.is_sharded:
            raise ConfigError("weights_of: strategy=fsdp copies no optimizer that evaluates other weights; use ddp")
        check_numbers("PositiveInt", batch_size=batch_size, max_batches=max_batches)
        self.dataset_key = dataset_key
        self.batch_size = batch_size
        self.max_batches = max_batches
        self.weights_of = weights_of
        self.gathered = Gathered(self.trainer.device, self.sum_dtype)
        self.further: list[FurtherDataset] = []
        self.companions: Sequence[DatasetCallback] = ()
        self._seen: BaseException | bool = False

    def also_read(self, dataset_key: str, max_batches: int | None = None) -> FurtherDataset:
        """Read another dataset as well at each evaluation; what is found in it is in ``gathered`` of what is returned.

        Args:
            dataset_key: Key of the dataset.
            max_batches: Read only so many batches of it, the first ones; None reads all.
        """
        self.further.append(FurtherDataset(self, dataset_key, max_batches))
        return self.further[-1]

    @property
    def readers(self) -> list[BatchReader]:
        """What reads a dataset for this callback: itself, and then its further datasets."""
        return [self, *self.further]

    @property
    def has_read(self) -> bool:
        """Whether it has read the batches already, in a pass that another callback has asked for."""
        return self._seen is not False

    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        self.evaluate(update_counter)

    def evaluate(self, update_counter: UpdateCounter) -> None:
        """Evaluate the dataset once, with the live weights and with all others that are offered for evaluation."""
        if not self.has_read and not self._read():
            return
        seen, self._seen = self._seen, False
        if isinstance(seen, BaseException):
            raise seen
        if self.further:
            self._read_further()
        self.writer.source = self.display_name
        for reader in self.readers:
            reader.gathered.finish(self.data_container.world)
        # The models that are offered may have drawn, too.
        seed_all(mix(self.data_container.seed, "results", str(self.name), update_counter.update))
        self._process_results(update_counter)
        for reader in self.readers:
            reader.gathered.start()

    def _read(self) -> bool:
        """Go through the dataset, together with the companions; not if the weights to evaluate are not there."""
        readers, self.companions = [self, *self.companions], ()
        with self._models() as models:
            if not models:
                return False
            failures = go_through(readers, self.trainer, models)
        for number, reader in enumerate(readers):
            reader._seen = failures.get(number, True)
        return True

    def _read_further(self) -> None:
        with self._models() as models:
            for reader in self.further:
                for error in go_through([reader], self.trainer, models).values():
                    raise error

    @contextmanager
    def _models(self) -> Iterator[Mapping[str, nn.Module]]:
        tag, live = self.weights_of, self.trainer.evaluation_models
        if tag is None:
            yield live
        elif self.checkpoint_writer.is_requested_as(tag):  # the present weights, which are about to be written
            yield _tagged(live, tag)
        elif (checkpoint := self.checkpoint_writer.read_tagged(tag)) is not None:
            with weights_at(self.trainer, checkpoint) as models:
                yield _tagged(models, tag)
        else:
            path = f"callbacks.{self.display_name}.weights_of"
            self.logger.warning("%s: no checkpoint has the tag '%s', and nothing is evaluated", path, tag)
            yield {}

    def evaluated_checkpoint(self, update_counter: UpdateCounter) -> str:
        """Return the name of the checkpoint that has the weights which are evaluated now."""
        tag, writer, present = self.weights_of, self.checkpoint_writer, str(update_counter.progress)
        if tag is None or writer.is_requested_as(tag):
            return present
        return writer.name_of(tag) or present

    def read_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        """Process one batch, with its metrics under the callback's name."""
        self.writer.source = self.display_name
        self._process_batch(batch, models)

    def metric_key(self, metric: str, weights: str) -> str:
        """Return the key of a metric: ``accuracy/test`` for the live weights, ``accuracy/test/ema`` for others."""
        return "/".join(part for part in (metric, self.dataset_key, weights) if part)

    def inputs_of(self, samples: Sequence[int]) -> list[Any]:
        """Return the inputs of some samples, by their numbers in the dataset.

        Their batches are read once more. It is for inputs that are needed of a few samples, such as pictures, and that
        would take too much memory if those of all were kept.
        """
        size, inputs = self.batch_size or self.data_container.eval_batch_size, {}
        numbers = sorted({sample // size for sample in samples})
        batches = self.data_container.evaluation_batches(self.dataset_key, size, None, numbers)
        for number, batch in zip(numbers, batches, strict=True):
            of_batch = self.trainer.inputs_and_targets(batch)[0]
            inputs.update({sample: of_batch[sample % size] for sample in samples if sample // size == number})
        return [inputs[sample] for sample in samples]

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
        """Log the results of all batches, and reset what is not in ``gathered``."""


class FurtherDataset:
    """Another dataset that a callback reads at each evaluation, after its own one, with the same ``_process_batch``.

    Args:
        callback: The callback.
        dataset_key: Key of the dataset.
        max_batches: Number of batches to read; None reads all.

    Attributes:
        gathered: Collects what is found in its batches, instead of that of the callback.
    """

    def __init__(self, callback: DatasetCallback, dataset_key: str, max_batches: int | None = None) -> None:
        self._callback = callback
        self.dataset_key = dataset_key
        self.batch_size = callback.batch_size
        self.max_batches = max_batches
        self.shares_batch = callback.shares_batch
        self.shares_work = callback.shares_work
        self.display_name = callback.display_name
        self.gathered = Gathered(callback.trainer.device, callback.sum_dtype)

    def read_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        """Let the callback process a batch, with ``gathered`` in the place of its own."""
        own, self._callback.gathered = self._callback.gathered, self.gathered
        try:
            self._callback.read_batch(batch, models)
        finally:
            self._callback.gathered = own


def _tagged(models: Mapping[str, nn.Module], tag: str) -> dict[str, nn.Module]:
    return {f"{tag}/{name}" if name else tag: model for name, model in models.items()}
