"""Several small batches by one fetch, where a batch is nothing but rows of tensors."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final

import numpy as np
from torch import Tensor

from ksuit_runner.data.fetch_batch import BatchRequest, getitems_of
from ksuit_runner.errors import Interrupted
from ksuit_runner.keyed_random import Function, uses_no_rng

_BLOCK: Final = 1 << 18  # bytes: they stay in the processor's cache until training has used them
_ALIGNMENT: Final = 64  # of torch's memory, on which the last bits of a sum may depend


def gathers_rows(function: Function) -> Function:
    """Mark a ``__getitems__`` that only picks rows: it returns a tuple of tensors with a row for each index.

    Then several small batches are fetched at a time, because a fetch costs the same for a few of them as for one. It
    implies ``uses_no_rng``. A subclass that overrides the function has to mark its own version.
    """
    function.gathers_rows = True  # type: ignore[attr-defined]
    return uses_no_rng(function)


class PlanAhead:
    """A plan whose requests can be looked at before their turn; an error of the plan is raised only at its turn.

    Args:
        plan: The requests, in their order.
    """

    def __init__(self, plan: Iterable[BatchRequest]) -> None:
        self._plan = iter(plan)
        self._known: deque[BatchRequest] = deque()
        self._error: Exception | None = None

    def next(self) -> BatchRequest | None:
        """Move on and return the next request; None at the end.

        Raises:
            Exception: What the plan has raised instead of it.
        """
        if self._known:
            return self._known.popleft()
        if self._error is not None:
            raise self._error
        return next(self._plan, None)

    def look_ahead(self, number: int) -> BatchRequest | None:
        """Return one of the requests to come, from 1 for the next one; None at the end, or at an error."""
        if len(self._known) < number and self._error is None:
            try:
                self._known.extend(islice(self._plan, 1))
            except Interrupted:  # a signal that came meanwhile
                raise
            except Exception as error:
                self._error = error
        return self._known[number - 1] if len(self._known) >= number else None


class RowBlocks:
    """Fetches batches that are only rows of tensors, a few at a time.

    Args:
        datasets: Sources by key.
        plan: The requests after the one whose batch is taken next.
    """

    def __init__(self, datasets: Mapping[str, Any], plan: PlanAhead) -> None:
        self._datasets = {key: dataset for key, dataset in datasets.items() if _is_of_rows(dataset)}
        self._plan = plan
        self._fetched: deque[tuple[Tensor, ...]] = deque()
        self._in_block: int | None = None  # number of batches; not known before the first

    def take(self, request: BatchRequest) -> tuple[Tensor, ...] | None:
        """Return the batch of a request, the next one; None if it has to be fetched by itself."""
        if not self._fetched and request.dataset_key in self._datasets and _is_whole(request):
            self._fetch(request)
        return self._fetched.popleft() if self._fetched else None

    def drop(self) -> None:
        """Leave out the next batch, if it is there."""
        if self._fetched:
            self._fetched.popleft()

    def clear(self) -> None:
        """Leave out all batches that are there."""
        self._fetched.clear()

    def _fetch(self, first: BatchRequest) -> None:
        """Fetch what follows the first batch together with it, unless that fails: then each has its own error."""
        dataset, requests = self._datasets[first.dataset_key], [first]
        try:
            if self._in_block is None:
                self._in_block = _batches_in_block(dataset.__getitems__(first.indices), len(first.indices))
            while len(requests) < self._in_block and (request := self._plan.look_ahead(len(requests))) is not None:
                if not _is_whole(request) or len(request.indices) != len(first.indices):
                    break
                requests.append(request)
            if len(requests) > 1:
                self._fetched.extend(_fetch_block(dataset, requests))
        except Interrupted:
            raise
        except Exception:
            return


def _is_of_rows(dataset: Any) -> bool:
    """Whether batches of a dataset are nothing but rows."""
    return hasattr(getitems_of(dataset), "gathers_rows")


def _is_whole(request: BatchRequest) -> bool:
    """Whether a batch is that of an update, and fetched as one part: then it may be fetched with those after it."""
    return bool(request.spans) and request.parts == 1


def _batches_in_block(batch: Any, samples: int) -> int:
    """Return how many batches like this one, of so many samples, are fetched at once; 1 of any that cannot be split."""
    if type(batch) is not tuple or not all(isinstance(item, Tensor) and _has_rows(item, samples) for item in batch):
        return 1
    sizes = [item.nbytes for item in batch]
    return max(1, _BLOCK // sum(sizes)) if all(sizes) and not any(size % _ALIGNMENT for size in sizes) else 1


def _has_rows(item: Tensor, samples: int) -> bool:
    """Whether a tensor has a row for each sample, and no graph: the backward pass of the first batch would free it."""
    return item.shape[:1] == (samples,) and item.is_contiguous() and not item.requires_grad


def _fetch_block(dataset: Any, requests: Sequence[BatchRequest]) -> list[tuple[Tensor, ...]]:
    """Fetch batches of the same number of samples: each is as if it was fetched by itself."""
    rows = dataset.__getitems__(np.concatenate([request.indices for request in requests]))
    # Of these pieces, autograd does not know that they share memory: one that is changed in place is nothing to others.
    return list(zip(*(item.unsafe_split(len(requests[0].indices)) for item in rows), strict=True))
