"""All datasets of a run, and the one stream that delivers the batches of training and evaluation."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from ksuit_runner.config.types import NonNegativeInt, PositiveInt, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.batch_plan import BatchPlan, Evaluation, evaluation_requests
from ksuit_runner.data.batch_supply import BatchSupply, Sources
from ksuit_runner.data.collators import Collated, CollateFn, collate_fns
from ksuit_runner.data.fetch_batch import BatchRequest, Part
from ksuit_runner.data.inspection import Inspection
from ksuit_runner.data.iterable_source import EvaluatedSource, StreamOrder, is_map_style, is_seekable, is_stream
from ksuit_runner.data.order import CheckedOrder, Order, Shuffled
from ksuit_runner.data.stream import LocalStream, Stream, WorkerStream
from ksuit_runner.data.training_stream import TrainingStream
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import ConfigError, KsuitError, did_you_mean
from ksuit_runner.system.signals import Interruption

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
        batch_size: PositiveInt,
        seed: int,
        eval_batch_size: PositiveInt | None = None,
        num_workers: NonNegativeInt = 0,
        train: str = "train",
        drop_last: bool = True,
        prefetch: PositiveInt = 2,
        interruption: Interruption | None = None,
        world: World | None = None,
        order: Callable[..., Order] | None = None,
        samples_per_epoch: PositiveInt | None = None,
        collate_fn: Callable[[Any], Any] | Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> None:
        check_numbers("PositiveInt", "data", batch_size=batch_size, eval_batch_size=eval_batch_size, prefetch=prefetch)
        check_numbers("PositiveInt", "data", samples_per_epoch=samples_per_epoch)
        check_numbers("NonNegativeInt", "data", num_workers=num_workers)
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
        self.pins_memory = False
        self._order = self._build_order(order, samples_per_epoch)
        self._training = None
        if is_stream(self.train_dataset):
            self._training = TrainingStream(
                self.train_dataset, self._collate_fn(train), train, seed, batch_size, self.world
            )
        self._inspection = Inspection(self.datasets, self._source_of, train, batch_size, self._training)
        # The others may wait for this rank already: the update is finished if its batch comes soon.
        grace_s = _GRACE_S if self.world.size > 1 else 0.0
        self._supply = BatchSupply(self._new_stream, seed, self._training, self.interruption, grace_s)

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
        return {key: self._source_of(key) for key, dataset in self.datasets.items() if is_map_style(dataset)}

    def _source_of(self, key: str) -> Any:
        """Return what batches of a map-style dataset are fetched from: it has the collate function of the config."""
        dataset = self.datasets[key]
        return Collated(dataset, self._collate_fns[key]) if key in self._collate_fns else dataset

    @property
    def train_dataset(self) -> Any:
        """The dataset to train on."""
        return self.datasets[self.train]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a model's input without the batch dimension.

        It is the training dataset's ``input_shape``, or else the shape of the first element of its first sample.

        Raises:
            ConfigError: The dataset has no such attribute, and the first element has no shape.
        """
        return self._inspection.input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of a model's output without the batch dimension: the training dataset's ``output_shape``.

        Raises:
            ConfigError: The dataset has no such attribute.
        """
        return self._inspection.output_shape

    def known_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return ``input_shape`` and ``output_shape`` as far as they are known without reading data."""
        return self._inspection.known_shapes()

    def first_samples(self) -> Any:
        """Return a batch of the first training samples, with all random generators undisturbed."""
        return self._inspection.first_samples()

    def drawn_samples(self, count: int, draw: int) -> Any:
        """Return a batch of training samples as they are drawn for the n-th time: with other augmentations each time.

        They are spread from the first to the last one, and the first ones of a stream. Training is not disturbed.

        Args:
            count: Number of samples; all if there are fewer.
            draw: Key of what is drawn at random.

        Raises:
            ConfigError: The training dataset is a stream that this would move on.
        """
        return self._inspection.drawn_samples(count, draw)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return class, size and digest by dataset key, to record which data a run uses.

        The digest covers class, size and a few samples; of a stream, whose size is None, only the class. The same data
        has the same digest in every process.
        """
        return {key: self._inspection.describe(key) for key in self.datasets}

    def check_repeatable(self) -> None:
        """Warn of datasets that return other data for the same seeds: runs with them are not exact."""
        self._inspection.check_repeatable()
        if self._training is not None:
            self._training.check(self.num_workers)

    def _collate_fn(self, key: str) -> CollateFn | None:
        return self._collate_fns.get(key) or getattr(self.datasets[key], "collate_fn", None)

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
        self._supply.open(self._new_stream(plan, sources, workers))

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
        return self._supply.next_training_batch()

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
            numbers = range(most) if numbers is None else numbers
            requests = evaluation_requests(dataset_key, len(self.datasets[dataset_key]), size, numbers)
            return self._supply.evaluation_batches(requests, self._sources)
        is_training = self.datasets[dataset_key] is self.train_dataset
        if is_training and (max_batches is None or not is_seekable(self.train_dataset)):
            raise ConfigError(
                "training reads this stream, which can only be evaluated if it has a method iterate(position), and a "
                "callback says how much of it to read: max_batches",
                path=f"data.datasets.{dataset_key}",
            )
        if numbers is None:
            numbers = count() if max_batches is None else range(max_batches)
        source = EvaluatedSource(self.datasets[dataset_key], self._collate_fn(dataset_key))
        return self._supply.batches_of_a_stream(dataset_key, source, size, iter(numbers))

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
        return self._supply.fetch(request, self._sources)

    def samples_in(self, batch: Any) -> int | None:
        """Return how many samples were fetched for the batch, or the parts, returned last; None for any other batch."""
        return self._supply.samples_in(batch)

    def take_wait_seconds(self) -> float:
        """Return how long training has waited for data since the last call, in seconds."""
        return self._supply.take_wait_seconds()

    def close(self) -> None:
        """End the stream and its workers; ``open`` may follow again."""
        self._supply.close()

    def _new_stream(self, plan: Iterable[BatchRequest], sources: Sources, num_workers: int | None = None) -> Stream:
        num_workers = self.num_workers if num_workers is None else num_workers
        if num_workers == 0:
            return LocalStream(sources, self.seed, plan)
        return WorkerStream(sources, self.seed, plan, num_workers, self.prefetch, self.pins_memory)

    def _check_key(self, key: str, path: str) -> None:
        if key not in self.datasets:
            raise ConfigError(f"there is no dataset '{key}'. {did_you_mean(key, self.datasets)}", path=path)


def _check_dataset(key: str, dataset: Any) -> None:
    path, name = f"data.datasets.{key}", type(dataset).__name__
    if not is_map_style(dataset) and not is_stream(dataset):
        raise ConfigError(
            f"{name} is not a dataset: it needs __len__ and __getitem__, or for a stream __iter__ or iterate", path=path
        )
    if is_map_style(dataset) and len(dataset) == 0:
        raise ConfigError(f"{name} is empty", path=path)
