"""Measuring on a shared machine: contestants take turns, and only neighbours are compared."""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Scale:
    """How large the work is: as published, or so small that it only shows that a benchmark works."""

    is_tiny: bool = False
    rounds: int | None = None

    def pick(self, full: Choice, tiny: Choice) -> Choice:
        return tiny if self.is_tiny else full

    def turns(self, full: int) -> int:
        """Return how often the contestants take turns."""
        return self.pick(self.rounds or full, 1)


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def scaled(self, factor: float) -> "Spread":
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Contest:
    """The costs of some contestants: one number per round for each of them."""

    costs: Mapping[str, Sequence[float]]

    def spread(self, name: str) -> Spread:
        return Spread.of(self.costs[name])

    def ratio(self, name: str, other: str) -> Spread:
        """Compare two contestants round by round: a disturbance of a round affects both, and cancels."""
        return Spread.of([a / b for a, b in zip(self.costs[name], self.costs[other], strict=True)])

    def difference(self, name: str, other: str) -> Spread:
        return Spread.of([a - b for a, b in zip(self.costs[name], self.costs[other], strict=True)])


def compete(contestants: Mapping[str, Callable[[], float]], rounds: int, warm_up: bool = True) -> Contest:
    """Let contestants take turns, each second round in the opposite order.

    After the round that does not count, the garbage collector leaves alone what is there, for all of them alike: that
    is what they have imported, as in the processes that the runner starts.

    Args:
        contestants: Each does its work once and returns what it cost, by its own clock.
        rounds: How often each of them comes.
        warm_up: Whether there is a round before that does not count; there is none before a single one.
    """
    costs: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(-1 if warm_up and rounds > 1 else 0, rounds):
        if turn == 0:
            gc.collect()
            gc.freeze()
        for name in names if turn % 2 == 0 else reversed(names):
            cost = contestants[name]()
            if turn >= 0:
                costs[name].append(cost)
    return Contest(costs)


def seconds_of(work: Callable[[], object]) -> Callable[[], float]:
    """Return the work as a contestant whose cost is the time that it takes."""

    def measured() -> float:
        start = perf_counter()
        work()
        return perf_counter() - start

    return measured
