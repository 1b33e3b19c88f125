"""What the ranks of a run find in the batches of an evaluation, put together as one process would have found it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ksuit_runner.checkpoint.exchange import gather_state
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import KsuitError
from ksuit_runner.trainer.sums import Number, Sums, Total, sum_dtype, to_device


class Gathered:
    """Collects sums, means and rows of the batches of an evaluation, of which each rank may have its own.

    The results do not depend on the number of ranks, to the last bit: what floating-point numbers are rounded to
    depends on the order of their sum, so those of each batch are kept until the end, and each rank adds up those of all
    ranks in the order of the batches, as one process does at once. Integers need no order, and are added up at once.

    Args:
        device: Device of the run.
        dtype: Type to sum up floating-point tensors in.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self.start()

    def start(self, is_shared: bool = False) -> None:
        """Start anew.

        Args:
            is_shared: Whether other ranks have other batches.
        """
        self._sums = Sums(self._dtype)
        self._columns: dict[Any, _Column] = {}
        self._rows: dict[Any, list[tuple[int, Tensor]]] = {}
        self._first: dict[Any, int] = {}
        self._is_shared, self._batch, self._counts = is_shared, 0, True

    def begin(self, batch: int, counts: bool) -> None:
        """Take note of which batch comes next, and whether what is found in it counts."""
        self._batch, self._counts = batch, counts

    def add(self, key: Hashable, value: Number, count: Number = 0) -> None:
        """Add a sum over the present batch.

        Args:
            key: What it is a sum of: a text, or a tuple of texts and numbers.
            value: The sum: a number, or a tensor, of the same shape in every batch.
            count: Number of things that it is a sum over, for the mean.
        """
        if not self._counts:
            return
        if not self._is_shared:
            self._sums.add(key, value, count)
            return
        self._first.setdefault(key, self._batch)
        if isinstance(value, Tensor) and not _is_float(value) and not _is_float(count):
            self._sums.add(key, value, count)
        else:
            self._keep(key, False, value, count)

    def add_mean(self, key: Hashable, mean: Tensor, count: Number) -> None:
        """Add a mean over things of the present batch; over nothing it may be NaN, and adds nothing.

        Args:
            key: What it is a mean of: a text, or a tuple of texts and numbers.
            mean: Tensor of the same shape in every batch.
            count: Number of things that it is a mean over.
        """
        if not self._counts:
            return
        if not self._is_shared:
            self._sums.add_mean(key, mean, count)
            return
        self._first.setdefault(key, self._batch)
        self._keep(key, True, mean, count)

    def add_rows(self, key: Hashable, rows: Tensor) -> None:
        """Add rows of the present batch, such as the model's outputs; all of them are held until the last batch.

        Args:
            key: What they are.
            rows: Tensor of shape (rows, ...), mostly one row for each sample; on any device, on which ``rows`` will be.
        """
        if not self._counts:
            return
        if not isinstance(rows, Tensor) or rows.ndim == 0:
            raise KsuitError(f"'{key}': rows are a tensor of shape (rows, ...)")
        self._rows.setdefault(key, []).append((self._batch, rows.detach()))

    def finish(self, world: World) -> None:
        """Put together what the ranks have found, after the last batch; all of them have to call it.

        Raises:
            CheckpointError: A key is something else.
            PeerError: A rank has failed, is lost, or does not answer in time.
        """
        if self._is_shared:
            found = gather_state(world, "what an evaluation has found", self._state())
            self._sums = self._summed([state["sums"] for state in found])
            self._rows = self._sorted_rows([state["rows"] for state in found])

    @property
    def totals(self) -> Mapping[Any, Total]:
        """Sums over all batches by key, each with ``sum``, ``count`` and ``mean``."""
        return self._sums.totals

    @property
    def rows(self) -> Mapping[Any, Tensor]:
        """Rows of all batches by key, in the order of the dataset."""
        for parts in self._rows.values():
            if len(parts) > 1:
                parts[:] = [(parts[0][0], torch.cat([rows for _, rows in parts]))]
        return {key: rows for key, [(_, rows)] in self._rows.items()}

    def _keep(self, key: Hashable, is_mean: bool, value: Number, count: Number) -> None:
        if isinstance(value, Tensor):
            value = value.detach().to(sum_dtype(value, self._dtype), copy=True)
        self._columns.setdefault(key, _Column()).add(self._batch, is_mean, value, count)

    def _state(self) -> dict[str, Any]:
        """Return what this rank has found: sums of integers, values of each batch, and rows."""
        exact = self._sums.state_dict()
        sums = [
            [key, first, exact.get(key), self._columns[key].state() if key in self._columns else None]
            for key, first in self._first.items()
        ]
        rows = [
            [
                key,
                parts[0][1].device.type == "cpu",
                [[number, len(part)] for number, part in parts],
                torch.cat([part for _, part in parts]),
            ]
            for key, parts in self._rows.items()
        ]
        return {"sums": sums, "rows": rows}

    def _summed(self, found: list[list[Any]]) -> Sums:
        """Add up what all ranks have found, key by key, in the order in which one process would have met the keys."""
        sums = Sums(self._dtype)
        by_key: dict[Any, list[Any]] = {}
        for key, _, exact, column in sorted(chain(*found), key=lambda item: item[1]):
            by_key.setdefault(key, []).append((exact, column))
        for key, items in by_key.items():
            for exact, _ in items:
                if exact is not None:
                    sums.add(key, *(to_device(value, self._device) for value in exact))
            values = chain(*(zip(*column, strict=True) for _, column in items if column is not None))
            for _, is_mean, value, count in sorted(values, key=lambda item: item[0]):
                add = sums.add_mean if is_mean else sums.add
                add(key, to_device(value, self._device), to_device(count, self._device))
        return sums

    def _sorted_rows(self, found: list[list[Any]]) -> dict[Any, list[tuple[int, Tensor]]]:
        held: dict[Any, list[tuple[int, Tensor]]] = {}
        for key, is_on_cpu, sizes, rows in chain(*found):
            rows = rows if is_on_cpu else rows.to(self._device)
            parts = rows.split([size for _, size in sizes])
            held.setdefault(key, []).extend(zip((number for number, _ in sizes), parts, strict=True))
        in_order = {key: sorted(parts, key=lambda part: part[0]) for key, parts in held.items()}
        return dict(sorted(in_order.items(), key=lambda item: item[1][0][0]))


class _Column:
    """The values of a key in one batch after the other, each of which has to be added at its place."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._are_means: list[bool] = []
        self._values: list[Number] = []
        self._counts: list[Number] = []

    def add(self, number: int, is_mean: bool, value: Number, count: Number) -> None:
        self._numbers.append(number)
        self._are_means.append(is_mean)
        self._values.append(value)
        self._counts.append(count.detach().clone() if isinstance(count, Tensor) else count)

    def state(self) -> list[Any]:
        return [self._numbers, self._are_means, _stacked(self._values), _stacked(self._counts)]


def _stacked(values: list[Number]) -> Any:
    """Return values as one tensor if they are tensors of one kind, so that they travel together."""
    kinds = {(value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None for value in values}
    return values if None in kinds or len(kinds) > 1 else torch.stack(values)  # type: ignore[arg-type]


def _is_float(value: Number) -> bool:
    return value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, float)
