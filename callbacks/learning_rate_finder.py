"""The learning-rate range test."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ksuit_runner.callback_base import CallbackBase, quiet
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, StopTraining
from ksuit_runner.keyed_random import uses_no_rng

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_UPDATES = 10_000


class LearningRateFinder(CallbackBase):
    """Shows the training loss over the learning rate of a short run whose rate rises at every update, and suggests one.

    ``debug=learning_rate_finder`` is such a run: it ends when the loss has diverged. It is a run like any other, with
    the model, the data, the clipping and the ranks of the real one, which begins anew with what was found.

    At its end there are, under the name of the callback: a figure, a table with a row for each update, and the metrics
    ``NAME/steepest``, the rate at which the smoothed loss falls fastest over the logarithm of the rate, and
    ``NAME/tenth_of_minimum``, a tenth of the rate at which it is lowest. Both are rules of thumb. The loss of every
    update is read, which waits for the device.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks, 2017, https://arxiv.org/abs/1506.01186.

    Args:
        smoothing: Weight of the losses before in the exponential mean, from 0 to below 1; its bias is corrected.
        diverged: End the run when the smoothed loss exceeds this multiple of the lowest one, or is not finite; None
            never ends it.
        **kwargs: Passed on to CallbackBase.

    Raises:
        ConfigError: A number is out of its range, the run is long, or there are several optimizers.
    """

    logs: ClassVar[Sequence[str] | None] = ("{name}/steepest", "{name}/tenth_of_minimum")

    def __init__(self, smoothing: float = 0.9, diverged: float | None = 4.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= smoothing < 1 or (diverged is not None and diverged <= 1):
            raise ConfigError(f"smoothing ({smoothing}) is from 0 to below 1, and diverged ({diverged}) above 1")
        if len(names := list(self.trainer.optimizers.members)) > 1:
            raise ConfigError(f"it is for one optimizer, and there are {', '.join(names)}: which rate is to rise?")
        if (end := self.trainer.counter.end_update) > _MOST_UPDATES:
            raise ConfigError(f"it keeps the losses of all {end} updates: debug=learning_rate_finder makes a short run")
        self.smoothing, self.diverged = smoothing, diverged
        self.trainer.keep_total_loss()
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []

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
        self.writer.add_figure(name, _figure(rates, losses, smoothed, found))

    def state_dict(self) -> dict[str, Any]:
        """Return the learning rate and the losses of every update."""
        return {"rates": list(self.rates), "losses": list(self.losses), "smoothed": list(self.smoothed)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        self.rates, self.losses, self.smoothed = (list(state_dict[name]) for name in ("rates", "losses", "smoothed"))


def suggestions(rates: np.ndarray, losses: np.ndarray, width: int = 2) -> dict[str, float]:
    """Return what the rules suggest, by their names; nothing for a loss that does not fall while the rate rises.

    Args:
        rates: Learning rates, shape (updates,).
        losses: Smoothed losses, shape (updates,).
        width: Number of updates over which a slope is taken; the first ones, whose mean is of few losses, do not count.
    """
    lowest = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
    rates, losses = rates[: lowest + 1], losses[: lowest + 1]
    if lowest <= 2 * width or (np.diff(rates) <= 0).any() or not np.isfinite(losses).all():
        return {}
    rises, falls = (values[2 * width :] - values[width:-width] for values in (np.log(rates), losses))
    steepest = width + np.argmin(falls / rises) + width // 2
    return {"steepest": float(rates[steepest]), "tenth_of_minimum": float(rates[-1]) / 10}


def _figure(rates: np.ndarray, losses: np.ndarray, smoothed: np.ndarray, found: Mapping[str, float]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="learning rate", ylabel="loss", xscale="log")
    axes.plot(rates, losses, color="lightgray", label="each update")
    axes.plot(rates, smoothed, label="smoothed")
    usual = losses[losses <= 1.5 * smoothed[0]]  # not the last ones, beside which nothing else could be seen
    if len(usual) > 1:
        axes.set_ylim(usual.min(), usual.max())
    for number, (rule, rate) in enumerate(found.items()):
        axes.axvline(rate, color=f"C{number + 1}", linestyle="--", label=f"{rule.replace('_', ' ')}: {rate:.2g}")
    axes.legend()
    return figure
