"""Binds a tracker to the run of a folder, and delivers what the folder says about the run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from ksuit_runner.delivery.delivered import Delivery, RunState, read_state
from ksuit_runner.delivery.listed_models import unlisted
from ksuit_runner.delivery.outbox import Outbox, load_or_ask
from ksuit_runner.delivery.registration import index_registered, is_lost, register
from ksuit_runner.errors import LostRunError, TrackerError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.point import LoggedFile, Point
from ksuit_runner.tracker.base import EXIT_TAG, REFUSED, BaseTracker

_LOGGER = logging.getLogger(__name__)


class Binding:
    """A run of the output folder in a tracker's store: bound or registered there when the store can be reached.

    What is to be delivered is read from the run's outbox, which another process may be writing. Only what is delivered
    is written here.

    Args:
        store: The tracker that everything is delivered to.
        paths: Paths of the run.
        check_owner: Raises an error if the run is no longer this process's to record; called before everything that is
            written or recorded.

    Attributes:
        is_bound: Whether the store knows the run and has been reached since this object was made.
        on_files: Called when the store knows of files that were logged: they are to be uploaded.
    """

    def __init__(self, store: BaseTracker, paths: PathProvider, check_owner: Callable[[], None]) -> None:
        self.store = store
        self.check_owner = check_owner
        self.is_bound = False
        self.on_files: Callable[[], None] = lambda: None
        self._paths = paths
        self._is_running = False  # as the store knows it
        self._is_anew = False
        self._read: tuple[tuple[int, ...] | None, Outbox] | None = None
        self._delivery: Delivery | None = None
        self._lock = threading.Lock()

    @property
    def state(self) -> RunState:
        """What is to be delivered, as it is stored now, and what is delivered.

        Raises:
            TrackerError: The outbox is damaged, or there is none and the tracker, which is asked then, does not answer.
        """
        seen = _version_of(self._paths)
        if self._read is None or self._read[0] != seen:
            self._read = (seen, load_or_ask(self._paths, self.store))
        box = self._read[1]
        if self._delivery is None:
            self._delivery = Delivery.load(self._paths, box)
        return RunState(box, self._delivery)

    @property
    def has_news(self) -> bool:
        """Whether the outbox has changed since it was last read."""
        return self._read is None or self._read[0] != _version_of(self._paths)

    @property
    def is_behind(self) -> bool:
        """Whether something is not delivered yet, or cannot be read."""
        try:
            state = self.state
            if state.box.is_withdrawn:
                return state.box.status is None or state.has_end
            return not self.is_bound or not is_delivered(self._paths, state) or self.store.is_behind
        except (TrackerError, OSError):
            return True

    @property
    def artifacts_are_local(self) -> bool:
        """Whether the run's files need no upload; taken as true until the store is reached."""
        return not self.is_bound or self.state.box.is_withdrawn or self.store.artifacts_are_local

    def bind(self) -> None:
        """Bind the tracker to the run, and register it if it is not.

        Raises:
            TrackerError: The store cannot be reached, has lost the run, or has another one under its id.
        """
        with self._lock:
            if self.is_bound:
                return
            self.check_owner()
            state = self.state
            if state.tracker_id is None:
                tracker_id = register(self.store, self._paths, state.box, self._is_anew)
                self._note(tracker_id=tracker_id)
                index_registered(self._paths, state.box, tracker_id)
                _LOGGER.info("run %s is registered now: %s", state.box.run_id, self.store.where())
                self._is_running = True
            elif self.store.is_bound_to(state.tracker_id) and self.store.run.local_id == self._paths.run_id:
                self._is_running = self.store.run.status == "RUNNING"  # as it is if it was started by this tracker
            else:
                self._attach(state.tracker_id)
            self.is_bound = True

    def deliver(self) -> None:
        """Deliver what is stored, except for the end of the run; a run that is resumed is RUNNING again.

        Raises:
            TrackerError: The store cannot be reached; everything is delivered again another time.
        """
        if self.state.box.is_withdrawn:
            return
        self.bind()
        self.check_owner()
        self.store.deliver()
        state = self.state
        assert state.tracker_id is not None, "it was registered when it was bound"
        if state.box.status is None and not self._is_running:
            self._note(status=None, end_time=None)
            self.store.resume_run(state.tracker_id)
            self._is_running = True
        if state.has_messages:
            self.check_owner()
            state.box.deliver(self.store, self._known)
            self._note(version=state.box.version)

    def deliver_end(self) -> None:
        """Deliver how the run ended, if it has, and then its models: their metrics and files are there by now."""
        self.deliver_status()
        state = self.state
        if state.box.is_withdrawn:
            return
        if state.has_models:
            for number, model in enumerate(state.box.models[state.delivery.models :], state.delivery.models + 1):
                self.check_owner()
                self.store.register_model(model)
                self._note(models=number)
        for model in unlisted(self._paths, state):
            self.check_owner()
            self.store.register_model(model)
            self._note(listed={**self.state.delivery.listed, model.name: model.export or model.path})
        self.check_owner()
        self.store.deliver_end()

    def deliver_status(self) -> None:
        """Deliver only the status that the run ended with, if it has."""
        if self.state.box.is_withdrawn:
            return self._withdraw()
        self.bind()
        state = self.state
        if state.box.status is not None and state.has_end:
            self.check_owner()
            self.store.end_run(state.box.status, state.box.end_time)
            self._note(status=state.box.status, end_time=state.box.end_time)

    def mark_if_killed(self, tags: Mapping[str, str] | None = None, end_time: int | None = None) -> None:
        """Store that the run was killed, unless it has said how it ended; for whoever holds the lock of a dead run.

        Where a full disk does not take it, it is delivered nevertheless: that may be why the run was killed.

        Args:
            tags: Tags of a killed run that say more about its end.
            end_time: When it died, in ms since 1970, if that was seen; by default its last sign of life counts.

        Raises:
            TrackerError: The outbox is damaged, or there is none and the tracker, which is asked then, does not answer.
        """
        box = self.state.box
        if box.status is None:
            self.check_owner()
            box.kill(self._paths, end_time)
            if tags:
                box.add_tags(tags, box.run_id)
            box.store(self._paths)

    def log_points(self, points: Sequence[Point]) -> None:
        """Record metric points at once: the caller has them in the journal and waits for the answer."""
        if self.state.box.is_withdrawn:
            return
        self.bind()
        self.check_owner()
        self.store.log_points(points)

    def log_files(self, files: Sequence[LoggedFile]) -> None:
        """Record which files were logged: the caller has them in the journal."""
        if self.state.box.is_withdrawn:
            return
        self.bind()
        self.check_owner()
        self.store.log_files(files)
        self.on_files()

    def forget_lost(self) -> bool:
        """Have the run registered again if the store has lost it; return whether it was lost, or never registered.

        All of its metrics and files are sent then, with its id in the output folder as a tag. The run that it is
        grouped under is registered with it if that is lost, too.

        Raises:
            TrackerError: The store cannot be reached.
        """
        self._is_anew = True
        tracker_id = self.state.tracker_id
        if tracker_id is None:
            return True
        if not is_lost(self.store, tracker_id):
            return False
        self.check_owner()
        for path in (self._paths.journal_sent, self._paths.uploaded):
            path.unlink(missing_ok=True)
        self._delivery = Delivery()
        self._note()
        return True

    def _withdraw(self) -> None:
        """Have a run that never began deleted, once it has ended; nothing else of it is delivered any more."""
        state = self.state
        if state.box.status is None or not state.has_end:
            return
        with suppress(LostRunError):  # it was deleted, and that could not be noted
            self.bind()
            tracker_id = self.state.tracker_id
            assert tracker_id is not None, "it was registered when it was bound"
            self.store.attach_run(tracker_id)
            self.check_owner()
            self.store.set_tags({EXIT_TAG: REFUSED})
            self.store.end_run(state.box.status, state.box.end_time)
            self.store.delete_run()
        self._note(status=state.box.status, end_time=state.box.end_time, version=state.box.version)

    def _attach(self, tracker_id: str) -> None:
        run_id, folder = self._paths.run_id, self._paths.run_dir
        try:
            info = self.store.attach_run(tracker_id)
        except LostRunError as error:
            raise LostRunError(f"{error}. To record it again from {folder}: register_anew=true") from None
        if info.local_id != run_id:
            raise TrackerError(f"the folder of run {run_id} names another run in the store: {tracker_id}")

    def _known(self, run_id: str) -> str | None:
        state = read_state(PathProvider(self._paths.output_dir, run_id))
        return run_id if state is None else state.tracker_id

    def _note(self, **changes: Any) -> None:
        """Store what is delivered by now; only then it counts, and in memory even if the disk is full."""
        assert self._delivery is not None, "nothing was read"
        self.check_owner()
        delivery = msgspec.structs.replace(self._delivery, **changes)
        delivery.store(self._paths)
        self._delivery = delivery


def is_delivered(paths: PathProvider, state: RunState) -> bool:
    """Whether the tracker has all that is to be delivered of a run besides its metrics and files.

    Args:
        paths: Paths of the run.
        state: What is to be delivered of it, and what is.
    """
    return not (state.has_messages or state.has_end or state.has_models or unlisted(paths, state))


def _version_of(paths: PathProvider) -> tuple[int, ...] | None:
    """Return what changes whenever the outbox is replaced; None if there is none."""
    try:
        found = paths.outbox.lstat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
