"""Batches: counting their samples, and splitting them into parts.

A batch is any nesting of mappings, lists, tuples and dataclasses. Its tensors and arrays have one row per sample, its
lists one item per sample; everything else is shared by all samples.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ksuit_runner.errors import KsuitError
from ksuit_runner.tensors.nested import entries, is_opaque, rebuilt

_LOGGER = logging.getLogger(__name__)


class Part(NamedTuple):
    """A part of a batch, for one accumulation step, and its share of the batch's samples."""

    batch: Any
    share: float


def batch_size(batch: Any, samples: int | None = None) -> int:
    """Return the number of samples in a batch.

    If it is known how many were fetched, that is the number, unless all tensors agree on fewer: then some were dropped
    in collation. Tensors in a list that may have one per sample, such as images, do not count. Otherwise it is the
    tensors' first dimension. Where they disagree, it is the smallest one that is not a later dimension of another
    tensor as well: a grid or the points of all samples have more rows, and the size of a mask is the length of the
    samples.

    Args:
        batch: The collated samples.
        samples: Number of samples that were fetched for it, if known.

    Raises:
        KsuitError: It is not known, and does not follow from the batch.
    """
    if samples is None:
        return _guessed_size(batch)
    if any(_rows(array) == samples for array in _arrays(batch)):
        return samples
    sizes = set(map(_rows, _certain_arrays(batch, is_level=_is_pair(batch))))
    return min(samples, *sizes) if len(sizes) == 1 else samples


def split_batch(batch: Any, steps: int, samples: int | None = None) -> Sequence[Part]:
    """Split a batch into at most ``steps`` parts of whole samples.

    What has one entry per sample is cut. Everything else is in every part: text, numbers, None, a grid or mask that all
    samples share. A shared tensor that happens to have as many rows as there are samples is cut, too.

    Args:
        batch: The collated samples.
        steps: Number of parts; a batch with fewer samples gets one part per sample.
        samples: Number of samples that were fetched for it, if known.

    Raises:
        KsuitError: Something in it cannot be cut, or is ambiguous.
    """
    if steps == 1 or (size := batch_size(batch, samples)) <= 1:
        return (Part(batch, 1.0),)
    cuts = [size * i // steps for i in range(steps + 1)]
    return [
        Part(_part(batch, size, slice(start, stop)), (stop - start) / size)
        for start, stop in pairwise(cuts)
        if stop > start
    ]


def report_shared(batch: Any, size: int, name: str = "batch") -> None:
    """Warn about tensors whose first dimension is not the number of samples: every part of the batch has all rows."""
    if _is_array(batch):
        if batch.ndim and _rows(batch) != size:
            _LOGGER.warning(
                "trainer.accumulation_steps: %s has %d rows and the batch %d samples, so every part gets all of it; "
                "if its rows belong to samples, override `split` of the trainer",
                *(name, _rows(batch), size),
            )
    elif not (_is_list(batch) and len(batch) == size):
        for key, value in entries(batch):
            report_shared(value, size, f"{name}[{key!r}]")


def _part(batch: Any, size: int, rows: slice) -> Any:
    cut = partial(_cut, size=size, rows=rows)
    part = rebuilt(batch, cut) if _is_pair(batch) else cut(batch)
    if part is batch:
        raise _not_cut(f"nothing in the batch has one entry for each of its {size} samples")
    return part


def _cut(tree: Any, size: int, rows: slice) -> Any:
    if _is_array(tree):
        return _cut_array(tree, rows) if tree.ndim and _rows(tree) == size else tree
    if is_opaque(tree):
        raise _not_cut(f"the batch holds a {type(tree).__name__}, which cannot be cut")
    if _is_list(tree) and len(tree) == size and _has_one_per_sample(tree):
        return type(tree)(tree[rows])
    return rebuilt(tree, partial(_cut, size=size, rows=rows))


def _cut_array(array: Any, rows: slice) -> Any:
    try:
        return array[rows]
    except Exception as error:
        kind = "nested" if array.is_nested else array.layout
        raise _not_cut(f"the batch holds a tensor that cannot be cut ({kind})") from error


def _has_one_per_sample(items: Sequence[Any]) -> bool:
    """Whether a list with as many items as there are samples has one per sample, such as names or images.

    Otherwise it is a level of the batch, such as inputs, masks and targets, that happens to have as many.

    Raises:
        KsuitError: It is ambiguous.
    """
    size, given = len(items), [item for item in items if item is not None]
    if _holds_arrays(items) and not _are_alike(given):
        return False
    counts = [(_is_list(item) and len(item) == size) or size in map(_rows, _arrays(item)) for item in given]
    if counts and all(counts):
        raise _not_cut(
            f"a list of {size} in the batch is ambiguous: {size} samples, or {size} entries with all samples in each"
        )
    return True


def _guessed_size(batch: Any) -> int:
    shapes = [_shape(array) for array in _certain_arrays(batch, is_level=_is_pair(batch))]
    sizes = {shape[0] for shape in shapes}
    if len(sizes) > 1:
        sizes = {size for size in sizes if not any(size in shape[1:] for shape in shapes if shape[0] != size)}
    if not sizes:
        shapes = [_shape(array) for array in _arrays(batch)]
        reason = f"has no certain size, with tensors of the shapes {shapes}" if shapes else "has no tensor"
        raise KsuitError(
            f"a batch {reason}. Override `batch_size` of the trainer, to return its number of samples", path="data"
        )
    return min(sizes)


def _certain_arrays(tree: Any, is_level: bool = False) -> Iterator[Any]:
    """Walk all arrays except those in lists that may have one per sample."""
    if _is_array(tree):
        yield from _arrays(tree)
    elif is_level or not (_is_list(tree) and len(tree) > 1 and _are_alike(tree) and _holds_arrays(tree)):
        for _, value in entries(tree):
            yield from _certain_arrays(value)


def _arrays(tree: Any) -> Iterator[Any]:
    """Walk all tensors and arrays that have a first dimension."""
    if _is_array(tree):
        if tree.ndim:
            yield tree
    elif not is_opaque(tree):
        for _, value in entries(tree):
            yield from _arrays(value)


def _holds_arrays(tree: Any) -> bool:
    return next(_arrays(tree), None) is not None


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _rows(array: Any) -> int:
    return array.size(0) if isinstance(array, Tensor) else array.shape[0]


def _shape(array: Any) -> tuple[int, ...]:
    """Return an array's shape; of a nested tensor only the number of tensors in it."""
    return (_rows(array),) if getattr(array, "is_nested", False) else tuple(array.shape)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not hasattr(value, "_fields")


def _is_pair(batch: Any) -> bool:
    """Whether a batch is inputs and targets, and not a list of two samples."""
    return _is_list(batch) and len(batch) == 2


def _are_alike(items: Sequence[Any]) -> bool:
    return len({(type(item), item.dtype, item.ndim) if _is_array(item) else type(item) for item in items}) == 1


def _not_cut(reason: str) -> KsuitError:
    return KsuitError(
        f"{reason}. Override `split` of the trainer, which splits a batch", path="trainer.accumulation_steps"
    )
