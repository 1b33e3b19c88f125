"""The losses of a learning-rate range test, and what they suggest."""

from math import isfinite
from typing import NamedTuple

import numpy as np


class RangeTest(NamedTuple):
    """The losses of a run whose learning rate rises, one for each update.

    Attributes:
        rates: The learning rates.
        losses: The losses.
        smoothed: Exponential means of the losses up to each, whose bias is corrected.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    def add(self, rate: float, loss: float, smoothing: float) -> None:
        """Add an update, and let the losses before weigh ``smoothing`` in its mean, from 0 to below 1."""
        before = len(self.losses)
        mean = self.smoothed[-1] * (1 - smoothing**before) if before else 0.0
        self.rates.append(rate)
        self.losses.append(loss)
        self.smoothed.append((smoothing * mean + (1 - smoothing) * loss) / (1 - smoothing ** (before + 1)))

    def has_diverged(self, multiple: float) -> bool:
        """Whether the mean is not finite, or above this multiple of the lowest one."""
        if not self.smoothed:
            return False
        return not isfinite(self.smoothed[-1]) or self.smoothed[-1] > multiple * min(self.smoothed)

    def suggest(self, smoothing: float) -> dict[str, float]:
        """Return what the rules suggest, see ``suggestions``, by slopes over as many updates as the means are over."""
        width = max(2, round(1 / (1 - smoothing)))
        return suggestions(np.array(self.rates), np.array(self.smoothed), width)


def suggestions(rates: np.ndarray, losses: np.ndarray, width: int = 2) -> dict[str, float]:
    """Return what the rules suggest, by their names; nothing for a loss that does not fall while the rate rises.

    Rates and smoothed losses are of shape (updates,). A slope is taken over ``width`` updates; the first ones, whose
    mean is of few losses, do not count.
    """
    lowest = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
    rates, losses = rates[: lowest + 1], losses[: lowest + 1]
    if lowest <= 2 * width or (np.diff(rates) <= 0).any() or not np.isfinite(losses).all():
        return {}
    rises, falls = (values[2 * width :] - values[width:-width] for values in (np.log(rates), losses))
    steepest = width + np.argmin(falls / rises) + width // 2
    return {"steepest": float(rates[steepest]), "tenth_of_minimum": float(rates[-1]) / 10}
