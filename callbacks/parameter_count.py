"""Number of parameters of the model."""

from collections.abc import Sequence
from typing import ClassVar

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter


class ParameterCount(CallbackBase):
    """Records ``parameter_count``, the number of trainable parameters, among the parameters of the run."""

    logs: ClassVar[Sequence[str] | None] = ()

    def _before_training(self, update_counter: UpdateCounter) -> None:
        count = self.model.parameter_count
        self.logger.info("parameter_count: %s", f"{count:,}")
        self.tracker.log_params({"parameter_count": count})
