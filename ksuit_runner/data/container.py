"""All datasets of a run, and the one stream that delivers the batches of training and evaluation."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import count
from time import perf_counter
from typing import Any

import numpy as np

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.batch_plan import BatchPlan, Evaluation, evaluation_requests
from ksuit_runner.data.collators import Collated, CollateFn, collate_fns
from ksuit_runner.data.fetch_batch import EVALUATION, BatchRequest, Part, fetch_batch
from ksuit_runner.data.iterable_source import EvaluatedSource, StreamOrder, is_map_style, is_seekable, is_stream
from ksuit_runner.data.order import CheckedOrder, Order, Shuffled
from ksuit_runner.data.probe import (
    Probe,
    drawn_samples,
    first_samples,
    first_shape,
    is_repeatable,
    probe_dataset,
    probe_stream,
)
from ksuit_runner.data.stream import LocalStream, Stream, WorkerStream
from ksuit_runner.data.training_stream import TrainingStream
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import ConfigError, KsuitError, did_you_mean
from ksuit_runner.system.signals import Interruption

_LOGGER = logging.getLogger(__name__)
_GRACE_S = 5.0


class DataContainer:
    """Holds the datasets of a run and hands out their batches.

    Every batch depends only on the seed and its position (dataset, epoch, batch), that of an update also on the number
    of its parts: it is the same with any number of workers and ranks, and a run can start at any update. Evaluations
    that are announced to ``open`` are fetched ahead of time through the workers that also fetch training data.

    A dataset is map-style: ``__len__`` and ``__getitem__(index)``. With ``__getitems__(indices)``, where indices is an
    int64 array of numpy, it can return a whole batch at once, or a list of samples to collate; with ``collate_fn`` it
    turns samples into a batch. Its attributes ``input_shape`` and ``output_shape`` give the model its sizes. A stream,
    which can only be iterated over, may be a dataset as well, see ``iterable_source``.

    Args:
        datasets: Datasets by key.
        batch_size: Samples per update.
        seed: Seed of the run.
        eval_batch_size: Samples per batch of an evaluation; as in training if None.
        num_workers: Processes that fetch ahead of time; 0 fetches in the main process.
        train: Key of the dataset to train on.
        drop_last: Whether training skips an epoch's last, smaller batch. Evaluations keep theirs.
        prefetch: Batches that each worker fetches ahead.
        order: Builds the order of the training samples, from the training dataset, the seed and ``samples_per_epoch``;
            by default ``Shuffled``.
        samples_per_epoch: How many samples count as an epoch; all of them if None. A stream of unknown length has
            no epochs without it.
        collate_fn: Turns a list of samples into a batch, instead of the datasets' own functions; or one such function
            for some datasets, by key.
        interruption: Signals that ask the run to end, and end a wait for data; by default none.
        world: The ranks of the run; by default there is one.

    Attributes:
        datasets: Datasets by key.
        world: The ranks of the run.
        seed: Seed of the run.
        pins_memory: Whether workers leave batches in memory from which a GPU copies behind the program.

    Raises:
        ConfigError: A dataset is missing, empty or neither map-style nor iterable, or a number is too small.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        batch_size: int,
        seed: int,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        train: str = "train",
        drop_last: bool = True,
        prefetch: int = 2,
        interruption: Interruption | None = None,
        world: World | None = None,
        order: Callable[..., Order] | None = None,
        samples_per_epoch: int | None = None,
        collate_fn: Callable[[Any], Any] | Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> None:
        _check_number("batch_size", batch_size, 1)
        _check_number("num_workers", num_workers, 0)
        _check_number("prefetch", prefetch, 1)
        for name, value in (("eval_batch_size", eval_batch_size), ("samples_per_epoch", samples_per_epoch)):
            if value is not None:
                _check_number(name, value, 1)
        for key, dataset in datasets.items():
            _check_dataset(key, dataset)
        self.datasets = dict(datasets)
        self._check_key(train, "data.train")
        self._collate_fns = collate_fns(collate_fn, self.datasets)
        self.batch_size = batch_size
        self.seed = seed
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.train = train
        self.drop_last = drop_last
        self.prefetch = prefetch
        self.interruption = interruption or Interruption()
        self.world = world or World()
        # The others may wait for this rank already: the update is finished if its batch comes soon.
        self._grace_s = _GRACE_S if self.world.size > 1 else 0.0
        self.pins_memory = False
        self._order = self._build_order(order, samples_per_epoch)
        self._training = None
        if is_stream(self.train_dataset):
            self._training = TrainingStream(
                self.train_dataset, self._collate_fn(train), train, seed, batch_size, self.world
            )
        self._probes: dict[str, Probe] = {}
        self._stream: Stream | None = None
        self._delivered: list[Part] = []
        self._wait_seconds = 0.0

    def _build_order(
        self, order: Callable[..., Order] | None, samples_per_epoch: int | None
    ) -> CheckedOrder | StreamOrder:
        dataset = self.train_dataset
        if is_stream(dataset):
            if order is not None:
                raise ConfigError("the training dataset is a stream, which has an order of its own", path="data.order")
            if samples_per_epoch is None and hasattr(dataset, "__len__"):
                samples_per_epoch = len(dataset)
            if samples_per_epoch is not None and samples_per_epoch < self.batch_size:
                raise ConfigError(
                    f"{self.batch_size} is more than the {samples_per_epoch} samples of an epoch",
                    path="data.batch_size",
                )
            # Of whole batches, so that nothing is left over between two epochs.
            return StreamOrder(samples_per_epoch and samples_per_epoch - samples_per_epoch % self.batch_size)
        try:
            return CheckedOrder(
                (order or Shuffled)(dataset=dataset, seed=self.seed, samples_per_epoch=samples_per_epoch)
            )
        except KsuitError as error:
            error.locate("data.order")
            raise

    # Properties of the datasets

    @property
    def _sources(self) -> dict[str, Any]:
        """What batches are fetched from, by key: map-style datasets, with the collate functions of the config."""
        return {
            key: Collated(dataset, self._collate_fns[key]) if key in self._collate_fns else dataset
            for key, dataset in self.datasets.items()
            if is_map_style(dataset)
        }

    @property
    def train_dataset(self) -> Any:
        """The dataset to train on."""
        return self.datasets[self.train]

    @cached_property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a model's input without the batch dimension.

        It is the training dataset's ``input_shape``, or else the shape of the first element of its first sample.

        Raises:
            ConfigError: The dataset has no such attribute, and the first element has no shape.
        """
        shape = getattr(self.train_dataset, "input_shape", None) or first_shape(
            self._first_source(), self._whole_batch(self.train)
        )
        if shape is None:
            raise self._lacks("input_shape", ", and its samples do not begin with a tensor")
        return tuple(shape)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of a model's output without the batch dimension: the training dataset's ``output_shape``.

        Raises:
            ConfigError: The dataset has no such attribute.
        """
        shape = getattr(self.train_dataset, "output_shape", None)
        if shape is None:
            raise self._lacks("output_shape", ", such as (classes,)")
        return tuple(shape)

    def known_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return ``input_shape`` and ``output_shape`` as far as they are known without reading data."""
        known = {name: getattr(self.train_dataset, name, None) for name in ("input_shape", "output_shape")}
        known["input_shape"] = known["input_shape"] or vars(self).get("input_shape")
        return {name: tuple(shape) for name, shape in known.items() if shape is not None}

    def first_samples(self) -> Any:
        """Return a batch of the first training samples, with all random generators undisturbed."""
        return first_samples(self._first_source(), self._whole_batch(self.train))

    def drawn_samples(self, count: int, draw: int) -> Any:
        """Return a batch of training samples as they are drawn for the n-th time: with other augmentations each time.

        They are spread from the first to the last one, and the first ones of a stream. Training is not disturbed.

        Args:
            count: Number of samples; all if there are fewer.
            draw: Key of what is drawn at random.

        Raises:
            ConfigError: The training dataset is a stream that this would move on.
        """
        if self._training is None:
            source, last = self._sources[self.train], len(self.train_dataset) - 1
            return drawn_samples(source, np.unique(np.linspace(0, last, count).astype(np.int64)), draw)
        if (stream := self._training.first_source()) is None:
            raise ConfigError(
                "the first samples of such a stream cannot be read without moving it on",
                path=f"data.datasets.{self.train}",
            )
        return drawn_samples(stream, np.arange(count), draw)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return class, size and digest by dataset key, to record which data a run uses.

        The digest covers class, size and a few samples; of a stream, whose size is None, only the class. The same data
        has the same digest in every process.
        """
        return {
            key: {
                "class": f"{type(dataset).__module__}.{type(dataset).__qualname__}",
                "size": len(dataset) if hasattr(dataset, "__len__") else None,
                "digest": self._probe(key).digest,
            }
            for key, dataset in self.datasets.items()
        }

    def check_repeatable(self) -> None:
        """Warn of datasets that return other data for the same seeds: runs with them are not exact."""
        for key, source in self._sources.items():
            if not is_repeatable(source, self._whole_batch(key), self._probe(key)):
                _LOGGER.warning(
                    "warning: data.datasets.%s: a %s returns other data when the same samples are fetched again with "
                    "the same seeds, so a resume or another number of workers is not exact. Draw from torch, "
                    "numpy.random or random, which are seeded for each batch, or seed a generator of your own from one "
                    "of them in __getitem__; do not count calls or read the clock",
                    *(key, type(self.datasets[key]).__name__),
                )
        if self._training is not None:
            self._training.check(self.num_workers)

    def _first_source(self) -> Any:
        """Return what the first samples for training are fetched from, without moving a stream on."""
        if self._training is None:
            return self._sources[self.train]
        if (source := self._training.first_source()) is None:
            raise self._lacks("input_shape", ", and the first samples of such a stream cannot be read in advance")
        return source

    def _collate_fn(self, key: str) -> CollateFn | None:
        return self._collate_fns.get(key) or getattr(self.datasets[key], "collate_fn", None)

    def _probe(self, key: str) -> Probe:
        if key not in self._probes:
            dataset = self.datasets[key]
            self._probes[key] = (
                probe_stream(dataset)
                if is_stream(dataset)
                else probe_dataset(self._sources[key], self._whole_batch(key))
            )
        return self._probes[key]

    def _whole_batch(self, key: str) -> int:
        """Return how many samples a batch has, which a collate function may depend on."""
        dataset = self.datasets[key]
        return min(self.batch_size, len(dataset)) if is_map_style(dataset) else self.batch_size

    def new_counter(
        self, max_epochs: int | None = None, max_updates: int | None = None, max_samples: int | None = None
    ) -> UpdateCounter:
        """Return a counter for training on this data up to the first end that is reached.

        Raises:
            ConfigError: No end is given, or the training dataset does not fill a single batch.
        """
        size = len(self._order) if isinstance(self._order, CheckedOrder) else self._order.samples_per_epoch
        return UpdateCounter(size, self.batch_size, self.drop_last, max_epochs, max_updates, max_samples)

    # The stream of batches

    def open(
        self, counter: UpdateCounter, evaluations: Sequence[Evaluation] = (), parts: int = 1, in_step: bool = False
    ) -> None:
        """Start fetching at the counter's position, for all updates up to its end.

        Args:
            counter: Position and end of training.
            evaluations: When which dataset will be evaluated, in the order in which it will be asked for.
            parts: Number of parts of the batch of an update, over all ranks.
            in_step: Whether all ranks evaluate as many batches, see ``SharedPass``.

        Raises:
            ConfigError: An evaluation names a dataset that does not exist.
        """
        for evaluation in evaluations:
            self._check_key(evaluation.dataset_key, "data.datasets")
        self.close()
        lengths = {key: len(dataset) for key, dataset in self.datasets.items() if is_map_style(dataset)}
        evaluations = [evaluation for evaluation in evaluations if evaluation.dataset_key in lengths]
        plan = BatchPlan(
            lengths, self.train, self._order, counter, evaluations, self.eval_batch_size, parts, self.world, in_step
        )
        sources, workers = self._sources, self.num_workers
        if self._training is not None:
            sources = {**sources, self.train: self._training.source(counter, parts)}
            workers = self._training.most_workers(workers)
        self._stream = self._new_stream(plan, sources, workers)

    def state_dict(self, update: int) -> dict[str, Any]:
        """Return the state of a training stream after an update, the last one or the one before; mostly empty."""
        return {} if self._training is None else self._training.state_dict(update)

    def load_state_dict(self, state_dict: Mapping[str, Any], update: int) -> None:
        """Restore the state of a training stream after an update, before ``open``."""
        if self._training is not None:
            self._training.load_state_dict(state_dict, update)

    def next_training_batch(self) -> list[Part]:
        """Return the parts of the next update's batch that are this rank's: none if there are fewer samples than parts.

        Batches of evaluations that did not take place are dropped.

        Raises:
            StopIteration: There is no further update.
            Interrupted: A signal asked the run to end.
            Exception: What the dataset raised.
        """
        stream = self._stream
        assert stream is not None, "open() comes first"
        start = perf_counter()
        try:
            while (head := stream.head) is not None and head.epoch == EVALUATION:
                stream.drop()
            if head is None:
                raise StopIteration("there is no further update")
            return self._deliver(self.interruption.wait_for(stream.take, self._grace_s), head)
        finally:
            self._wait_seconds += perf_counter() - start

    def batches_in(self, dataset_key: str, batch_size: int | None = None) -> int | None:
        """Return the number of batches of a dataset in an evaluation; None of a stream, which ends when it ends.

        Raises:
            ConfigError: There is no such dataset.
        """
        self._check_key(dataset_key, "data.datasets")
        dataset = self.datasets[dataset_key]
        return -(-len(dataset) // (batch_size or self.eval_batch_size)) if is_map_style(dataset) else None

    def evaluation_batches(
        self,
        dataset_key: str,
        batch_size: int | None = None,
        max_batches: int | None = None,
        numbers: Iterable[int] | None = None,
    ) -> Iterator[Any]:
        """Return the batches of a dataset in order, the last one may be smaller.

        They come from the stream if this evaluation is next in it, and are fetched now otherwise. Either way they are
        the same, and training data that was fetched ahead is not lost.

        Args:
            dataset_key: Key of the dataset.
            batch_size: Samples per batch; by default ``eval_batch_size``.
            max_batches: Number of batches; by default all.
            numbers: Numbers of those among them that are returned, ascending; by default all.

        Raises:
            ConfigError: There is no such dataset.
            Interrupted: A signal asked the run to end, before or while a batch was fetched.
            Exception: What the dataset raised.
        """
        size, length = batch_size or self.eval_batch_size, self.batches_in(dataset_key, batch_size)
        if length is not None:
            most = length if max_batches is None else min(length, max_batches)
            return self._evaluation_batches(dataset_key, size, range(most) if numbers is None else numbers)
        is_training = self.datasets[dataset_key] is self.train_dataset
        if is_training and (max_batches is None or not is_seekable(self.train_dataset)):
            raise ConfigError(
                "training reads this stream, which can only be evaluated if it has a method iterate(position), and a "
                "callback says how much of it to read: max_batches",
                path=f"data.datasets.{dataset_key}",
            )
        if numbers is None:
            numbers = count() if max_batches is None else range(max_batches)
        return self._stream_batches(dataset_key, size, iter(numbers))

    def first_evaluation_batch(self, dataset_key: str, batch_size: int | None = None) -> Any:
        """Return the first of ``evaluation_batches``, fetched in this process; the stream of batches stays as it is.

        Raises:
            ConfigError: There is no such dataset.
            Interrupted: A signal asked the run to end.
            Exception: What the dataset raised.
        """
        length = self.batches_in(dataset_key, batch_size)
        if length is None:
            return next(self.evaluation_batches(dataset_key, batch_size, 1))
        size, samples = batch_size or self.eval_batch_size, len(self.datasets[dataset_key])
        [request] = evaluation_requests(dataset_key, samples, size, [0])
        take = partial(fetch_batch, self._sources, self.seed, request)
        return self._deliver_one(self.interruption.wait_for(take), len(request.indices))

    def _stream_batches(self, dataset_key: str, size: int, numbers: Iterator[int]) -> Iterator[Any]:
        """Read a stream, in this process: nobody knows in advance how many batches it has."""
        source = EvaluatedSource(self.datasets[dataset_key], self._collate_fn(dataset_key))
        wanted = next(numbers, None)
        for number in count():
            if wanted is None:
                return
            request = BatchRequest(dataset_key, EVALUATION, number, np.arange(number * size, (number + 1) * size))
            take = partial(fetch_batch, {dataset_key: source}, self.seed, request)
            batch, samples = self.interruption.wait_for(take)
            if samples and number == wanted:
                yield self._deliver_one(batch, samples)
                wanted = next(numbers, None)
            elif not samples and number == 0:
                raise KsuitError(
                    f"a {type(self.datasets[dataset_key]).__name__} has no samples; a stream has to begin again "
                    "whenever it is iterated over, which a generator does not",
                    path=f"data.datasets.{dataset_key}",
                )
            if samples < size:
                return

    def _evaluation_batches(self, dataset_key: str, batch_size: int, numbers: Iterable[int]) -> Iterator[Any]:
        requests = evaluation_requests(dataset_key, len(self.datasets[dataset_key]), batch_size, numbers)
        stream, sources = self._stream, self._sources
        if stream is None or stream.head is None:
            yield from self._separate_stream(requests)
            return
        while stream.head is not None and stream.head.epoch == EVALUATION and not stream.head.begins:
            stream.drop()  # the rest of an evaluation that ended early
        for request in requests:
            if stream.head is not None and stream.head.is_same(request):
                take = stream.take
            else:
                take = partial(fetch_batch, sources, self.seed, request)
            yield self._deliver_one(self.interruption.wait_for(take), len(request.indices))

    def _separate_stream(self, requests: Iterator[BatchRequest]) -> Iterator[Any]:
        stream = self._new_stream(requests, self._sources, self.num_workers)
        try:
            while (head := stream.head) is not None:
                yield self._deliver_one(self.interruption.wait_for(stream.take), len(head.indices))
        finally:
            stream.close()

    def samples_in(self, batch: Any) -> int | None:
        """Return how many samples were fetched for the batch, or the parts, returned last; None for any other batch."""
        return next((part.samples for part in self._delivered if part.batch is batch), None)

    def _deliver(self, batches: Sequence[Any], request: BatchRequest) -> list[Part]:
        if self._training is not None:
            batches = [self._training.unpack(batch, request) for batch in batches]
        assert request.spans is not None
        self._delivered = [
            Part(batch, number, stop - start)
            for batch, (number, start, stop) in zip(batches, request.spans, strict=True)
        ]
        return self._delivered

    def _deliver_one(self, batch: Any, samples: int) -> Any:
        self._delivered = [Part(batch, 0, samples)]
        return batch

    def take_wait_seconds(self) -> float:
        """Return how long training has waited for data since the last call, in seconds."""
        seconds, self._wait_seconds = self._wait_seconds, 0.0
        return seconds

    def close(self) -> None:
        """End the stream and its workers; ``open`` may follow again."""
        self._delivered = []
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _new_stream(self, plan: Any, sources: Mapping[str, Any], num_workers: int) -> Stream:
        if num_workers == 0:
            return LocalStream(sources, self.seed, plan)
        return WorkerStream(sources, self.seed, plan, num_workers, self.prefetch, self.pins_memory)

    def _check_key(self, key: str, path: str) -> None:
        if key not in self.datasets:
            raise ConfigError(f"there is no dataset '{key}'. {did_you_mean(key, self.datasets)}", path=path)

    def _lacks(self, attribute: str, more: str) -> ConfigError:
        name = type(self.train_dataset).__name__
        return ConfigError(f"{name} has no attribute '{attribute}'{more}", path=f"data.datasets.{self.train}")


def _check_number(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"must be a whole number of at least {least}, not {value!r}", path=f"data.{name}")


def _check_dataset(key: str, dataset: Any) -> None:
    path, name = f"data.datasets.{key}", type(dataset).__name__
    if not is_map_style(dataset) and not is_stream(dataset):
        raise ConfigError(
            f"{name} is not a dataset: it needs __len__ and __getitem__, or for a stream __iter__ or iterate", path=path
        )
    if is_map_style(dataset) and len(dataset) == 0:
        raise ConfigError(f"{name} is empty", path=path)
