"""Registers runs in a tracker's store that started while it could not be reached, or that it has lost."""

from __future__ import annotations

from ksuit_runner.delivery.delivered import read_state
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.errors import LostRunError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.point import now
from ksuit_runner.record.stored_run import add_to_index
from ksuit_runner.tracker.base import KIND_TAG, BaseTracker


def register(store: BaseTracker, outputs: OutputPaths, box: Outbox, is_anew: bool = False) -> str:
    """Register a run, after the one that it is grouped under; a second time it is only found.

    Args:
        store: The tracker; it is bound to the run afterwards.
        outputs: The output folder.
        box: Outbox of the run.
        is_anew: Whether the run that it is grouped under is registered again if the store has lost it.

    Returns:
        The run's id in the store.
    """
    parent = registered(store, outputs, box.parent_run_id, is_anew) if box.parent_run_id else None
    start_time = box.start_time or now()
    return store.start_run(box.name, box.registration_tags(), parent, start_time).run_id


def registered(store: BaseTracker, outputs: OutputPaths, run_id: str, is_anew: bool = False) -> str:
    """Return the store's id of a run of the output folder, which is registered if it is not.

    That is not stored: the run is recorded by another process, which will find it in the store.
    """
    state = read_state(PathProvider(outputs.output_dir, run_id))
    if state is None:
        return run_id
    if state.tracker_id is None or (is_anew and is_lost(store, state.tracker_id)):
        return register(store, outputs, state.box, is_anew)
    return state.tracker_id


def is_lost(store: BaseTracker, tracker_id: str) -> bool:
    """Whether the store has lost a run; the tracker is bound to one that it has."""
    try:
        store.attach_run(tracker_id)
    except LostRunError:
        return True
    return False


def index_registered(paths: OutputPaths, box: Outbox, tracker_id: str) -> None:
    """Add a run to the index again, with the id that a tracker has given it later."""
    kind = box.start_tags.get(KIND_TAG, Mode.TRAIN)
    if kind != "sweep":  # not a run that could be resumed
        add_to_index(paths, box.run_id, box.name, kind, (box.start_time or 0) / 1000, tracker_id)
