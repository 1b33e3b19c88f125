"""Base class of callbacks that watch one metric."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.config.types import MetricKey
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, did_you_mean


class MetricCallback(CallbackBase):
    """A callback that reacts to the values of a metric: override ``_process_value``.

    Args:
        metric_key: Metric to watch.
        **kwargs: Passed on to CallbackBase.

    Attributes:
        best: Best value so far, None before the first one; set by the subclass.

    Raises:
        ConfigError: Neither direction of the metric is better.
    """

    def __init__(self, metric_key: MetricKey, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.metric_property_provider.direction(metric_key) == "neutral":
            raise ConfigError(
                f"it is not known whether higher or lower values of '{metric_key}' are better: add its name to "
                "metric_property_provider.higher, or .lower",
                path=f"callbacks.{self.display_name}.metric_key",
            )
        self.metric_key = metric_key
        self.best: float | None = None

    def _after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None:
        if self.metric_key in metrics and not self.writer.prefix:  # evaluate= is not training
            self._process_value(metrics[self.metric_key])

    @abstractmethod
    def _process_value(self, value: float) -> None:
        """React to a value of the metric, each time that it is logged."""

    def _after_training(self, update_counter: UpdateCounter) -> None:
        if self.metric_key not in self.writer.summary:
            hint = did_you_mean(self.metric_key, self.writer.summary)
            path = f"callbacks.{self.display_name}.metric_key"
            self.logger.warning("%s: '%s' was never logged. %s", path, self.metric_key, hint)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far, and its metric."""
        return {"metric_key": self.metric_key, "best": self.best}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the best value so far, unless a fork watches another metric."""
        if state_dict["metric_key"] == self.metric_key:
            self.best = state_dict["best"]
