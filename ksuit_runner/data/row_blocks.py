"""Several small batches by one fetch, where a batch is nothing but rows of tensors."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from torch import Tensor

from ksuit_runner.data.fetch_batch import BatchRequest
from ksuit_runner.keyed_random import Function, uses_no_rng

_BLOCK: Final = 1 << 16  # bytes: they stay in the processor's cache until training has used them
_ALIGNMENT: Final = 64  # of torch's memory, on which the last bits of a sum may depend


def gathers_rows(function: Function) -> Function:
    """Mark a ``__getitems__`` that only picks rows: it returns a tuple of tensors with a row for each index.

    Then small batches are fetched several at a time: a fetch costs the same for one of them as for a few. It implies
    ``uses_no_rng``. A subclass that overrides the function has to mark its own.
    """
    function.gathers_rows = True  # type: ignore[attr-defined]
    return uses_no_rng(function)


def is_of_rows(dataset: Any) -> bool:
    """Whether batches of a dataset are nothing but rows."""
    return hasattr(getattr(dataset, "__getitems__", None), "gathers_rows")


def is_whole(request: BatchRequest) -> bool:
    """Whether a batch is that of an update, and fetched as one part: then it may be fetched with those after it."""
    return bool(request.spans) and request.parts == 1


def batches_in_block(batch: Any, samples: int) -> int:
    """Return how many batches like this one, of so many samples, are fetched at once; 1 of any that cannot be split."""
    if type(batch) is not tuple or not all(isinstance(item, Tensor) and _has_rows(item, samples) for item in batch):
        return 1
    sizes = [item.nbytes for item in batch]
    return max(1, _BLOCK // sum(sizes)) if all(sizes) and not any(size % _ALIGNMENT for size in sizes) else 1


def _has_rows(item: Tensor, samples: int) -> bool:
    """Whether a tensor has a row for each sample, and no graph: the backward pass of the first batch would free it."""
    return item.shape[:1] == (samples,) and item.is_contiguous() and not item.requires_grad


def fetch_block(dataset: Any, requests: Sequence[BatchRequest]) -> list[tuple[Tensor, ...]]:
    """Fetch batches of the same number of samples: each is as if it was fetched by itself."""
    rows = dataset.__getitems__(np.concatenate([request.indices for request in requests]))
    # Of these pieces, autograd does not know that they share memory: one that is changed in place is nothing to others.
    return list(zip(*(item.unsafe_split(len(requests[0].indices)) for item in rows), strict=True))
