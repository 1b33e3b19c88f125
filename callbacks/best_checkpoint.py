"""Checkpoints at the best values of a metric."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.metric import MetricCallback
from ksuit_runner.callback_bases.ranking import Ranking
from ksuit_runner.config.types import MetricKey, NonNegativeFloat, PositiveInt, check_numbers
from ksuit_runner.counter import UpdateCounter


class BestCheckpoint(MetricCallback):
    """Writes a checkpoint, and keeps it under a tag, whenever a metric improves on its best value.

    Args:
        tag: Tag of the checkpoint; by default the callback's name.
        min_delta: Difference that an improvement has to exceed.
        tie_breakers: Metrics of the same update that decide between equal values: the first one that differs.
        top_k: How many of the best checkpoints are kept: the second one under ``TAG_2``, the third one under ``TAG_3``.
        patiences: For each n, keep under ``TAG_patience_n`` what ``early_stop`` with that patience would end with.
        **kwargs: Passed on to MetricCallback.

    Raises:
        ConfigError: A number is out of range.
    """

    logs: ClassVar[Sequence[str] | None] = ()
    tags: ClassVar[Sequence[str] | None] = ("{tag}", "{tag}_*")

    def __init__(
        self,
        tag: str | None = None,
        min_delta: NonNegativeFloat = 0.0,
        tie_breakers: Sequence[MetricKey] = (),
        top_k: PositiveInt = 1,
        patiences: Sequence[PositiveInt] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_numbers("NonNegativeFloat", min_delta=min_delta)
        check_numbers("PositiveInt", top_k=top_k, patiences=patiences)
        self.tag = tag or self.display_name
        self._tags = [self.tag, *(f"{self.tag}_{place}" for place in range(2, top_k + 1))]
        self._patiences = patiences
        self._ranking = Ranking(self.metric_property_provider, (self.metric_key, *tie_breakers), top_k, min_delta)
        self._waited = self._longest_wait = 0

    def _before_training(self, update_counter: UpdateCounter) -> None:
        super()._before_training(update_counter)
        self.tracker.list_tagged(self.tag, self._ranking.keys)

    def _after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None:
        self._values = [metrics.get(key, math.nan) for key in self._ranking.keys]
        self._checkpoint = str(update_counter.progress)
        super()._after_log(update_counter, metrics)

    def _process_value(self, value: float) -> None:
        place = self._ranking.insert(self._values, self._checkpoint)
        if place == 0:
            self.best, self._waited = value, 0
            for patience in self._patiences:
                if self._longest_wait < patience:
                    self.checkpoint_writer.request(f"{self.tag}_patience_{patience}")
        else:
            self._waited += 1
            self._longest_wait = max(self._longest_wait, self._waited)
        if place is not None:
            for moved, (_, checkpoint) in enumerate(self._ranking.top[place:], place):
                self.checkpoint_writer.request(self._tags[moved], checkpoint if moved > place else None)

    def state_dict(self) -> dict[str, Any]:
        """Return the best values with their checkpoints, and how long there was no improvement."""
        return {**super().state_dict(), "top": self._ranking.top, "waited": [self._waited, self._longest_wait]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore that, unless a fork watches another metric."""
        super().load_state_dict(state_dict)
        if state_dict["metric_key"] == self.metric_key:
            self._ranking.restore(state_dict.get("top", ()))
            self._waited, self._longest_wait = state_dict.get("waited", (0, 0))
