"""Number of parameters of the model."""

from collections.abc import Sequence
from typing import ClassVar

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter


class ParameterCount(CallbackBase):
    """Logs ``parameter_count``, the number of trainable parameters, once."""

    logs: ClassVar[Sequence[str] | None] = ("parameter_count",)

    def _before_training(self, update_counter: UpdateCounter) -> None:
        self.writer.add_scalar("parameter_count", self.model.parameter_count, logger=self.logger, format_str=",.0f")
