"""The phases of an update, for callbacks that time them, name them in a trace, or count in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol

from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.engine.callback_states import implements
from ksuit_runner.engine.hooks import HOOKS

if TYPE_CHECKING:
    from ksuit_runner.callback_base import CallbackBase
    from ksuit_runner.checkpoint.writer import CheckpointWriter
    from ksuit_runner.log_writer import LogWriter
    from ksuit_runner.trainer.sgd import SgdTrainer

PHASES = {
    "data": "until the batch of an update is there, on the device",
    "forward": "outputs and losses",
    "backward": "gradients; those of several ranks are added up",
    "step": "clipping, and the change of the weights",
    "callbacks": "all hooks, evaluations among them",
    "log": "reading what was logged from the device, and writing it to the journal",
    "checkpoint": "what training waits for while one is written",
}
CALLBACK = "callback/"
"""What the phase of a callback begins with, before its name: it lasts while one of its hooks runs."""


class PhaseWatcher(Protocol):
    """Is told when a phase begins and ends; each callback's hooks are a phase of their own."""

    def begin(self, phase: str) -> None:
        """Called before it."""

    def end(self, phase: str) -> None:
        """Called after it, also if it has failed."""


class Phases:
    """Tells watchers when the phases of a run begin and end, in its main thread.

    A callback asks for it by an argument ``phases`` of its constructor. If none does, the loop is as if this did not
    exist.

    Attributes:
        callbacks: Phases of the callbacks of the run, in their order; known once training begins.
    """

    def __init__(self) -> None:
        self.callbacks: list[str] = []
        self._watchers: list[PhaseWatcher] = []

    def watch(self, watcher: PhaseWatcher) -> None:
        """Tell a watcher from now on; called in the constructor of a callback."""
        self._watchers.append(watcher)

    def attach(
        self,
        trainer: SgdTrainer,
        log_writer: LogWriter,
        checkpoint_writer: CheckpointWriter,
        callbacks: Mapping[str, CallbackBase],
    ) -> None:
        """Put the watchers around what the loop calls, if there are any."""
        if not self._watchers:
            return
        for phase, owner, *methods in (
            ("data", trainer.data_container, "next_training_batch"),
            ("data", trainer, "to_device"),
            ("forward", trainer.update, "forward"),
            ("backward", trainer.update, "backward", "complete_gradients"),
            ("step", trainer, "step"),
            ("step", trainer.update, "skip"),
            ("log", log_writer, "flush"),
            ("checkpoint", checkpoint_writer, "save"),
        ):
            for method in methods:
                setattr(owner, method, self._watched(phase, getattr(owner, method)))
        for name, item in callbacks.items():
            hooks = [hook for hook in HOOKS if implements(item, hook)]
            hooks += ["timed_callback"] if implements(item, "timed_callback") else []
            hooks += ["periodic_callback"] if isinstance(item, PeriodicCallback) else []
            hooks += ["read_batch"] if isinstance(item, DatasetCallback) else []
            for hook in hooks:
                watched = self._watched(CALLBACK + name, getattr(type(item), hook))
                setattr(item, hook, MethodType(watched, item))
            if hooks:
                self.callbacks.append(CALLBACK + name)

    def _watched(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        watchers = self._watchers

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            for watcher in watchers:
                watcher.begin(phase)
            try:
                return method(*args, **kwargs)
            finally:
                for watcher in reversed(watchers):
                    watcher.end(phase)

        return call
