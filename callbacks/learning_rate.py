"""Learning rates of the parameter groups."""

from collections.abc import Sequence
from typing import Any, ClassVar

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.periodic_callback import PeriodicCallback


class LearningRate(PeriodicCallback):
    """Logs ``learning_rate``, that of the next update; ``learning_rate/GROUP`` where parameter groups differ.

    Args:
        **kwargs: Passed on to PeriodicCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ("learning_rate", "learning_rate/*")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Decided once: groups that differ may coincide later, such as at 0 when a schedule ends.
        self._is_shared = len(set(self.trainer.learning_rates().values())) == 1

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        for group, rate in self.trainer.learning_rates().items():
            if self._is_shared:
                self.writer.add_scalar("learning_rate", rate)
                return
            self.writer.add_scalar(f"learning_rate/{group}", rate)
