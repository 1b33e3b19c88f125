"""Early stopping by a metric."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ksuit_runner.errors import ConfigError, StopTraining
from ksuit_runner.metric_callback import MetricCallback


class EarlyStop(MetricCallback):
    """Stops training when a metric has not improved for a number of evaluations.

    NaN is not an improvement. Source: Prechelt, Early Stopping - But When?, 1998.

    Args:
        patience: Number of consecutive evaluations without improvement after which training stops.
        min_delta: Smallest difference that counts as an improvement.
        **kwargs: Passed on to MetricCallback.

    Raises:
        ConfigError: Patience is smaller than 1, or min_delta below 0.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(self, patience: int, min_delta: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if patience < 1 or min_delta < 0:
            raise ConfigError(f"patience: at least 1 is needed (not {patience}), and min_delta of 0 or more")
        self.patience = patience
        is_higher_better = self.metric_property_provider.higher_is_better(self.metric_key)
        self.margin = min_delta if is_higher_better else -min_delta
        self.waited = 0

    def _process_value(self, value: float) -> None:
        least = None if self.best is None else self.best + self.margin
        if self.metric_property_provider.is_better(self.metric_key, value, least):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            best = "no value" if self.best is None else f"{self.best:.4g}"
            raise StopTraining(f"{self.metric_key} has not improved on {best} in {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, and the number of evaluations since."""
        return {**super().state_dict(), "waited": self.waited}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the best value and the evaluations since, unless a fork watches another metric."""
        super().load_state_dict(state_dict)
        if state_dict["metric_key"] == self.metric_key:
            self.waited = state_dict["waited"]
