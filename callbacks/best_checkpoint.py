"""Keeping the checkpoint with the best value of a metric."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.config_types import MetricKey
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, suggest


class BestCheckpoint(CallbackBase):
    """Has a checkpoint written, and kept under a tag, whenever a metric is better than ever before.

    Args:
        metric_key: Metric to watch.
        tag: Tag of the checkpoint; the callback's name if None.
        **kwargs: Passed on to CallbackBase.

    Raises:
        ConfigError: Neither direction of the metric is the better one.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(self, metric_key: MetricKey, tag: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.metric_property_provider.direction(metric_key) == "neutral":
            raise ConfigError(f"metric_key: metric_property_provider knows no better direction of '{metric_key}'")
        self.metric_key = metric_key
        self.tag = tag or self.name
        self.best: float | None = None

    def _after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self.metric_key)
        if value is not None and self.metric_property_provider.is_better(self.metric_key, value, self.best):
            self.best = value
            self.checkpoint_writer.request(self.tag)

    def _after_training(self, update_counter: UpdateCounter) -> None:
        if self.metric_key not in self.writer.summary:
            hint = suggest(self.metric_key, self.writer.summary)
            self.logger.warning("callbacks.%s.metric_key: '%s' was never logged. %s", self.name, self.metric_key, hint)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far, and of which metric it is."""
        return {"metric_key": self.metric_key, "best": self.best}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up the best value so far, unless a fork watches another metric."""
        if state_dict["metric_key"] == self.metric_key:
            self.best = state_dict["best"]
