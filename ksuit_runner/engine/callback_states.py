"""The states of a run's callbacks by name, as a checkpoint stores them, also after one of them has failed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.checkpoint.exchange import digest, gather_state
from ksuit_runner.checkpoint.format import Checkpoint
from ksuit_runner.checkpoint.state_types import callback_location, copy_state
from ksuit_runner.distributed.pieces import place_all
from ksuit_runner.distributed.world import World
from ksuit_runner.engine.extra_state import EXTRA
from ksuit_runner.errors import ResumeError, named_type
from ksuit_runner.models.base import ModelBase

_LOGGER = logging.getLogger(__name__)
ROLLED_BACK = (
    "before_every_update",
    "before_every_accumulation_step",
    "before_every_backward",
    "track_after_accumulation_step",
    "before_every_optimizer_step",
)
"""Hooks that fire before an update has changed the weights: what they do is rolled back if it fails."""


class CallbackStates:
    """Collects and restores the states of callbacks.

    An update that fails must not leave half of itself in a checkpoint. So a snapshot is taken of what its hooks may
    change: before an update, of the states of all callbacks with hooks before the optimizer's step; and before each
    later hook, of the state of its callback. Until a snapshot is dropped, a checkpoint stores it instead of the present
    state.

    When one of several ranks fails, the others may be at other hooks of the update. So a rank keeps the snapshots of
    hooks that have ended well, to go back to where the others are.

    Args:
        callbacks: Callbacks by name.
        keeps: Whether the snapshots are kept.

    Attributes:
        earliest: Number of the first hook of the present round to whose beginning the states can go back.
        can_roll_back: Whether an update that fails before the step can be rolled back. Not if a callback with hooks
            there has state in files, which is too large for a snapshot at every update.
        begun: Names of the callbacks whose ``before_training`` was called in this run, before a resume or since: what
            they log there belongs to the run's beginning, and not to a resume.
        are_whole: Whether all states can be stored. Not after a callback with state in files has failed in a hook.
    """

    def __init__(self, callbacks: Mapping[str, CallbackBase], keeps: bool = False) -> None:
        self._callbacks = callbacks
        self._keeps = keeps
        self._kept: list[tuple[int, int, str, Any]] = []
        self.earliest = 0
        # One with state in files cannot be rolled back, whatever the snapshot has of the rest.
        in_files = {item for item in callbacks.values() if overrides(item, "resume_from_checkpoint")}
        with_state = {name: item for name, item in callbacks.items() if overrides(item, "state_dict")}
        self._with_state = with_state
        self._stateful = set(with_state.values()) - in_files
        early = [item for item in callbacks.values() if any(implements(item, hook) for hook in ROLLED_BACK)]
        self._early = [item for item in early if item in self._stateful]
        self._snapshots: dict[str, Any] = {}
        self.can_roll_back = not any(overrides(item, "resume_from_checkpoint") for item in early)
        self.begun: set[str] = set()
        self.are_whole = True

    def snapshot_early(self) -> None:
        """Snapshot what hooks before the optimizer's step may change."""
        for item in self._early:
            self.snapshot(item)

    def snapshot(self, callback: CallbackBase) -> None:
        """Snapshot the state of one callback, whose hook is about to run."""
        if callback in self._stateful:
            name, state = callback.display_name, callback.state_dict()
            copied = state if callback.replaces_state else copy_state(callback_location(name), state)
            self._snapshots[name] = copied

    def drop_snapshots(self) -> None:
        """Drop all snapshots, because the hooks have ended well: the present states count again."""
        if self._snapshots:
            self._snapshots.clear()
        if self._keeps:
            self._kept.clear()
            self.earliest = 0

    def drop_snapshot(self, callback: CallbackBase, number: int = 0, mark: int = 0) -> None:
        """Drop the snapshot of one callback, whose hook has ended well: its present state counts again.

        Args:
            callback: The callback.
            number: Number of its hook in the present round.
            mark: Mark of the log before it.
        """
        if self._keeps:
            name = callback.display_name
            self._kept.append((number, mark, name, self._snapshots.get(name)))
            if overrides(callback, "resume_from_checkpoint"):
                self.earliest = number + 1
        if self._snapshots:
            self._snapshots.pop(callback.display_name, None)

    def go_back(self, number: int) -> int | None:
        """Go back to the states that the callbacks had before the hook of this number in the round.

        Returns:
            The mark of the log before that hook; None if no hook was called since.
        """
        assert number >= self.earliest
        mark = None
        for at, before, name, state in reversed(self._kept):
            if at >= number:
                mark = before
                if state is not None:
                    self._snapshots[name] = state
        return mark

    def note_failure(self, callback: CallbackBase) -> None:
        """Note that a hook of a callback has failed: its snapshot counts, which state in files does not have."""
        self.are_whole = not overrides(callback, "resume_from_checkpoint")

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all callbacks whose class has one, by name; None of those that have none at present."""
        saved = self._snapshots
        return {name: saved[name] if name in saved else item.state_dict() for name, item in self._with_state.items()}

    @property
    def names(self) -> frozenset[str]:
        """Names of the callbacks whose class has a state."""
        return frozenset(self._with_state)

    def divide(self, states: Mapping[str, Any], world: World) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the states that all ranks have alike, and those in which they differ, by name; all ranks call it.

        Args:
            states: What ``state_dict`` returned on this rank.
            world: The ranks of the run.

        Raises:
            CheckpointError: A state cannot be stored.
            PeerError: A rank has failed, is lost, or does not answer in time.
        """
        if world.size == 1 or not states:
            return dict(states), {}
        digests = world.gather({name: digest(callback_location(name), state) for name, state in states.items()})
        local = {name: state for name, state in states.items() if len({each[name] for each in digests}) > 1}
        merged = {name: local.pop(name) for name in list(local) if self._with_state[name].merges_states}
        if merged:
            gathered = gather_state(world, "callbacks: state_dict()", merged)
            merged = {
                name: self._with_state[name].merge_state_dicts([each[name] for each in gathered]) for name in merged
            }
        return {name: merged.get(name, state) for name, state in states.items() if name not in local}, local

    def resume(
        self,
        checkpoint: Checkpoint,
        model: ModelBase,
        may_lack: bool = False,
        may_have_more: bool = False,
        world: World | None = None,
    ) -> None:
        """Restore the state of every callback, from the checkpoint and its files.

        Args:
            checkpoint: What the run resumes from.
            model: Model with its weights loaded.
            may_lack: Whether a stateful callback may be new, without a state in the checkpoint.
            may_have_more: Whether the checkpoint may have states of callbacks that are not there.
            world: The ranks of the run; by default there is one.

        Raises:
            ResumeError: The names do not match, or a state does not fit, or needs as many ranks as have stored it.
        """
        local = self._local(checkpoint.local, may_lack, world or World())
        stored = place_all({**checkpoint.state["callbacks"], **local})
        self.begun = set(checkpoint.state.get("begun", self._callbacks if checkpoint.progress.update else ()))
        missing, unexpected = sorted(self.names - stored.keys()), sorted(stored.keys() - self.names)
        if (missing and not may_lack) or (unexpected and not may_have_more):
            differing = [*(f"{name} is new" for name in missing), *(f"{name} is missing" for name in unexpected)]
            raise ResumeError(
                f"they are not those whose states the checkpoint has: {', '.join(differing)}.\n"
                "Give the run the same callbacks, or allow the difference with resume_strict=false",
                path="callbacks",
            )
        if (missing or unexpected) and may_lack and (world is None or world.records):
            what = [f"{name} starts anew" for name in missing]
            what += [f"the state of {name} is left out" for name in unexpected]
            _LOGGER.warning("resume_strict=false: %s", ", ".join(what))
        for name, item in self._callbacks.items():
            if stored.get(name) is not None:
                _checked(item, item.load_state_dict, stored[name])
            if name not in missing:
                item.resume_from_checkpoint(checkpoint.paths, model)

    def _local(self, stored: Sequence[Mapping[str, Any]], may_lack: bool, world: World) -> dict[str, Any]:
        """Return the states that differed between the ranks, for this rank."""
        if len(stored) == world.size:
            return {name: state for name, state in stored[world.rank].items() if name != EXTRA}
        found: dict[str, Any] = {}
        for name in [name for name in stored[0] if name != EXTRA] if stored else ():
            states, item = [each[name] for each in stored], self._with_state.get(name)
            if item is None:  # whether that may be is checked for all of them
                found[name] = None
            elif overrides(item, "merge_state_dicts"):
                found[name] = _checked(item, item.merge_state_dicts, states)
            elif not may_lack:
                raise ResumeError(
                    f"its state differs between the {len(stored)} ranks that have stored it, and a "
                    f"{type(item).__name__} has no merge_state_dicts to make one of them. Resume with "
                    f"ranks={len(stored)}, or let it start anew with resume_strict=false",
                    path=f"callbacks.{name}",
                )
        return found


def _checked(callback: CallbackBase, method: Callable[[Any], Any], stored: Any) -> Any:
    """Call a callback's method with what a checkpoint has of it."""
    try:
        return method(stored)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ResumeError(
            f"the checkpoint has another state than {named_type(callback)} can load. {reason}",
            path=f"callbacks.{callback.display_name}",
        ) from error


def implements(callback: CallbackBase, hook: str) -> bool:
    """Whether a callback has a hook of its own."""
    return overrides(callback, f"_{hook}")


def overrides(callback: CallbackBase, method: str) -> bool:
    """Whether a callback's class has its own version of a method of the base class."""
    return getattr(type(callback), method) is not getattr(CallbackBase, method)
