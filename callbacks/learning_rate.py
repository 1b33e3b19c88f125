"""The learning rate."""

from collections.abc import Sequence
from typing import ClassVar

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.periodic_callback import PeriodicCallback


class LearningRate(PeriodicCallback):
    """Logs ``learning_rate``; where parameter groups differ, ``learning_rate/GROUP`` for each."""

    logs: ClassVar[Sequence[str] | None] = ("learning_rate", "learning_rate/*")

    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        rates = self.trainer.learning_rates()
        if len(set(rates.values())) == 1:
            self.writer.add_scalar("learning_rate", next(iter(rates.values())))
            return
        for group, rate in rates.items():
            self.writer.add_scalar(f"learning_rate/{group}", rate)
