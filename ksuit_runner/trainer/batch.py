"""Batches: counting their samples.

A batch is any nesting of mappings, lists, tuples and dataclasses. Its tensors and arrays have one row per sample, its
lists one item per sample; everything else is shared by all samples.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ksuit_runner.errors import KsuitError
from ksuit_runner.tensors.nested import entries, is_opaque


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
    first = batch[0] if type(batch) in (tuple, list) and len(batch) == 2 else None
    if isinstance(first, Tensor) and first.ndim and first.size(0) == samples:  # the walk through all arrays is slow
        return samples
    if any(_rows(array) == samples for array in _arrays(batch)):
        return samples
    sizes = set(map(_rows, _certain_arrays(batch, is_level=_is_pair(batch))))
    return min(samples, *sizes) if len(sizes) == 1 else samples


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
