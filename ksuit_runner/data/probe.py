"""Digest, shapes and repeatability of a dataset from a few of its samples, with all random generators undisturbed."""

from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ksuit_runner.data.fetch_batch import collate, get_samples, getitems_of, one_thread
from ksuit_runner.keyed_random import keyed, may_draw

_SAMPLES = 8


class Probe(NamedTuple):
    """What a few samples of a dataset have shown.

    Attributes:
        digest: 16 hexadecimal digits for class, length and samples, the same as long as the data is.
        batch: The same for a batch, where that shows more than samples do; None if none could be fetched.
    """

    digest: str
    batch: str | None


def probe_dataset(dataset: Any, batch_size: int) -> Probe:
    """Read a few samples of a dataset, spread from the first to the last, with the same seeds whenever it is called.

    Not every dataset can be asked for these samples, or can collate as many. What fails here is skipped; if the
    dataset is at fault, training will report it.

    Args:
        dataset: The dataset.
        batch_size: How many samples to collate if these are too few or too many.
    """
    spread = np.unique(np.linspace(0, len(dataset) - 1, _SAMPLES).astype(np.int64))
    with keyed("sample"), one_thread():
        samples = _hash(lambda: get_samples(dataset, spread))
    batch = None
    if samples is None or hasattr(dataset, "collate_fn"):
        with keyed("batch"), one_thread():
            batch = _hash(lambda: collate(dataset, get_samples(dataset, spread)))
            batch = batch or _hash(lambda: _first_batch(dataset, batch_size))
    return Probe(_digest_of(dataset, len(dataset), samples), batch)


def probe_stream(dataset: Any) -> Probe:
    """Return the digest of a stream's class: reading samples from it could move it on."""
    return Probe(_digest_of(dataset), None)


def _digest_of(dataset: Any, *more: Any) -> str:
    about = (type(dataset).__module__, type(dataset).__qualname__, *more)
    return blake2b(repr(about).encode(), digest_size=8).hexdigest()


def _hash(read: Callable[[], Any]) -> str | None:
    digest = blake2b(digest_size=8)
    try:
        _add(digest, read())
    except (Exception, SystemExit):
        return None
    return digest.hexdigest()


def is_repeatable(dataset: Any, batch_size: int, first: Probe) -> bool:
    """Whether a dataset returns the same samples for the same seeds as at the first probe."""
    return not may_draw(getitems_of(dataset)) or probe_dataset(dataset, batch_size) == first


def continues_anywhere(dataset: Any) -> bool:
    """Whether a stream's ``iterate(position)`` returns what an iteration from its beginning returns there."""
    try:
        with one_thread():
            whole = iter(dataset.iterate(0))
            with keyed("first"):
                next(whole)
            with keyed("second"):
                second = next(whole)
            with keyed("second"):
                again = next(iter(dataset.iterate(1)))
    except (Exception, SystemExit):  # training will report it
        return True
    return _hash(lambda: second) == _hash(lambda: again)


def first_shape(dataset: Any, batch_size: int) -> tuple[int, ...] | None:
    """Return the shape of the first element of a dataset's first sample; None if it has none.

    Args:
        dataset: The dataset.
        batch_size: How many samples to collate if one alone is too few.
    """
    with keyed("sample"), one_thread():
        try:
            value = _first_batch(dataset, 1)
        except Exception:
            value = _first_batch(dataset, batch_size)
    while isinstance(value, (Mapping, list, tuple)) and value:
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return tuple(value.shape[1:]) if hasattr(value, "shape") else None


def _first_batch(dataset: Any, size: int) -> Any:
    return collate(dataset, get_samples(dataset, np.arange(size)))


def first_samples(dataset: Any, batch_size: int) -> Any:
    """Return a batch of a dataset's first samples, without disturbing any random generator."""
    with keyed("sample"), one_thread():
        return _first_batch(dataset, batch_size)


def drawn_samples(dataset: Any, indices: NDArray[np.int64], draw: int) -> Any:
    """Return a batch of samples as they are drawn for the n-th time, without disturbing any random generator."""
    with keyed("sample", draw), one_thread():
        return collate(dataset, get_samples(dataset, indices))


def _add(digest: blake2b, value: Any, is_inside: bool = False) -> None:
    """Add a value to a digest; of an object its attributes, of an object inside another one only the class."""
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        digest.update(repr((str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        _add(digest, value.tolist(), is_inside)
    elif isinstance(value, np.ndarray):
        digest.update(repr((value.dtype.str, value.shape)).encode())
        digest.update(value.tobytes())
    elif isinstance(value, Mapping):
        _add(digest, list(value.items()), is_inside)
    elif isinstance(value, (list, tuple)):
        digest.update(repr(len(value)).encode())
        for item in value:
            _add(digest, item, is_inside)
    elif isinstance(value, (str, bytes, bool, int, float, complex, np.generic)) or value is None:
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__qualname__.encode())
        if hasattr(value, "__array_interface__"):  # such as an image
            _add(digest, np.asarray(value))
        elif hasattr(value, "__dict__") and not is_inside and not isinstance(value, torch.Tensor):
            _add(digest, vars(value), is_inside=True)
