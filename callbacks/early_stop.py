"""Ending a run whose metric no longer gets better."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.config_types import MetricKey
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, StopTraining, suggest


class EarlyStop(CallbackBase):
    """Stops training when a metric has not become better for a number of evaluations.

    NaN is never better. Source: Prechelt, Early Stopping - But When?, 1998.

    Args:
        metric_key: Metric to watch.
        patience: Number of evaluations in a row without a better value after which training stops.
        min_delta: Smallest difference that counts as better.
        **kwargs: Passed on to CallbackBase.

    Raises:
        ConfigError: Neither direction of the metric is the better one, or patience is smaller than 1.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(self, metric_key: MetricKey, patience: int, min_delta: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        direction = self.metric_property_provider.direction(metric_key)
        if direction == "neutral":
            raise ConfigError(f"metric_key: metric_property_provider knows no better direction of '{metric_key}'")
        if patience < 1 or min_delta < 0:
            raise ConfigError(f"patience: at least 1 is needed (not {patience}), and min_delta of 0 or more")
        self.metric_key = metric_key
        self.patience = patience
        self.margin = min_delta if direction == "higher" else -min_delta
        self.best: float | None = None
        self.waited = 0

    def _after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self.metric_key)
        if value is None:
            return
        least = None if self.best is None else self.best + self.margin
        if self.metric_property_provider.is_better(self.metric_key, value, least):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            best = "no value" if self.best is None else f"{self.best:.4g}"
            raise StopTraining(f"{self.metric_key} has not become better than {best} in {self.waited} evaluations")

    def _after_training(self, update_counter: UpdateCounter) -> None:
        if self.metric_key not in self.writer.summary:
            hint = suggest(self.metric_key, self.writer.summary)
            self.logger.warning("callbacks.%s.metric_key: '%s' was never logged. %s", self.name, self.metric_key, hint)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, of which metric it is, and for how many evaluations there was no better one."""
        return {"metric_key": self.metric_key, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up the best value and the waiting, unless a fork watches another metric."""
        if state_dict["metric_key"] == self.metric_key:
            self.best, self.waited = state_dict["best"], state_dict["waited"]
