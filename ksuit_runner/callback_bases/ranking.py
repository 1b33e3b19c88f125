"""The best of what a run has made so far, by one metric and others that decide between equal values."""

import math
from collections.abc import Iterable, Sequence

from ksuit_runner.metric_property import MetricPropertyProvider


class Ranking:
    """The names that are best so far, such as those of checkpoints, by their values of some metrics.

    Args:
        provider: Knows which direction of a metric is better.
        keys: The metric, and then those that decide between equal values: the first one that differs.
        size: How many names are kept.
        min_delta: Difference that an improvement of the first metric has to exceed.

    Attributes:
        keys: The keys.
        top: Values and name of each, the best one first; a new list whenever it changes.

    Raises:
        ConfigError: Neither direction of one of the metrics is better.
    """

    def __init__(
        self, provider: MetricPropertyProvider, keys: Sequence[str], size: int = 1, min_delta: float = 0.0
    ) -> None:
        for key in keys:
            provider.higher_is_better(key)
        self.keys = tuple(keys)
        self.top: list[tuple[list[float], str]] = []
        self._provider, self._size, self._min_delta = provider, size, min_delta

    def insert(self, values: Sequence[float], name: str) -> int | None:
        """Insert a name by its values, one for each metric, and return its place; None if it is not among the best.

        A first value that is NaN is worse than all others, and has no place.
        """
        better = (place for place, (others, _) in enumerate(self.top) if self._is_better(values, others))
        place = next(better, self._size if math.isnan(values[0]) else len(self.top))
        if place >= self._size:
            return None
        self.top = [*self.top[:place], (list(values), name), *self.top[place:]][: self._size]
        return place

    def restore(self, top: Iterable[tuple[Sequence[float], str]]) -> None:
        """Restore ``top`` as it was stored, also by a ranking of another size, or with other tie breakers.

        A value that was not stored is unknown, and any other one is better.
        """
        unknown = [math.nan] * len(self.keys)
        self.top = [([*values, *unknown][: len(unknown)], name) for values, name in top][: self._size]

    def _is_better(self, values: Sequence[float], others: Sequence[float]) -> bool:
        """Whether the first values that differ are better; those of the first metric only if they differ by enough."""
        for number, (key, value, other) in enumerate(zip(self.keys, values, others, strict=True)):
            if self._provider.is_better(key, value, other):
                return number > 0 or not abs(value - other) <= self._min_delta
            if self._provider.is_better(key, other, value):
                return False
        return False
