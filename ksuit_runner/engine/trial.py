"""A run that only tries out whether it can be trained and evaluated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import DatasetCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.engine.rehearsal import rehearse

UPDATES = 2
"""Updates of a trial: the optimizer makes its state in the first one, and has it beside the second one."""


class EndTrial(CallbackBase):
    """Ends a run at once after a few updates and the first batch of every evaluation, without a checkpoint.

    Args:
        mark: File that says that it came as far.
        siblings: Callbacks of the run.
        **kwargs: Passed on to CallbackBase.
    """

    def __init__(self, mark: str, siblings: Mapping[str, CallbackBase], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mark = Path(mark)
        self._siblings = siblings

    def _after_update(self, update_counter: UpdateCounter) -> None:
        if update_counter.update >= min(UPDATES, update_counter.end_update):
            evaluations = [item for item in self._siblings.values() if isinstance(item, DatasetCallback)]
            rehearse(evaluations, self.trainer, self.trainer.evaluation_models)
            self.data_container.world.exchange("the end of the trial")
            self.mark.touch()
            raise KeyboardInterrupt  # as by the second Ctrl-C
