"""The learning-rate range test."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, ClassVar

import numpy as np

from ksuit_runner.callback_base import CallbackBase, quiet
from ksuit_runner.config.types import AboveOne, FractionBelowOne
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, StopTraining, check_above
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.ui.figures import draw_rate_test


class LearningRateFinder(CallbackBase):
    """Shows the training loss over the learning rate of a short run whose rate rises at every update, and suggests one.

    ``debug=learning_rate_finder`` is such a run, with the model, data, clipping and ranks of the real one. At its end
    it logs a figure and a table ``NAME``, with a row for each update, and two rules of thumb: ``NAME/steepest``, the
    rate at which the smoothed loss falls fastest over the logarithm of the rate, and ``NAME/tenth_of_minimum``, a tenth
    of the rate at which it is lowest. The loss of every update is read, which waits for the device.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks, 2017, https://arxiv.org/abs/1506.01186.

    Args:
        smoothing: Weight of the losses before in the exponential mean, from 0 to below 1; its bias is corrected.
        diverged: End the run when the smoothed loss is not finite, or above this multiple of the lowest; None: never.
        **kwargs: Passed on to CallbackBase.

    Raises:
        ConfigError: A number is out of its range, the run is long, or there are several optimizers.
    """

    logs: ClassVar[Sequence[str] | None] = ("{name}/steepest", "{name}/tenth_of_minimum")

    def __init__(self, smoothing: FractionBelowOne = 0.9, diverged: AboveOne | None = 4.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_above(1, diverged=diverged)
        if not 0 <= smoothing < 1:
            raise ConfigError(f"smoothing: a number from 0 to below 1 is needed, not {smoothing}")
        if len(names := list(self.trainer.optimizers.members)) > 1:
            raise ConfigError(f"it is for one optimizer, and there are {', '.join(names)}: which rate is to rise?")
        if (end := self.trainer.counter.end_update) > 10_000:
            raise ConfigError(f"it keeps the losses of all {end} updates: debug=learning_rate_finder makes a short run")
        self.smoothing, self.diverged = smoothing, diverged
        self.trainer.keep_total_loss()
        self.rates, self.losses, self.smoothed = list[float](), list[float](), list[float]()

    @quiet
    @uses_no_rng
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        loss, weight, before = self.trainer.total_loss.item(), self.smoothing, len(self.losses)
        mean = self.smoothed[-1] * (1 - weight**before) if before else 0.0
        self.rates.append(next(iter(self.trainer.learning_rates().values())))
        self.losses.append(loss)
        self.smoothed.append((weight * mean + (1 - weight) * loss) / (1 - weight ** (before + 1)))

    @quiet
    @uses_no_rng
    def _after_update(self, update_counter: UpdateCounter) -> None:
        if self.diverged is None or not self.smoothed:
            return
        if not isfinite(self.smoothed[-1]) or self.smoothed[-1] > self.diverged * min(self.smoothed):
            raise StopTraining(f"the loss has diverged at a learning rate of {self.rates[-1]:.3g}")

    @uses_no_rng
    def _after_training(self, update_counter: UpdateCounter) -> None:
        if not self.losses:
            return
        name, columns = self.display_name, (self.rates, self.losses, self.smoothed)
        self.writer.add_table(name, ["learning_rate", "loss", "smoothed_loss"], list(zip(*columns, strict=True)))
        rates, losses, smoothed = map(np.array, columns)
        found = suggestions(rates, smoothed, width=max(2, round(1 / (1 - self.smoothing))))
        for rule, rate in found.items():
            self.writer.add_scalar(f"{name}/{rule}", rate, logger=self.logger, format_str=".3g")
        self.writer.add_figure(name, draw_rate_test(rates, losses, smoothed, found))

    def state_dict(self) -> dict[str, Any]:
        """Return the learning rate and the losses of every update."""
        return {"rates": list(self.rates), "losses": list(self.losses), "smoothed": list(self.smoothed)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        self.rates, self.losses, self.smoothed = (list(state_dict[name]) for name in ("rates", "losses", "smoothed"))


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
