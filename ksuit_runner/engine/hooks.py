"""The callbacks of a run: which of them implement which hook, and firing them in their order."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, takewhile
from time import monotonic
from typing import Any, Final

import torch

from ksuit_runner.callback_base import CallbackBase, is_quiet
from ksuit_runner.callback_bases.periodic import DatasetCallback, PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.data.batch_plan import Evaluation
from ksuit_runner.distributed.world import World
from ksuit_runner.engine.agenda import Agenda, Method
from ksuit_runner.engine.callback_states import CallbackStates, implements
from ksuit_runner.engine.pass_groups import pass_groups
from ksuit_runner.engine.shared_metrics import check_shared_metrics
from ksuit_runner.errors import Interrupted, KsuitError, StopTraining, afterwards
from ksuit_runner.keyed_random import may_draw, mix, seed_all, undisturbed
from ksuit_runner.trainer.evaluation_pass import is_shared
from ksuit_runner.trainer.gradients import graphs_built

_LOGGER = logging.getLogger(__name__)

HOOKS = (
    "before_training",
    "after_training",
    "on_exception",
    "before_every_update",
    "before_every_accumulation_step",
    "before_every_backward",
    "track_after_accumulation_step",
    "before_every_optimizer_step",
    "track_after_update_step",
    "after_update",
    "after_epoch",
    "after_log",
)

BEFORE_DRAWS: Final = ("before_every_backward", "track_after_accumulation_step", "before_every_optimizer_step")
"""Hooks after which training itself may draw random numbers, in the backward pass and in the optimizer's step."""


class Hooks:
    """Fires the hooks of a run's callbacks, in the order of the config.

    What a callback implements is worked out once; a hook that no callback implements costs one table look-up. The
    random generators are seeded for each call of a hook, unless it is marked with ``uses_no_rng``.

    Args:
        callbacks: Callbacks by name.
        update_counter: Position of the run; a callback that raises StopTraining marks it as stopped.
        seed: Seed of the run.
        gradient_versions: Returns a number for each gradient of the model, which differs once the gradient has changed.
        world: The ranks of the run; by default there is one.

    Raises:
        ConfigError: Two callbacks would log different values under one key.

    Attributes:
        callbacks: Callbacks by name.
        periodic: Those of them that act at intervals.
        agenda: Says which hooks are due.
        states: The callbacks' states.
        done: Hooks of the current round that were called already, as ``NAME.HOOK``.
        may_have_said: Whether a hook that is not ``quiet`` was called since this was reset, which is the same on all
            ranks.
    """

    def __init__(
        self,
        callbacks: Mapping[str, CallbackBase],
        update_counter: UpdateCounter,
        seed: int = 0,
        gradient_versions: Callable[[], list[int]] = list,
        world: World | None = None,
    ) -> None:
        self.callbacks = dict(callbacks)
        for name, item in callbacks.items():
            item.name = item.name or name
        check_shared_metrics(self.callbacks, update_counter)
        self._has_peers = world is not None and world.size > 1
        self.states = CallbackStates(self.callbacks, keeps=self._has_peers)
        self.done: list[str] = []
        self.may_have_said = False
        self._counter = update_counter
        self._seed = seed
        self._gradient_versions = gradient_versions
        self._table = {
            hook: [getattr(item, hook) for item in callbacks.values() if implements(item, hook)] for hook in HOOKS
        }
        periodic = [item for item in callbacks.values() if isinstance(item, PeriodicCallback)]
        of_stored_weights = [item for item in periodic if isinstance(item, DatasetCallback) and item.weights_of]
        self._table["after_training"][:0] = [item.periodic_callback for item in of_stored_weights]
        for item in periodic:
            if item not in of_stored_weights:
                item.interval.check(update_counter, f"callbacks.{item.name}")
        self.periodic = [item for item in periodic if not (item in of_stored_weights or item.is_idle)]
        after_update = [*self._table["track_after_update_step"], *self._table["after_update"]]
        self.agenda = Agenda(after_update, self._table["after_epoch"], self.periodic, update_counter)
        self._timed = [item for item in callbacks.values() if implements(item, "timed_callback")]
        self._groups = pass_groups(periodic)
        methods = [*chain(*self._table.values()), *(item.periodic_callback for item in self.periodic)]
        methods += [item.timed_callback for item in self._timed]
        self._drawing = {method for method in methods if may_draw(_own(method))}
        self._quiet = {method for method in methods if is_quiet(_own(method))} if self._has_peers else set()

    def fire(self, hook: str, step: int = 0, **arguments: Any) -> None:
        """Call a hook of all callbacks that implement it.

        Args:
            hook: Name of the hook.
            step: Number of the accumulation step.
            **arguments: Arguments of the hook.
        """
        methods = self._table[hook]
        if methods:
            with torch.no_grad(), self._generators_for(hook, methods):
                for method in methods:
                    self._call(method, arguments, step)

    def fire_between(self, hook: str, step: int = 0, **arguments: Any) -> None:
        """Call a hook between the first backward pass of an update and its step, when there are gradients.

        Args:
            hook: Name of the hook.
            step: Number of the accumulation step.
            **arguments: Arguments of the hook.

        Raises:
            KsuitError: A callback has changed these gradients, which would change the weights.
        """
        methods = self._table[hook]
        if not methods:
            return
        if hook == "before_every_optimizer_step":  # the word of this update was exchanged before
            self._note_said(methods)
        before = self._gradient_versions()
        with torch.no_grad(), self._generators_for(hook, methods):
            for method in methods:
                count = graphs_built()
                self._call(method, arguments, step)
                # Losses come with their graph. For any other backward pass the hook has to build one.
                is_suspect = hook == "before_every_backward" or graphs_built() != count
                if is_suspect and self._gradient_versions() != before:
                    name = method.__self__.name
                    raise KsuitError(
                        f"it leaves gradients behind in {hook}, which would change the weights; "
                        "compute them with torch.autograd.grad, or with a copy of the model",
                        path=f"callbacks.{name}",
                    )

    def fire_round(
        self, methods: Sequence[Method], skip: Sequence[str] = (), label: str = "", **arguments: Any
    ) -> None:
        """Call hooks that follow an update, so that a run which ends between two of them resumes with the next one.

        Args:
            methods: The hooks, in their order.
            skip: Those that were called before, as ``done`` named them.
            label: Suffix of their names in ``done``, where the same hooks are called several times.
            **arguments: Arguments of the hooks.
        """
        if not methods:
            return
        states, done = self.states, self.done
        self._note_said(methods)
        with torch.no_grad():
            for number, method in enumerate(methods):
                callback = _callback_of(method)
                name = f"{callback.display_name}.{method.__name__}{label}"
                if name not in skip:
                    if callback in self._groups:
                        self._prepare_pass(method, methods[number + 1 :], skip)
                    else:
                        states.snapshot(callback)
                    mark = callback.writer.mark()
                    try:
                        self._call(method, arguments, label)
                    except BaseException as error:
                        callback.writer.discard(mark)
                        if not isinstance(error, Interrupted):  # raised in an evaluation, which changes no state
                            states.note_failure(callback)
                        raise
                    states.drop_snapshot(callback, len(done), mark)
                done.append(name)

    def _note_said(self, methods: Sequence[Method]) -> None:
        """Take note that these hooks may log, stop training or request a checkpoint, on this rank or another one."""
        if self._has_peers and not self._quiet.issuperset(methods):
            self.may_have_said = True

    def go_back(self, number: int) -> int | None:
        """Go back to before the hook of this number in the round; see ``CallbackStates.go_back``."""
        del self.done[number:]
        return self.states.go_back(number)

    def _prepare_pass(self, method: Method, later: Sequence[Method], skip: Sequence[str] = ()) -> None:
        """Let an evaluation share its pass with those that follow, unless an earlier pass has read for it already."""
        callback = _callback_of(method)
        assert isinstance(callback, DatasetCallback)
        if callback.has_read:
            return  # its state was snapshotted before
        group, follows_epoch = self._groups[callback], callback.interval.follows_epoch(self._counter)
        for other_method in takewhile(lambda item: item.__name__ == method.__name__, later):
            other = _callback_of(other_method)
            if self._groups.get(other) == group and f"{other.display_name}.{method.__name__}" not in skip:
                assert isinstance(other, DatasetCallback)
                if other.interval.follows_epoch(self._counter) is follows_epoch:
                    callback.companions = [*callback.companions, other]
        for item in (callback, *callback.companions):
            self.states.snapshot(item)

    def methods(self, hook: str) -> list[Method]:
        """Return the hook's methods of all callbacks that implement it."""
        return self._table[hook]

    def fire_timed(self) -> None:
        """Call the callbacks whose time has come, by one reading of the clock for all of them."""
        if self._timed:
            now = monotonic()
            for item in self._timed:
                if now >= item.next_time:
                    self._call_by_the_clock(item)

    def fire_evaluations(self) -> None:
        """Run every evaluation of a dataset now."""
        with torch.no_grad():
            items = [item for item in self.callbacks.values() if isinstance(item, DatasetCallback)]
            methods = [item.periodic_callback for item in items]
            for number, method in enumerate(methods):
                if _callback_of(method) in self._groups:
                    self._prepare_pass(method, methods[number + 1 :])
                self._call(method, {"update_counter": self._counter}, "")

    def evaluations(self) -> list[Evaluation]:
        """Return the evaluations of datasets during training, in the order of the callbacks."""
        items = [item for item in self.periodic if isinstance(item, DatasetCallback)]
        return [
            Evaluation(
                *(item.interval, reader.dataset_key, reader.batch_size, reader.max_batches),
                group=self._groups.get(item) if reader is item else None,
                is_shared=is_shared(reader, item.trainer),
            )
            for item in items
            for reader in item.readers
        ]

    def close(self) -> None:
        """Close every callback, whatever fails."""
        with afterwards(*(item.close for item in self.callbacks.values())):
            pass

    def _call(self, method: Method, arguments: Mapping[str, Any], part: int | str) -> None:
        try:
            self._invoke(method, arguments, part)
        except StopTraining as stop:
            self._counter.stop(str(_callback_of(method).name))
            _LOGGER.info("training stops at update %d: %s", self._counter.update, stop)

    def _invoke(self, method: Method, arguments: Mapping[str, Any], part: int | str) -> None:
        if method in self._drawing:
            self._seed_for(method, part)
        method(**arguments)

    def _call_by_the_clock(self, item: CallbackBase) -> None:
        """Call ``timed_callback``, which must not change the run: other ranks, and a resume, call it at other updates.

        Raises:
            KsuitError: It logs something, stops training or requests a checkpoint.
        """
        before, stops = _said_by(item), False
        try:
            self._invoke(item.timed_callback, {"update_counter": self._counter}, "")
        except StopTraining:
            stops = True
        if stops or _said_by(item) != before:
            raise KsuitError(
                "_timed_callback logs, stops training or requests a checkpoint; what depends on the time only shows "
                "something",
                path=f"callbacks.{item.name}",
            )

    def _generators_for(self, hook: str, methods: Sequence[Method]) -> AbstractContextManager[None]:
        """Return a context that restores the generators of training, if the hooks and then training may draw."""
        must_restore = hook in BEFORE_DRAWS and not self._drawing.isdisjoint(methods)
        return undisturbed() if must_restore else nullcontext()

    def _seed_for(self, method: Method, part: int | str) -> None:
        hook = method.__name__
        # What is drawn for the whole run must be the same again after a resume.
        update = self._counter.update if hook != "before_training" else 0
        seed_all(mix(self._seed, "callback", str(_callback_of(method).name), hook, update, part))


def _own(method: Method) -> Any:
    """Return the callback's own version of a hook."""
    return getattr(_callback_of(method), f"_{method.__name__}")


def _callback_of(method: Method) -> CallbackBase:
    callback: CallbackBase = method.__self__  # type: ignore[attr-defined]
    return callback


def _said_by(callback: CallbackBase) -> Any:
    """Return what changes once a callback logs something or requests a checkpoint."""
    return callback.writer.mark(), callback.checkpoint_writer.requested
