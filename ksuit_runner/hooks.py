"""The callbacks of a run: which of them implement which hook, firing, and their states by name."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint_format import Checkpoint, check_state
from ksuit_runner.counter import Interval, UpdateCounter
from ksuit_runner.errors import ResumeError, StopTraining
from ksuit_runner.models.base import ModelBase
from ksuit_runner.periodic_callback import DatasetCallback, PeriodicCallback

_LOGGER = logging.getLogger(__name__)

HOOKS = (
    "before_training",
    "after_training",
    "on_exception",
    "before_every_update",
    "before_every_accumulation_step",
    "before_every_backward",
    "track_after_accumulation_step",
    "track_after_update_step",
    "after_update",
    "after_epoch",
    "after_log",
)


class Hooks:
    """Fires the hooks of a run's callbacks, in the order of the config.

    What a callback implements is worked out once; a hook that no callback implements costs a look into a table.

    Args:
        callbacks: Callbacks by name.
        update_counter: Position of the run; a callback that raises StopTraining marks it as stopped.
    """

    def __init__(self, callbacks: Mapping[str, CallbackBase], update_counter: UpdateCounter) -> None:
        self.callbacks = dict(callbacks)
        self._counter = update_counter
        self._table = {hook: [getattr(item, hook) for item in callbacks.values() if _has(item, hook)] for hook in HOOKS}
        self._periodic: dict[Interval, list[Callable[..., None]]] = {}
        for item in callbacks.values():
            if isinstance(item, PeriodicCallback):
                self._periodic.setdefault(item.interval, []).append(item.periodic_callback)

    def has(self, *hooks: str) -> bool:
        """Whether any callback implements one of these hooks."""
        return any(self._table[hook] for hook in hooks)

    def fire(self, hook: str, **arguments: Any) -> None:
        """Call a hook of all callbacks that implement it."""
        methods = self._table[hook]
        if methods:
            self._call(methods, arguments)

    def fire_after_update(self, is_full_epoch: bool) -> None:
        """Call what comes after an update, and after an epoch: the hooks, each followed by what is due then."""
        arguments = {"update_counter": self._counter}
        self.fire("track_after_update_step", **arguments)
        self.fire("after_update", **arguments)
        self._fire_due(is_epoch=False)
        if is_full_epoch:
            self.fire("after_epoch", **arguments)
            self._fire_due(is_epoch=True)

    def _fire_due(self, is_epoch: bool) -> None:
        due = [
            method
            for interval, methods in self._periodic.items()
            if (interval.every_n_epochs is not None) is is_epoch and interval.is_due(self._counter)
            for method in methods
        ]
        if due:
            self._call(due, {"update_counter": self._counter})

    def fire_evaluations(self) -> None:
        """Let every callback that goes through a dataset do so now."""
        methods = [item.periodic_callback for item in self.callbacks.values() if isinstance(item, DatasetCallback)]
        self._call(methods, {"update_counter": self._counter})

    def evaluations(self) -> list[tuple[Interval, str]]:
        """Return which datasets are evaluated when, in the order in which that happens after an update."""
        callbacks = [item for item in self.callbacks.values() if isinstance(item, DatasetCallback)]
        intervals = list(self._periodic)
        order = sorted(callbacks, key=lambda item: intervals.index(item.interval))
        return [(item.interval, item.dataset_key) for item in order]

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all callbacks that have one, by name."""
        states = {name: item.state_dict() for name, item in self.callbacks.items()}
        for name, state in states.items():
            check_state(f"callbacks.{name}: state_dict()", state)
        return {name: state for name, state in states.items() if state is not None}

    def resume(
        self, checkpoint: Checkpoint, model: ModelBase, may_lack: bool = False, may_have_more: bool = False
    ) -> None:
        """Give every callback its state and the files of the checkpoint.

        Args:
            checkpoint: What the run resumes from.
            model: Model with its weights loaded.
            may_lack: Whether a stateful callback may be new, without a state in the checkpoint.
            may_have_more: Whether the checkpoint may have states of callbacks that are not there.

        Raises:
            ResumeError: The names do not match.
        """
        stored = checkpoint.state["callbacks"]
        expected = self.state_dict()
        missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
        if (missing and not may_lack) or (unexpected and not may_have_more):
            raise ResumeError(
                f"callbacks: the checkpoint has no state for {missing or 'none'}, "
                f"and one for {unexpected or 'none'} that is not there.\n"
                "Give the run the same callbacks, or allow the difference with resume_strict=false"
            )
        for name, item in self.callbacks.items():
            if name in stored:
                item.load_state_dict(stored[name])
            if name not in missing:
                item.resume_from_checkpoint(checkpoint.paths, model)

    def close(self) -> None:
        """Let every callback give back what it holds."""
        for item in self.callbacks.values():
            item.close()

    def _call(self, methods: list[Callable[..., None]], arguments: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for method in methods:
                try:
                    method(**arguments)
                except StopTraining as stop:
                    self._counter.stopped = True
                    _LOGGER.info("training stops at update %d: %s", self._counter.update, stop)


def _has(callback: CallbackBase, hook: str) -> bool:
    return getattr(type(callback), f"_{hook}") is not getattr(CallbackBase, f"_{hook}")
