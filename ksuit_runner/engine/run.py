"""A run while it trains: what it works with, where it stands, and saving that so that it can go on from there."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from threading import Event
from typing import Any

from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.container import DataContainer
from ksuit_runner.engine.hooks import Hooks
from ksuit_runner.errors import KsuitError
from ksuit_runner.log_writer import LogWriter
from ksuit_runner.system.signals import Interruption
from ksuit_runner.trainer.sgd import SgdTrainer

_LOGGER = logging.getLogger(__name__)


class Phase(Enum):
    """Where the loop stands, which says what a checkpoint can hold if the run ends there."""

    START = auto()  # nothing has changed yet
    BETWEEN = auto()  # the last update is done, and nothing of the next one
    BEFORE_STEP = auto()  # the next update can be taken back
    STEP = auto()  # the weights are half changed
    AFTER_UPDATE = auto()  # what follows an update is half done
    AFTER_TRAINING = auto()  # what follows the last update of all is half done
    END = auto()  # nothing is left to do


HALF_DONE = (Phase.AFTER_UPDATE, Phase.AFTER_TRAINING)


@dataclass
class Run:
    """What the loop works with.

    Attributes:
        taken_over: Set when another process has taken the run over.
        unfinished: What followed the last update when the run ended in the middle of it, from the checkpoint.
        phase: Where the loop stands.
        taken_back: State of the trainer that stands for the present one after a failed update was taken back.
    """

    trainer: SgdTrainer
    hooks: Hooks
    log_writer: LogWriter
    checkpoint_writer: CheckpointWriter
    seed: int
    taken_over: Event = field(default_factory=Event)
    unfinished: Mapping[str, Any] | None = None
    rank: int = 0
    phase: Phase = field(default=Phase.START, init=False)
    taken_back: Mapping[str, Any] = field(default_factory=dict, init=False)

    @property
    def data(self) -> DataContainer:
        """All datasets of the run."""
        return self.trainer.data_container

    @property
    def interruption(self) -> Interruption:
        """Signals that ask the run to end."""
        return self.data.interruption

    @property
    def counter(self) -> UpdateCounter:
        """Position of the run."""
        return self.trainer.counter

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do, neither an update nor what follows it."""
        if self.counter.is_empty and self.phase is Phase.START and not self.hooks.states.begun:
            return False
        return self.counter.is_finished and self.unfinished is None and self.phase not in HALF_DONE


def save_checkpoint(run: Run, wait: bool = False) -> None:
    """Take a checkpoint of everything. It is committed after all metrics up to it are on the disk.

    Raises:
        CheckpointError: Something cannot be stored; or, with ``wait``, it could not be written.
    """
    run.trainer.loss_check.settle()
    unfinished = run.unfinished
    if run.phase in HALF_DONE:
        log, requested = run.log_writer.state_dict(), run.checkpoint_writer.take_requests()
        unfinished = {"phase": run.phase.name, "done": list(run.hooks.done), "log": log, "requested": requested}
    state = {**_state(run), "unfinished": unfinished}
    run.checkpoint_writer.save(run.counter, run.trainer.model.tensors(), state, run.log_writer.sync, wait=wait)


def check_state(run: Run) -> None:
    """Check that the present state can be stored: that is found out now, and not hours later.

    Raises:
        CheckpointError: Something cannot; the message names it.
    """
    run.checkpoint_writer.check(run.trainer.model.tensors(), _state(run))


def _state(run: Run) -> dict[str, Any]:
    trainer = {**run.trainer.state_dict(), **run.taken_back}
    return {"callbacks": trainer.pop("callbacks"), "trainer": trainer, "begun": sorted(run.hooks.states.begun)}


def save_last_full_update(run: Run) -> None:
    """Save what a failed run can go on from: the state after the last full update, whatever has failed since."""
    states, phase = run.hooks.states, run.phase
    is_lost = phase is Phase.STEP or not states.are_whole or run.trainer.loss_check.has_failed_late
    if run.taken_over.is_set() or phase in (Phase.START, Phase.END):
        return
    if is_lost or (phase is Phase.BEFORE_STEP and not states.can_take_back):
        _LOGGER.warning("no state after a full update is left: a resume goes on from the checkpoint before it")
        return
    try:
        if phase is Phase.BEFORE_STEP:
            _take_back_update(run)
        save_checkpoint(run, wait=True)
    except (KsuitError, OSError) as error:
        _LOGGER.error("the last state could not be saved, the run goes on from the checkpoint before it: %s", error)


def _take_back_update(run: Run) -> None:
    """Undo what an update has changed before its step; of the callbacks, what was kept counts."""
    run.taken_back = run.trainer.roll_back()
    run.checkpoint_writer.take_requests()
    run.counter.stopped = False
    run.phase = Phase.BETWEEN
