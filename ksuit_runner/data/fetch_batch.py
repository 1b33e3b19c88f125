"""Fetching a batch: the same data for the same position of the run, in any process."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from ksuit_runner.errors import Interrupted, KsuitError
from ksuit_runner.keyed_random import may_draw, mix, seed_all, undisturbed
from ksuit_runner.keyed_random import uses_no_rng as uses_no_rng  # where datasets look for it

EVALUATION: Final = 0
"""The epoch of all evaluations, so that each of them sees the same data; training counts its epochs from 1."""


class Part(NamedTuple):
    """A part of the batch of an update, fetched and collated by itself.

    Attributes:
        batch: The collated samples.
        number: Number of the part among those of the whole batch, from 0.
        samples: How many samples were fetched for it.
    """

    batch: Any
    number: int
    samples: int


class PartSpan(NamedTuple):
    """Which samples of a request are a part of the batch.

    Attributes:
        number: Number of the part among those of the whole batch, from 0.
        start: First of its samples within the request.
        stop: Sample after the last one.
    """

    number: int
    start: int
    stop: int


class BatchRequest(NamedTuple):
    """A batch to fetch: its position, which is also the key of its randomness, and its samples.

    The batch of an update is fetched in parts. A rank asks for those parts only that are its own.

    Attributes:
        dataset_key: Key of the dataset.
        epoch: Epoch of training, from 1, or ``EVALUATION``.
        batch: Number of the batch within the epoch or the evaluation, from 0.
        indices: Samples of the batch, or of the parts to fetch, int64, shape ``(batch,)``.
        parts: Number of parts of the whole batch, over all ranks.
        spans: The parts to fetch, none of which is empty; None fetches a batch as it is.
        begins: Whether an evaluation begins with it.
    """

    dataset_key: str
    epoch: int
    batch: int
    indices: NDArray[np.int64]
    parts: int = 1
    spans: tuple[PartSpan, ...] | None = None
    begins: bool = False

    def is_same(self, other: "BatchRequest") -> bool:
        """Whether this is the same batch with the same samples."""
        return self[:3] == other[:3] and np.array_equal(self.indices, other.indices)


def fetch_batch(datasets: Mapping[str, Any], seed: int, request: BatchRequest) -> Any:
    """Fetch a batch, or a list of its parts if the request is for parts.

    A part is fetched as if it was a batch. The dataset's ``__getitems__(indices)`` is used if it has one, see
    ``getitems_of``: a list that it returns holds samples to collate, anything else is the finished batch. Otherwise the
    samples come from ``__getitem__``, one by one. They are collated by the dataset's ``collate_fn`` if it has one, else
    by torch's ``default_collate``.

    Torch's, numpy's and Python's generators are seeded with the position of the batch and of the part first. They are
    left so after a training batch, because a training step seeds its own; after a batch of an evaluation they are
    restored for the callback that asked for it, whose draws must not depend on where the batch is fetched. The number
    of threads is one, as in a worker process, because sums over large tensors depend on it in their last bits. A
    ``__getitems__`` that is marked with ``uses_no_rng`` is called without all this.

    Args:
        datasets: Datasets by key.
        seed: Seed of the run.
        request: What to fetch.

    Raises:
        RuntimeError: The dataset called sys.exit().
        Exception: What the dataset raised, with a note of dataset and batch.
    """
    if request.spans is None:
        return _fetch(datasets, seed, request, request.indices)
    if request.parts == 1:
        return [_fetch(datasets, seed, request, request.indices) for _ in request.spans]
    return [
        _fetch(datasets, seed, request, request.indices[start:stop], number) for number, start, stop in request.spans
    ]


def _fetch(
    datasets: Mapping[str, Any], seed: int, request: BatchRequest, indices: NDArray[np.int64], *part: int
) -> Any:
    dataset_key, epoch, batch, *_ = request
    dataset = datasets[dataset_key]
    getitems = getitems_of(dataset)
    if getitems is not None and not may_draw(getitems):
        return getitems(indices)
    try:
        with one_thread(), undisturbed() if epoch == EVALUATION else nullcontext():
            seed_all(mix(seed, dataset_key, epoch, batch, *part))
            return collate(dataset, get_samples(dataset, indices))
    except SystemExit as error:  # it would end a worker process silently
        raise RuntimeError(f"data.datasets.{dataset_key} tried to end the process: {error!r}") from error
    except Interrupted:
        raise
    except Exception as error:
        if isinstance(error, KsuitError):
            error.locate(f"data.datasets.{dataset_key}")
        where = f"epoch {epoch}" if epoch != EVALUATION else "an evaluation"
        error.add_note(f"raised by data.datasets.{dataset_key}, in batch {batch} of {where}")
        raise


def getitems_of(dataset: Any) -> Callable[[Any], Any] | None:
    """Return a dataset's ``__getitems__``; None without one, or if ``__getitem__`` stands in front of it.

    A subclass, or a wrapper that forwards attributes, which changes single samples would be passed by otherwise.
    """
    getitems: Callable[[Any], Any] | None = getattr(dataset, "__getitems__", None)
    if getitems is not None and "__getitems__" not in getattr(dataset, "__dict__", ()):
        for base in type(dataset).__mro__:
            if "__getitems__" in vars(base):
                break
            if "__getitem__" in vars(base):
                return None
    return getitems


def get_samples(dataset: Any, indices: NDArray[np.int64]) -> Any:
    """Return a list of samples, or the finished batch if the dataset's ``__getitems__`` returns one."""
    getitems = getitems_of(dataset)
    return [dataset[index] for index in indices.tolist()] if getitems is None else getitems(indices)


def collate(dataset: Any, samples: Any) -> Any:
    """Collate a list of samples into a batch; a finished batch is returned as it is."""
    if not isinstance(samples, list):
        return samples
    return (getattr(dataset, "collate_fn", None) or default_collate)(samples)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread while the block runs, as worker processes do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
