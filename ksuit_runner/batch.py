"""Batches: how many samples are in one, and cutting one into parts."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

from ksuit_runner.errors import KsuitError


class Part(NamedTuple):
    """A part of a batch, for one accumulation step, and its share of the batch's samples."""

    batch: Any
    share: float


def split_batch(batch: Any, steps: int) -> Sequence[Part]:
    """Cut a batch into at most that many parts, along the first dimension of each tensor."""
    if steps == 1:
        return (Part(batch, 1.0),)
    size = batch_size(batch)
    cuts = [size * i // steps for i in range(steps + 1)]
    return [Part(_slice(batch, start, stop), (stop - start) / size) for start, stop in pairwise(cuts) if stop > start]


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor."""
    tensor = next(_tensors(batch), None)
    if tensor is None:
        raise KsuitError("data: a batch holds no tensor")
    return int(tensor.shape[0])


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)


def _slice(tree: Any, start: int, stop: int) -> Any:
    if isinstance(tree, Mapping):
        return {key: _slice(value, start, stop) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)) and next(_tensors(tree), None) is not None:
        parts = [_slice(value, start, stop) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree[start:stop]  # a tensor, or something else per sample, such as a list of names
