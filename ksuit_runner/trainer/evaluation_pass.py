"""One pass over a dataset for all callbacks that evaluate it at the same moment."""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Final, Protocol

from torch import nn

from ksuit_runner.data.shared_pass import Reading, SharedPass
from ksuit_runner.errors import Interrupted
from ksuit_runner.keyed_random import may_draw, mix, seed_all
from ksuit_runner.trainer.gathered import Gathered
from ksuit_runner.trainer.sgd import SgdTrainer
from ksuit_runner.trainer.shared_outputs import MOST_BYTES, SharedOutputs
from ksuit_runner.trainer.tensor_note import note_tensors

_END: Final = object()


class BatchReader(Protocol):
    """What reads the batches of an evaluation.

    Attributes:
        gathered: Collects what it finds.
    """

    gathered: Gathered

    @property
    def dataset_key(self) -> str:
        """Key of the dataset."""

    @property
    def batch_size(self) -> int | None:
        """Samples per batch; None takes that of the data."""

    @property
    def max_batches(self) -> int | None:
        """Number of batches that it reads; None reads all."""

    @property
    def shares_batch(self) -> bool:
        """Whether it leaves the batch and the outputs of models as they are."""

    @property
    def shares_work(self) -> bool:
        """Whether all that it finds is in ``gathered``, so that ranks can share its batches."""

    @property
    def display_name(self) -> str:
        """Its name in messages."""

    def read_batch(self, batch: Any, models: Mapping[str, nn.Module]) -> None:
        """Process a batch."""


def is_shared(reader: BatchReader, trainer: SgdTrainer) -> bool:
    """Whether the ranks of the run share the batches of a reader."""
    return reader.shares_work and not trainer.evaluates_in_order


def go_through(
    readers: Sequence[BatchReader], trainer: SgdTrainer, models: Mapping[str, nn.Module]
) -> dict[int, BaseException]:
    """Give every batch of a dataset to all readers, each of which sees and draws what it would if it was alone.

    A batch is fetched and moved to the device once. Who may change it gets a copy of its own. On several ranks, those
    that share the work get the batches of this rank only, and what they find is in their ``gathered``.

    Args:
        readers: What reads the same dataset in batches of the same size; the first one has asked for the pass.
        trainer: Trainer of the run.
        models: Models to evaluate by the name of their weights.

    Returns:
        The errors of readers by their index, each of which has read no further: they are raised when it is their turn.

    Raises:
        Interrupted: A signal asked the run to end.
        Exception: What the dataset raised while the first one was reading.
    """
    failures: dict[int, BaseException] = {}
    data, in_step = trainer.data_container, trainer.strategy.is_sharded
    key, size = readers[0].dataset_key, readers[0].batch_size
    readings = [Reading(item.max_batches, is_shared(item, trainer)) for item in readers]
    shared = SharedPass(readings, data.world, in_step)
    length = data.batches_in(key, size)
    batch_count, watch = shared.end(length), trainer.watch_evaluation
    batches = data.evaluation_batches(key, size, shared.max_batches, (turn.number for turn in shared.turns(length)))
    for reader, reading in zip(readers, readings, strict=True):
        reader.gathered.start(is_shared=reading.is_shared and data.world.size > 1)
    with trainer.evaluation():
        for turn in shared.turns(length):
            active = [index for index in shared.readers_from(turn) if index not in failures]
            if not active:
                break
            if watch is not None:
                watch([readers[index].display_name for index in active], key, turn.number, batch_count)
            # Each evaluation draws the same for a batch, so that values of two updates can be compared.
            seed = mix(data.seed, "evaluation", key, turn.number)
            try:
                batch = next(batches, _END)
                if batch is _END:
                    break
                batch = _moved(batch, trainer, seed)
            except Exception as error:  # who has read enough would not have met it
                if active[0] == 0 or isinstance(error, Interrupted) or in_step:
                    raise
                failures.update(dict.fromkeys(active, error))
                break
            present = {i: counts for i, counts in shared.readers(turn).items() if i not in failures}
            for index, counts in present.items():
                readers[index].gathered.begin(turn.number, counts)
            failures |= _read_batch(batch, {index: readers[index] for index in present}, trainer, models, seed)
    return failures


def read_first_batch(
    readers: Sequence[BatchReader], trainer: SgdTrainer, models: Mapping[str, nn.Module]
) -> dict[int, BaseException]:
    """Give the first batch of a dataset to all readers on every rank, without a trace in what is fetched ahead.

    Args:
        readers: What reads the same dataset in batches of the same size.
        trainer: Trainer of the run.
        models: Models to evaluate by the name of their weights.

    Returns:
        The errors of readers by their index.

    Raises:
        Interrupted: A signal asked the run to end.
        Exception: What the dataset raised.
    """
    data, key, size = trainer.data_container, readers[0].dataset_key, readers[0].batch_size
    seed = mix(data.seed, "evaluation", key, 0)
    batch = data.first_evaluation_batch(key, size)
    with trainer.evaluation():
        return _read_batch(_moved(batch, trainer, seed), dict(enumerate(readers)), trainer, models, seed)


def _moved(batch: Any, trainer: SgdTrainer, seed: int) -> Any:
    if may_draw(trainer.to_device):
        seed_all(mix(seed, "to_device"))
    return trainer.to_device(batch)


def _read_batch(
    batch: Any, readers: Mapping[int, BatchReader], trainer: SgdTrainer, models: Mapping[str, nn.Module], seed: int
) -> dict[int, BaseException]:
    """Give a batch to all that read it, and return their errors by their index."""
    failures: dict[int, BaseException] = {}
    in_step = trainer.strategy.is_sharded
    # Ranks that are in step have to compute the same outputs again, or none of them, whatever the size of their batch.
    sharing = sum(reader.shares_batch for reader in readers.values())
    outputs = SharedOutputs(seed, MOST_BYTES if not in_step else math.inf if sharing > 1 else 0)
    for (index, reader), own in zip(readers.items(), _copies(batch, list(readers.values()), trainer), strict=True):
        trainer.shared_outputs = outputs if reader.shares_batch else None
        seed_all(seed)
        try:
            reader.read_batch(own, models)
        except Interrupted:
            raise
        except (Exception, SystemExit) as error:
            note_tensors(error)
            if in_step:  # other ranks would wait for its next forward passes
                error.add_note(f"raised while callback '{reader.display_name}' read a batch")
                raise
            failures[index] = error
        finally:
            trainer.shared_outputs = None
            if not trainer.evaluates_in_order:
                trainer.modes.put_back()
    return failures


def _copies(batch: Any, readers: Sequence[BatchReader], trainer: SgdTrainer) -> Iterator[Any]:
    """Yield a batch for each reader: a copy for those that may change it, except for the last one."""
    samples = trainer.batch_parts.samples(batch)
    for left, reader in zip(reversed(range(len(readers))), readers, strict=True):
        own = batch if reader.shares_batch or left == 0 else deepcopy(batch)
        trainer.batch_parts.note(own, samples)
        yield own
