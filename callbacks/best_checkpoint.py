"""A checkpoint at the best value of a metric."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ksuit_runner.metric_callback import MetricCallback


class BestCheckpoint(MetricCallback):
    """Writes a checkpoint, and keeps it under a tag, whenever a metric improves on its best value.

    Args:
        tag: Tag of the checkpoint; by default the callback's name.
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
