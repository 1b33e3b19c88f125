"""Sums and means that stay on the device, and those of training, of which each part of a batch has its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ksuit_runner.checkpoint.exchange import gather_state
from ksuit_runner.distributed.world import World

Number = float | Tensor


class Total:
    """A sum, and the number of things that it is a sum over, which are replaced and never changed in place.

    Attributes:
        sum: A number, or a tensor of any shape.
        count: The number of things, 0 if nobody has said it.
        dtype: Type in which the mean is computed.
    """

    __slots__ = ("count", "dtype", "sum")

    def __init__(self, sum: Number, count: Number, dtype: torch.dtype) -> None:
        self.sum: Any = sum
        self.count = count
        self.dtype = dtype

    @property
    def mean(self) -> Any:
        """The sum divided by the count; over nothing it is NaN."""
        if isinstance(self.sum, Tensor):
            return self.sum.to(self.dtype) / self.count
        return self.sum / self.count if isinstance(self.count, Tensor) or self.count else math.nan


class Sums:
    """Adds up numbers and tensors by key. They stay on their device: nothing waits for it.

    Args:
        dtype: Type to sum up floating-point tensors in; those of integers are summed up in int64.

    Attributes:
        totals: The sums so far, by key.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.totals: dict[Any, Total] = {}
        self._dtype = dtype

    def add(self, key: Hashable, value: Number, count: Number = 0) -> None:
        """Add a sum.

        Args:
            key: What it is a sum of.
            value: The sum: a number, or a tensor of the same shape at every call.
            count: Number of things that it is a sum over.
        """
        total = self.totals.get(key)
        if total is None:
            if isinstance(value, Tensor):
                value = value.detach().to(sum_dtype(value, self._dtype), copy=True)
            self.totals[key] = Total(value, count, self._dtype)
            return
        if isinstance(total.sum, Tensor):
            total.sum = _added(total.sum, value.detach() if isinstance(value, Tensor) else value)
        else:
            total.sum = total.sum + value
        total.count = total.count + count

    def add_mean(self, key: Hashable, mean: Number, count: Number) -> None:
        """Add a mean, times its count. Over nothing it is NaN, and adds nothing.

        Args:
            key: What it is a mean of.
            mean: A number, or a tensor of the same shape at every call.
            count: Number of things that it is a mean over.
        """
        if not isinstance(mean, Tensor):
            count = count.item() if isinstance(count, Tensor) else count
            self.add(key, mean * count if count else 0.0, count)
            return
        total = self.totals.get(key)
        if isinstance(count, Tensor) or not (total is None or isinstance(total.sum, Tensor)):
            count = torch.as_tensor(count, device=mean.device)
            self.add(key, torch.where(count > 0, mean.detach().to(self._dtype) * count, 0.0), count)
        elif total is None:
            value = mean.detach().to(self._dtype)
            self.totals[key] = Total(value * count if count else torch.zeros_like(value), count, self._dtype)
        elif count:
            total.sum = _added(total.sum, mean.detach() if mean.requires_grad else mean, count)
            total.count = total.count + count

    def merge(self, other: Sums) -> None:
        """Add the sums of another one."""
        for key, total in other.totals.items():
            self.add(key, total.sum, total.count)

    def state_dict(self) -> dict[Any, Any]:
        """Return sum and count by key."""
        return {key: [total.sum, total.count] for key, total in self.totals.items()}

    def load_state_dict(self, state_dict: Mapping[Any, Any], device: torch.device) -> None:
        """Restore them, on a device."""
        self.totals = {
            key: Total(to_device(value, device), to_device(count, device), self._dtype)
            for key, (value, count) in state_dict.items()
        }


def _added(total: Tensor, value: Number, factor: Number = 1) -> Tensor:
    """Return what ``total.add_(value, alpha=factor)`` would make of the total, to the bit, as a new tensor."""
    if isinstance(value, Tensor) and value.dtype == total.dtype and value.shape == total.shape:
        return torch.add(total, value, alpha=factor)  # type: ignore[arg-type]
    return total.clone().add_(value, alpha=factor)  # type: ignore[arg-type]


def sum_dtype(value: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the type in which a tensor is summed up: int64, or the given one for what is not an integer."""
    return dtype if value.is_floating_point() or value.is_complex() else torch.int64


def to_device(value: Any, device: torch.device) -> Any:
    """Return a copy of a tensor on a device; anything else as it is."""
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


class Accumulator(Protocol):
    """What is accumulated over several updates, such as ``Sums``."""

    def merge(self, other: Any) -> None:
        """Add what another one has accumulated."""

    def state_dict(self) -> dict[Any, Any]:
        """Return what has been accumulated, in tensors that never change: an update that fails goes back to them."""

    def load_state_dict(self, state_dict: Mapping[Any, Any], device: torch.device) -> None:
        """Restore it, on a device."""


Accumulated = TypeVar("Accumulated", bound=Accumulator)


class PartSums(Generic[Accumulated]):
    """What a callback accumulates over updates, for each part of the batch by itself.

    At the log the parts are added up in their order, whichever rank has them: the result does not depend on the number
    of ranks, nor on resumes with another one.

    Args:
        make: Makes an empty accumulator.
        world: The ranks of the run.
        device: Device of the accumulators.
    """

    def __init__(self, make: Callable[[], Accumulated], world: World, device: torch.device) -> None:
        self._make = make
        self._world = world
        self._device = device
        self._parts: dict[int, Accumulated] = {}

    def __getitem__(self, part: int) -> Accumulated:
        """Return the accumulator of a part of the batch: ``update_counter.accumulation_step``."""
        found = self._parts.get(part)
        if found is None:
            found = self._parts[part] = self._make()
        return found

    def take(self) -> Accumulated:
        """Return what all parts of all ranks have accumulated, and start anew; every rank has to call it.

        Raises:
            PeerError: A rank has failed, is lost, or does not answer in time.
        """
        parts = self._parts
        if self._world.size > 1:
            states = [state["parts"] for state in gather_state(self._world, "sums of parts", self.state_dict())]
            parts = {int(part): self._loaded(state) for states in states for part, state in states.items()}
        self._parts = {}
        if len(parts) == 1:
            [only] = parts.values()
            return only
        total = self._make()
        for part in sorted(parts):
            total.merge(parts[part])
        return total

    def _loaded(self, state: Mapping[Any, Any]) -> Accumulated:
        made = self._make()
        made.load_state_dict(state, self._device)
        return made

    def state_dict(self) -> dict[str, Any]:
        """Return the accumulators of this rank by the number of their part."""
        return {"parts": {str(part): item.state_dict() for part, item in self._parts.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any], parts: int) -> None:
        """Restore the accumulators of this rank's parts.

        Args:
            state_dict: What ``state_dict`` or ``merged`` returned.
            parts: Number of parts of a batch. If it had more, the last one takes care of those that are left.
        """
        own = self._world.own(parts)
        self._parts = {
            int(part): self._loaded(state)
            for part, state in state_dict["parts"].items()
            if min(int(part), parts - 1) in own
        }

    @staticmethod
    def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the state of all ranks together, from those of each of them."""
        return {"parts": {part: held for state in states for part, held in state["parts"].items()}}
