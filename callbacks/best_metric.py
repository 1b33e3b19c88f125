"""The best value of a metric, with the values of others at that moment."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.metric import MetricCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import did_you_mean
from ksuit_runner.tensors.name_patterns import matches_any, matching


class BestMetric(MetricCallback):
    """Logs the best value of a metric, whenever it improves, and the latest values of others at that moment.

    The keys are those of the metrics, after the name of the callback: ``best_metric/accuracy/validation``,
    ``best_metric/loss/train``. Their last points thus say what the run had reached when it was at its best.

    Args:
        others: Patterns of the keys of the other metrics.
        **kwargs: Passed on to MetricCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ("{name}/*",)

    def __init__(self, others: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.others = list(others)
        self._latest: dict[str, float] = {}

    def _after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None:
        own = f"{self.display_name}/"
        for key, value in metrics.items():
            if not key.startswith(own) and matches_any(key, self.others):
                self._latest[key] = value
        super()._after_log(update_counter, metrics)

    def _process_value(self, value: float) -> None:
        if self.metric_property_provider.is_better(self.metric_key, value, self.best):
            self.best = value
            for key, latest in {**self._latest, self.metric_key: value}.items():
                self.writer.add_scalar(f"{self.display_name}/{key}", latest)

    def _after_training(self, update_counter: UpdateCounter) -> None:
        super()._after_training(update_counter)
        for pattern in self.others:
            is_general = "*" in pattern and self._latest  # as those of the shipped file, of which a run may have one
            if not is_general and not matching(pattern, self._latest):
                path = f"callbacks.{self.display_name}.others"
                hint = did_you_mean(pattern, self.writer.summary)
                self.logger.warning("%s: no metric that was logged matches '%s'. %s", path, pattern, hint)

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far, and the latest ones of the other metrics."""
        return {**super().state_dict(), "latest": dict(self._latest)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the best value so far, unless a fork watches another metric, and the latest values of the others."""
        super().load_state_dict(state_dict)
        self._latest = dict(state_dict["latest"])
