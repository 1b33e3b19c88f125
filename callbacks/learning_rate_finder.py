"""The learning-rate range test."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ksuit_runner.callback_base import CallbackBase, quiet
from ksuit_runner.config.types import AboveOne, FractionBelowOne, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, StopTraining
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.trainer.learning_rate_range import RangeTest
from ksuit_runner.ui.figures import draw_range_test


class LearningRateFinder(CallbackBase):
    """Shows the training loss over the learning rate, which a short run raises at every update, and suggests one.

    ``debug=learning_rate_finder`` is such a run, with the model, data, clipping and ranks of the real one. At its end
    it logs a figure and a table ``NAME``, with a row for each update, and two rules of thumb: ``NAME/steepest``, the
    rate at which the smoothed loss falls fastest over the logarithm of the rate, and ``NAME/tenth_of_minimum``, a tenth
    of the rate at which it is lowest. The loss of every update is read, which waits for the device.

    The rates are those to write into the config as ``optimizer.lr``, before ``trainer.reference_batch_size`` and
    parameter rules multiply them. A parameter rule with a rate of its own rises in proportion; the rate to write there
    is ``NAME/steepest/RULE`` and so on.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks, 2017, https://arxiv.org/abs/1506.01186.

    Args:
        smoothing: Weight of the earlier losses in the exponential mean, from 0 to below 1; its bias is corrected.
        diverged: End the run when the smoothed loss is not finite, or above this multiple of the lowest one; None never
            ends it.
        **kwargs: Passed on to CallbackBase.

    Raises:
        ConfigError: A number is out of its range, the run is too long, there are several optimizers, or the rate is 0.
    """

    logs: ClassVar[Sequence[str] | None] = (
        "{name}/steepest",
        "{name}/steepest/*",
        "{name}/tenth_of_minimum",
        "{name}/tenth_of_minimum/*",
    )

    def __init__(self, smoothing: FractionBelowOne = 0.9, diverged: AboveOne | None = 4.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_numbers("AboveOne", diverged=diverged)
        check_numbers("FractionBelowOne", smoothing=smoothing)
        if len(names := list(self.trainer.optimizers.members)) > 1:
            raise ConfigError(f"it is for one optimizer, and there are {', '.join(names)}: which rate is to rise?")
        if (end := self.trainer.counter.end_update) > 10_000:
            raise ConfigError(f"it keeps the losses of all {end} updates: debug=learning_rate_finder makes a short run")
        [self._optimizer] = self.trainer.optimizers.members.values()
        self._lr = next(iter(self._optimizer.configured_rates.values()), 0.0)
        if not self._lr or not any(self._optimizer.base_rates.values()):
            raise ConfigError("a learning rate of 0 cannot rise", path="optimizer.lr")
        self.smoothing, self.diverged = smoothing, diverged
        self.trainer.keep_total_loss()
        self._seen = RangeTest([], [], [])

    @quiet
    @uses_no_rng
    def _before_every_optimizer_step(self, update_counter: UpdateCounter) -> None:
        rate = self._lr * self._optimizer.rate_factor
        self._seen.add(rate, self.trainer.total_loss.item(), self.smoothing)

    @quiet
    @uses_no_rng
    def _after_update(self, update_counter: UpdateCounter) -> None:
        if self.diverged is not None and self._seen.has_diverged(self.diverged):
            raise StopTraining(f"the loss has diverged at a learning rate of {self._seen.rates[-1]:.3g}")

    @uses_no_rng
    def _after_training(self, update_counter: UpdateCounter) -> None:
        name, seen = self.display_name, self._seen
        if not seen.losses:
            return
        self.writer.add_table(name, ["learning_rate", "loss", "smoothed_loss"], list(zip(*seen, strict=True)))
        for rule, rate in (found := seen.suggest(self.smoothing)).items():
            self._suggest(f"{name}/{rule}", rate)
        rates, losses, smoothed = map(np.array, seen)
        self.writer.add_figure(name, draw_range_test(rates, losses, smoothed, found))

    def _suggest(self, key: str, rate: float) -> None:
        """Log a rate, and those of parameter rules that have one of their own; and all of them as they are written."""
        rates = {path: value * rate / self._lr for path, value in self._optimizer.configured_rates.items()}
        self.logger.info("%s: %s", key, " ".join(f"{path}={value:.3g}" for path, value in rates.items()))
        for number, (path, value) in enumerate(rates.items()):
            self.writer.add_scalar(f"{key}/{path.split('.')[-2]}" if number else key, value)

    def state_dict(self) -> dict[str, Any]:
        """Return the learning rate and the losses of every update."""
        return {name: list(values) for name, values in self._seen._asdict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        self._seen = RangeTest(**{name: list(state_dict[name]) for name in RangeTest._fields})
