"""Early stopping by a metric."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, ClassVar

from ksuit_runner.callback_bases.metric import MetricCallback
from ksuit_runner.config.types import NonNegativeFloat, NonNegativeInt, PositiveInt, check_numbers
from ksuit_runner.errors import ConfigError, StopTraining


class EarlyStop(MetricCallback):
    """Stops training when a metric no longer improves, is good enough, has diverged, or is not finite.

    NaN is not an improvement. Source: Prechelt, Early Stopping - But When?, 1998.

    Args:
        patience: Number of consecutive evaluations without improvement after which training stops; None for any.
        min_delta: Difference that an improvement has to exceed.
        good_enough: Stop at a value that is as good as this one, or better.
        diverged: Stop at a value that is worse than this one, or NaN.
        stop_if_not_finite: Stop at a value that is NaN or infinite.
        min_epochs: Number of epochs before which nothing stops training; values count from the beginning.
        min_updates: The same in updates.
        **kwargs: Passed on to MetricCallback.

    Raises:
        ConfigError: None of the conditions is given, or a number is out of its range.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(
        self,
        patience: PositiveInt | None = None,
        min_delta: NonNegativeFloat = 0.0,
        good_enough: float | None = None,
        diverged: float | None = None,
        stop_if_not_finite: bool = False,
        min_epochs: NonNegativeInt = 0,
        min_updates: NonNegativeInt = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if patience is None and good_enough is None and diverged is None and not stop_if_not_finite:
            raise ConfigError("one of patience, good_enough, diverged, stop_if_not_finite is needed, not none")
        check_numbers("PositiveInt", patience=patience)
        check_numbers("NonNegativeFloat", min_delta=min_delta)
        check_numbers("NonNegativeInt", min_epochs=min_epochs, min_updates=min_updates)
        if min_epochs and not self.trainer.counter.has_epochs:
            raise ConfigError("min_epochs: the training data is a stream, which has no epochs; use min_updates")
        if good_enough is not None and diverged is not None and not self._is_better(good_enough, diverged):
            raise ConfigError(f"diverged: {diverged} is not worse than good_enough, which is {good_enough}")
        self.patience, self.good_enough, self.diverged = patience, good_enough, diverged
        self.stop_if_not_finite = stop_if_not_finite
        self.min_epochs, self.min_updates = min_epochs, min_updates
        is_higher_better = self.metric_property_provider.higher_is_better(self.metric_key)
        self.margin = min_delta if is_higher_better else -min_delta
        self.waited = 0

    def _process_value(self, value: float) -> None:
        if self._is_better(value, None if self.best is None else self.best + self.margin):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        counter, reason = self.trainer.counter, self._reason(value)
        if reason and counter.update >= self.min_updates and counter.epoch >= self.min_epochs:
            raise StopTraining(f"{self.metric_key} {reason}")

    def _reason(self, value: float) -> str | None:
        """Return why a value stops training, None if it does not."""
        if self.stop_if_not_finite and not isfinite(value):
            return f"is {value}"
        if self.good_enough is not None and (value == self.good_enough or self._is_better(value, self.good_enough)):
            return f"is {value:.4g}, and {self.good_enough:.4g} is good enough"
        if self.diverged is not None and self._is_better(self.diverged, value):
            return f"is {value:.4g}, worse than {self.diverged:.4g}"
        if self.patience is not None and self.waited >= self.patience:
            best = "no value" if self.best is None else f"{self.best:.4g}"
            return f"has not improved on {best} in {self.waited} evaluations"
        return None

    def _is_better(self, value: float, other: float | None) -> bool:
        return self.metric_property_provider.is_better(self.metric_key, value, other)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, and the number of evaluations since."""
        return {**super().state_dict(), "waited": self.waited}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the best value and the evaluations since, unless a fork watches another metric."""
        super().load_state_dict(state_dict)
        if state_dict["metric_key"] == self.metric_key:
            self.waited = state_dict["waited"]
