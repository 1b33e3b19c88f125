"""A run while it trains: its parts, its phase, and its checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from threading import Event
from typing import Any

from torch import Tensor

from ksuit_runner.checkpoint.base_weights import BASE, BaseWeights
from ksuit_runner.checkpoint.format import LOCAL
from ksuit_runner.checkpoint.writer import CheckpointWriter
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.container import DataContainer
from ksuit_runner.distributed.update_word import UpdateWord
from ksuit_runner.distributed.world import World
from ksuit_runner.engine.extra_state import own_extra_state
from ksuit_runner.engine.hooks import Hooks
from ksuit_runner.engine.meeting import Meeting
from ksuit_runner.engine.step_seeds import StepSeeds
from ksuit_runner.log_writer import LogWriter
from ksuit_runner.system.signals import Interruption
from ksuit_runner.tracker.base import BaseTracker
from ksuit_runner.trainer.freezing import frozen_for_good
from ksuit_runner.trainer.sgd import SgdTrainer


class Phase(Enum):
    """Where the loop stands: it decides what a checkpoint can hold if the run ends there."""

    START = auto()  # nothing has changed yet
    AT_START = auto()  # the callbacks that act before the first update are half done
    BETWEEN = auto()  # the last update is done, the next one has not begun
    BEFORE_STEP = auto()  # the next update can be rolled back
    STEP = auto()  # the weights are half changed
    AFTER_UPDATE = auto()  # the hooks that follow an update are half done
    AT_END = auto()  # the callbacks that act at the end of a run that ended early are half done
    AFTER_TRAINING = auto()  # the hooks that follow the last update are half done
    END = auto()  # nothing is left to do


HALF_DONE = (Phase.AT_START, Phase.AFTER_UPDATE, Phase.AT_END, Phase.AFTER_TRAINING)


@dataclass
class Run:
    """The parts of a run, and where it stands.

    Attributes:
        meeting: Has the ranks of the run come together.
        tracker: Tracker of the run, as callbacks see it.
        taken_over: Set when another process has taken the run over.
        unfinished: The hooks of the last update that were called, and their log, if the checkpoint was written between
            two of them.
        base_weights: The weights that checkpoints may leave out; None if they hold everything.
        when_accepted: Called once the callbacks have accepted the run, before its first update.
        seeds: Seeds the generators for the steps of training.
        phase: Where the loop stands.
        is_alone: Whether a single process trains.
        is_asked_to_end: Whether the ranks have agreed that a signal ends the run after this update.
        has_begun: Whether an update, or a hook that follows one, was completed in this process.
    """

    trainer: SgdTrainer
    hooks: Hooks
    log_writer: LogWriter
    checkpoint_writer: CheckpointWriter
    seed: int
    meeting: Meeting
    tracker: BaseTracker
    taken_over: Event = field(default_factory=Event)
    unfinished: Mapping[str, Any] | None = None
    base_weights: BaseWeights | None = None
    when_accepted: Callable[[], object] = bool
    phase: Phase = field(default=Phase.START, init=False)
    is_asked_to_end: bool = field(default=False, init=False)
    has_begun: bool = field(default=False, init=False)
    _have_said: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.is_alone = self.world.size == 1
        self.seeds = StepSeeds(self.seed, self.counter)

    @property
    def world(self) -> World:
        """The ranks of the run."""
        return self.trainer.strategy.world

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
    def must_end(self) -> bool:
        """Whether a signal ends the run now; several ranks end after the same update."""
        return self.interruption.signal is not None if self.is_alone else self.is_asked_to_end

    def word(self) -> UpdateWord:
        """Return what this rank has to say about the update that it computes."""
        has_said = self.log_writer.has_pending or self.checkpoint_writer.is_requested or self.counter.stopped
        return UpdateWord(has_said, self.interruption.signal is not None)

    def hear(self, word: UpdateWord) -> None:
        """Take note of what all ranks have said about the update."""
        self._have_said = word.said > 0 or self.log_writer.has_pending  # by training steps, which all ranks know of
        if word.interrupted:
            self.is_asked_to_end = True
            self.share_signal(self.world.exchange("the signal", self.interruption.signal))

    def share_signal(self, signals: Sequence[int | None]) -> None:
        """Let the signal that has reached one of the ranks count for this one, too."""
        first = next((number for number in signals if number is not None), None)
        self.interruption.signal = self.interruption.signal or first

    def must_flush(self) -> bool:
        """Whether the log is to be flushed: by all ranks together, if one of them may have something to say."""
        if self.is_alone:
            return True
        must = self._have_said or self.hooks.may_have_said
        self._have_said = self.hooks.may_have_said = False
        return must

    @property
    def is_finished(self) -> bool:
        """Whether the run is complete: no update is left, and no hook that follows one."""
        if self.counter.is_empty and self.phase is Phase.START and not self.hooks.states.begun:
            return False
        return self.counter.is_finished and self.unfinished is None and self.phase not in HALF_DONE


def save_checkpoint(run: Run, wait: bool = False) -> None:
    """Write a checkpoint of everything. It is committed once all metrics up to it are on the disk.

    Raises:
        CheckpointError: Something cannot be stored; or, with ``wait``, it could not be written.
    """
    run.trainer.loss_check.settle()
    unfinished = run.unfinished
    if run.phase in HALF_DONE:
        log, requested = run.log_writer.state_dict(), run.checkpoint_writer.take_requests()
        unfinished = {"phase": run.phase.name, "done": list(run.hooks.done), "log": log, "requested": requested}
    model, state, base = _content(run)
    state |= {"unfinished": unfinished}
    run.checkpoint_writer.save(run.counter, model, state, run.log_writer.write_rest, wait=wait, base=base)


def check_state(run: Run) -> None:
    """Check that the present state can be stored, to find out now and not hours later.

    Raises:
        CheckpointError: Something cannot; the message names it.
    """
    run.checkpoint_writer.check(*_content(run))


def _content(run: Run) -> tuple[dict[str, Any], dict[str, Any], Mapping[str, Tensor]]:
    """Return the weights, the state of trainer and callbacks, and the weights that the checkpoint leaves out."""
    model = run.trainer.model.tensors()  # first of all: a module that is spread over ranks then holds its own part only
    trainer = run.trainer.state_dict()
    common, local = run.hooks.states.divide(trainer.pop("callbacks"), run.world)
    local |= own_extra_state(run.trainer, trainer.get("extra"), run.world)
    state = {
        "callbacks": common,
        LOCAL: local,
        "trainer": trainer,
        "begun": sorted(run.hooks.states.begun),
        "draws_on_host": run.seeds.draws_on_host,
    }
    if run.base_weights is None:
        return model, state, {}
    frozen = frozen_for_good(run.trainer.model.module, run.trainer.freezing)
    unchanged = run.base_weights.unchanged(frozen)
    return model, {**state, BASE: unchanged}, {name: frozen[name] for name in unchanged}
