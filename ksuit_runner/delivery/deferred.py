"""A tracker that stores first and delivers later: recording never waits for a server, and nothing is lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from ksuit_runner.delivery.local_ids import LocalIdTracker
from ksuit_runner.delivery.outbox import Outbox, index_registered, load_or_ask
from ksuit_runner.errors import LostRunError, TrackerError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.record.point import Point
from ksuit_runner.security.masking import mask_text, mask_value
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.base import RUN_ID_TAG, START_TAG, BaseTracker, DatasetInfo, EndStatus, RunInfo

_LOGGER = logging.getLogger(__name__)
_LONGEST_PARAM = 10_000  # characters, more than a store keeps


class DeferredTracker(LocalIdTracker):
    """Stores what is to be recorded of a run in the run's folder, and delivers it to another tracker in the background.

    A run starts with one request to the store, to get the store's id. If there is no answer and the tracker does not
    require one, the run starts under an id of its own and is registered later. After that everything is written to the
    run's folder only, without passwords; ``deliver`` passes it on, from a thread of its own. Files are where the
    embedded store has them, in ``PathProvider.artifacts_dir``.

    Ids are those of the output folder.

    Args:
        tracker: The tracker that everything is delivered to.
        outputs: The output folder.
        lock_run: Returns the lock of a run, held by this process, by the run's id; called before anything is written of
            that run. Without one, the run counts as this process's own.

    Attributes:
        status_before: How a resumed run had ended; None for a new one, and for one that was killed.
        run_lock: What ``lock_run`` returned.
    """

    def __init__(
        self, tracker: BaseTracker, outputs: OutputPaths, lock_run: Callable[[str], RunLock] | None = None
    ) -> None:
        super().__init__(tracker, outputs)
        self.require, self.close_timeout_s = tracker.require, tracker.close_timeout_s
        self.status_before: EndStatus | None = None
        self._lock_run = lock_run
        self.run_lock: RunLock | None = None
        self._box: Outbox | None = None
        self._is_resumed = True
        self._is_bound = False
        self._is_closed = False
        self._is_held = False
        self._lock = threading.Lock()

    @property
    def is_bound(self) -> bool:
        """Whether the store knows the run and has been reached since this object was made."""
        return self._is_bound

    @property
    def is_behind(self) -> bool:
        """Whether something is not delivered yet."""
        return not self._is_bound or self._outbox.has_messages or self._outbox.has_end or self._tracker.is_behind

    @property
    def has_end(self) -> bool:
        """Whether the run has ended and its status is not delivered yet."""
        return self._outbox.has_end

    @property
    def status(self) -> EndStatus | None:
        """How the run ended; None while it runs."""
        return self._outbox.status

    @property
    def artifacts_are_local(self) -> bool:
        """Whether the run's files need no upload; taken as true until the store is reached."""
        return not self._is_bound or self._tracker.artifacts_are_local

    def start_run(
        self,
        name: str | None,
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        start_time: int | None = None,
    ) -> RunInfo:
        """Start a new run, under the store's id or, if that need not be reached, under an id of its own."""
        own_id, now = uuid4().hex, start_time or _now()
        tags = {**{key: mask_text(value) for key, value in tags.items()}, START_TAG: own_id}
        try:
            parent = self._registered(parent_run_id) if parent_run_id else None
            info = self._tracker.start_run(name, tags, parent)
        except TrackerError:
            if self.require:
                raise
            box = Outbox(own_id, name or own_id[:8], None, now, parent_run_id, {**tags, RUN_ID_TAG: own_id})
        else:
            paths = self._paths(info.run_id)
            if any(path.exists() for path in (paths.outbox, paths.journal, paths.artifacts_dir)):
                raise TrackerError(f"the tracker has given a new run the id of one in the output folder: {info.run_id}")
            box = Outbox(info.run_id, info.name, info.run_id, info.start_time, parent_run_id, tags)
            self._is_bound = True
        self._own(box.run_id)
        return self._take(box)

    def resume_run(self, run_id: str) -> RunInfo:
        """Resume a run of the output folder; register it if it is not registered and the store can be reached."""
        self._own(run_id)
        box = load_or_ask(self._paths(run_id), self._tracker)
        self.status_before = box.status
        box.status, box.is_end_delivered = None, False
        self._box = box
        self.reach()
        return self._take(box)

    def reach(self) -> None:
        """Connect to the store now and not at the first delivery; a failure counts only if the tracker requires it."""
        try:
            self._bind()
        except TrackerError:
            if self.require:
                raise

    def attach_run(self, run_id: str) -> RunInfo:
        """Attach to a run of the output folder that has ended, to deliver the rest; one without a status is KILLED."""
        self._own(run_id)
        box = load_or_ask(self._paths(run_id), self._tracker)
        box.status = box.status or EndStatus.KILLED
        self._is_resumed = False
        return self._take(box)

    def end_run(self, status: EndStatus, end_time: int | None = None) -> None:
        """Store how the run ended; ``deliver_end`` delivers it."""
        with self._lock:
            self._outbox.status, self._outbox.end_time = status, end_time or _now()
            self._outbox.is_end_delivered = False
            self._store()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Store parameters."""
        with self._lock:
            self._outbox.add_params(
                {key: str(mask_value(key, value))[:_LONGEST_PARAM] for key, value in params.items()}
            )
            self._store()

    def set_tags(self, tags: Mapping[str, str], run_id: str | None = None) -> None:
        """Store tags, of this run or of another one of the output folder."""
        with self._lock:
            box = self._outbox
            box.add_tags({key: mask_text(str(value)) for key, value in tags.items()}, run_id or box.run_id)
            self._store()

    def log_inputs(self, datasets: Sequence[DatasetInfo]) -> None:
        """Store which datasets the run uses."""
        with self._lock:
            self._outbox.add_inputs(datasets)
            self._store()

    def log_points(self, points: Sequence[Point]) -> None:
        """Record metric points at once: the caller has them in the journal and waits for the answer."""
        self.check_owner()
        self._bind()
        self._tracker.log_points(points)

    def deliver(self) -> None:
        """Register the run if it is not, and deliver what is stored, except for its end."""
        self.check_owner()
        self._bind()
        self._tracker.deliver()
        box = self._outbox
        if not box.has_messages:
            return
        with self._lock:
            messages = box.messages()
        messages.deliver(self._tracker, self._known)
        with self._lock:
            box.delivered_version = messages.version
            self._store()

    def deliver_end(self) -> None:
        """Deliver how the run ended."""
        box = self._outbox
        if box.has_end and box.status is not None:
            self.check_owner()
            self._bind()
            self._tracker.end_run(box.status, box.end_time)
            with self._lock:
                box.is_end_delivered = True
                self._store()
        if self._is_bound:
            self._tracker.deliver_end()

    def check_owner(self) -> None:
        """Make sure that the run is this process's to record; asked before everything that is recorded.

        Raises:
            TakenOverError: It is another process's.
        """
        if self.run_lock is not None:
            self.run_lock.check()

    def close(self) -> None:
        """Write nothing to the run's folder from now on: it may belong to another process."""
        with self._lock:
            self._is_closed = True

    def where(self) -> str:
        """Say in one line where the run is recorded and how to look at it."""
        return self._tracker.where() + ("" if self._is_bound else " (does not answer; everything is sent when it does)")

    @property
    def is_described(self) -> bool:
        """Whether the parameters of the run are stored, and with them its datasets."""
        return bool(self._outbox.params)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write what is recorded in the block to the run's folder once, at its end."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            with self._lock:
                self._store()

    @property
    def _outbox(self) -> Outbox:
        assert self._box is not None, "no run was started"
        return self._box

    def _own(self, run_id: str) -> None:
        if self._lock_run is not None:
            self.run_lock = self._lock_run(run_id)

    def _take(self, box: Outbox) -> RunInfo:
        self._box = box
        self._store()
        tags = {**box.start_tags, **box.tags}
        self._run = RunInfo(box.run_id, box.name, "RUNNING", tags, box.parent_run_id, box.start_time or 0)
        return self._run

    def _bind(self) -> None:
        if self._is_bound:
            return
        box = self._outbox
        if box.tracker_id is None:
            self._register(box)
            _LOGGER.info("run %s is registered now: %s", box.run_id, self._tracker.where())
        else:
            self._bind_known(box, box.tracker_id)
        self._is_bound = True

    def _bind_known(self, box: Outbox, tracker_id: str) -> None:
        try:
            info = self._tracker.attach_run(tracker_id)
        except LostRunError as error:
            here = self._paths(box.run_id).run_dir
            raise LostRunError(f"{error}. To record it again from {here}: register_anew=true") from None
        if info.local_id != box.run_id:
            raise TrackerError(f"tracker.json of run {box.run_id} names another run in the store: {tracker_id}")
        if self._is_resumed:
            self._tracker.resume_run(tracker_id)

    def forget_lost(self, run_id: str) -> bool:
        """Have a run of the output folder registered again when it is resumed, if the store has lost it.

        All of its metrics and files are sent then, with its id in the output folder as a tag. Returns whether it was
        lost, or never registered.

        Raises:
            TrackerError: The store cannot be reached.
        """
        paths = self._paths(run_id)
        box = load_or_ask(paths, self._tracker)
        if box.parent_run_id and self._paths(box.parent_run_id).outbox.exists():
            self.forget_lost(box.parent_run_id)
        if box.tracker_id is None:
            return True
        try:
            self._tracker.attach_run(box.tracker_id)
        except LostRunError:
            for path in (paths.journal_sent, paths.uploaded):
                path.unlink(missing_ok=True)
            box.forget_registration()
            box.store(paths)
            return True
        return False

    def _registered(self, run_id: str) -> str:
        """Return the store's id of a run, which is registered if it is not; the tracker is then bound to that run."""
        box = Outbox.load(self._paths(run_id))
        return run_id if box is None else box.tracker_id or self._register(box)

    def _register(self, box: Outbox) -> str:
        parent = self._registered(box.parent_run_id) if box.parent_run_id else None
        info = self._tracker.start_run(box.name, box.start_tags, parent, box.start_time or _now())
        if not self._is_closed:
            index_registered(self._outputs, box, info.run_id)
        with self._lock:
            box.tracker_id = info.run_id
            self._store(box)
        return info.run_id

    def _store(self, box: Outbox | None = None) -> None:
        box = box or self._outbox
        if not (self._is_closed or self._is_held):
            self.check_owner()
            box.store(self._paths(box.run_id))


def _now() -> int:
    return time.time_ns() // 1_000_000
