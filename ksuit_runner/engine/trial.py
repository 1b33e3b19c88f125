"""A run that only tries out whether it can be trained."""

from pathlib import Path
from typing import Any

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter

UPDATES = 2
"""Updates of a trial: the optimizer makes its state in the first one, and has it beside the second one."""


class EndTrial(CallbackBase):
    """Ends a run at once after a few updates, without a checkpoint and without evaluations.

    Args:
        mark: File that says that it came as far.
        **kwargs: Passed on to CallbackBase.
    """

    def __init__(self, mark: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mark = Path(mark)

    def _after_update(self, update_counter: UpdateCounter) -> None:
        if update_counter.update >= min(UPDATES, update_counter.end_update):
            self.data_container.world.exchange("the end of the trial")
            self.mark.touch()
            raise KeyboardInterrupt  # as by the second Ctrl-C
