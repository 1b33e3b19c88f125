"""Keeping the checkpoint with the best value of a metric."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ksuit_runner.metric_callback import MetricCallback


class BestCheckpoint(MetricCallback):
    """Has a checkpoint written, and kept under a tag, whenever a metric is better than ever before.

    Args:
        tag: Tag of the checkpoint; the callback's name if None.
        **kwargs: Passed on to MetricCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(self, tag: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tag = tag or self.display_name

    def _process_value(self, value: float) -> None:
        if self.metric_property_provider.is_better(self.metric_key, value, self.best):
            self.best = value
            self.checkpoint_writer.request(self.tag)
