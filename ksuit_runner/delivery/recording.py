"""Records a run: follows its folder, and delivers to the tracker what is in it."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ksuit_runner.checkpoint.commit import Committer, HandOver, InPlace, OnCheckpoint
from ksuit_runner.delivery.artifact_mirror import Mirror
from ksuit_runner.delivery.artifact_uploader import Uploader
from ksuit_runner.delivery.binding import Binding
from ksuit_runner.delivery.metric_sender import MetricSender, Shipment
from ksuit_runner.errors import KsuitError, TakenOverError, TrackerError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import JournalReader
from ksuit_runner.system.background import Background
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.base import BaseTracker

_LOGGER = logging.getLogger(__name__)
_AWAY_TIMEOUT_S = 2.5  # how long the end of a run waits for a tracker that was unreachable before
_STATUS_S = 2.0  # part of the time for the end that is reserved for the status
COMMIT_PAUSE_S = 0.5
"""How long the committer rests after a checkpoint, unless one is waited for, in seconds.

Checkpoints may come every few milliseconds, and only the last ones stay: a commit takes a processor and the disk longer
than training takes to write one. So a power cut loses at most that much more; anything less loses nothing.
"""


@dataclass(frozen=True)
class Unsent:
    """What the tracker lacks of a run.

    Attributes:
        points: Number of metric points.
        files: Number of files and checkpoints.
        messages: Whether parameters, tags, inputs or the status are missing.
    """

    points: int = 0
    files: int = 0
    messages: bool = False

    def __bool__(self) -> bool:
        """Whether anything is missing."""
        return bool(self.points or self.files or self.messages)


class RunFollower(Protocol):
    """What the process that trains asks of whoever records its run, there or in another process."""

    def forget_lost(self) -> bool:
        """Have the run registered again if the store has lost it; return whether it was lost, or never registered.

        Raises:
            TrackerError: The store cannot be reached.
        """

    def reach(self) -> None:
        """Connect to the store now and not at the first delivery.

        Raises:
            TrackerError: That has failed, and the tracker requires it.
        """

    @property
    def checkpoints(self) -> HandOver:
        """Takes the checkpoints of the run."""

    def start(self) -> None:
        """Begin to follow the folder: called when its journal is open, and before anything is added to it."""

    def notify(self) -> None:
        """Look at the folder now: there are new files or checkpoints, or something else than points to be delivered."""

    def finish(self, timeout_s: float) -> Unsent:
        """Deliver the rest and how the run ended, within a bounded time, and return what is left."""

    def close(self) -> None:
        """Write and record nothing from now on; what is in progress is waited for only for a bounded time."""


RunFollowerFactory = Callable[[BaseTracker, PathProvider, RunLock], RunFollower]
"""Makes the follower of a run from its tracker, its paths and its lock, which this process holds."""


class Recording:
    """Delivers a run to its tracker from what is in the run's folder, in threads or, for one that has ended, at once.

    It reads what the process that trains writes (``Outbox``, the journal, artifacts), and writes how much of it is
    delivered: nobody else writes those files, and it writes no others.

    Args:
        tracker: The tracker that everything is delivered to.
        paths: Paths of the run.
        check_owner: Raises TakenOverError if the run is no longer this process's to record; called before everything
            that is written or recorded.
        on_checkpoint: Called for every checkpoint that was handed over in the folder, by name, with None once it is
            committed, or with the error. By default only what ``checkpoints`` is given is committed.
        interval_s: How often to look at the folder, in seconds.

    Attributes:
        committer: Commits the run's checkpoints.
        checkpoints: Takes the run's checkpoints in this process, and commits them at once.
    """

    def __init__(
        self,
        tracker: BaseTracker,
        paths: PathProvider,
        check_owner: Callable[[], None] = lambda: None,
        on_checkpoint: OnCheckpoint | None = None,
        interval_s: float = 1.0,
    ) -> None:
        self._tracker = tracker
        self._paths = paths
        self._check_owner = check_owner
        self._on_checkpoint = on_checkpoint
        self._interval_s = interval_s
        self._is_closed = False
        self._is_unreachable = False  # when it was reached for
        self._binding = Binding(tracker, paths, self._check)
        self._threads: _Threads | None = None
        self.committer = Committer(paths, self._check, JournalReader(paths.journal).sync, self._request_upload)
        self.checkpoints = InPlace(self.committer)

    @classmethod
    def of_owner(cls, tracker: BaseTracker, paths: PathProvider, lock: RunLock) -> "Recording":
        """Make the recording of a run whose lock this process holds."""
        return cls(tracker, paths, lock.check)

    def forget_lost(self) -> bool:
        """Have the run registered again if the store has lost it; return whether it was lost, or never registered.

        Raises:
            TrackerError: The store cannot be reached.
        """
        return self._binding.forget_lost()

    def reach(self) -> None:
        """Connect to the store now and not at the first delivery; a failure counts only if the tracker requires it."""
        try:
            self._binding.bind()
        except TrackerError:
            self._is_unreachable = True
            if self._tracker.require:
                raise

    def start(self) -> None:
        """Begin to follow the folder in threads."""
        assert self._threads is None, "it follows the folder already"
        commit = None if self._on_checkpoint is None else self._commit_waiting
        self._threads = _Threads(self._binding, self._paths, commit, self._interval_s)

    def mark_if_killed(self, tags: Mapping[str, str] | None = None, end_time: int | None = None) -> None:
        """Store that the run was killed, unless it has said how it ended; see ``Binding``."""
        self._binding.mark_if_killed(tags, end_time)

    def notify(self) -> None:
        """Look at the folder now instead of at the next interval."""
        self._following.notify()

    def hurry(self) -> None:
        """Commit without a pause the checkpoints that were handed over, as one is waited for; then send the points."""
        self._following.hurry()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all points that are in the journal now are sent; return whether they are."""
        return self._following.sender.flush(timeout_s)

    def finish(self, timeout_s: float) -> Unsent:
        """Deliver the rest and how the run ended, within a bounded time, and return what is left.

        For a tracker that was unreachable before, that is a short time. The status is delivered even if files are not.
        """
        following = self._following
        is_away = following.is_failing or (self._is_unreachable and not self._binding.is_bound)
        following.finish(min(_AWAY_TIMEOUT_S, timeout_s) if is_away else timeout_s)
        return Unsent(following.sender.pending(), following.uploader.missing(), self._binding.is_behind)

    def close(self) -> None:
        """Write and record nothing from now on, without waiting for a request in progress."""
        self._is_closed = True
        if self._threads is not None:
            self._threads.close()

    def join(self) -> None:
        """Wait until nothing is in progress, after ``close``."""
        if self._threads is not None:
            self._threads.join()

    def deliver_all(self) -> str:
        """Deliver all of a run that has ended, in this thread, and return a line that says what that was.

        Raises:
            TrackerError: The store cannot be reached; what was sent until then stays.
        """
        self.committer.recover()
        was_behind = self._binding.state.has_end
        self._binding.deliver()
        points = Shipment(
            JournalReader(self._paths.journal), self._paths.journal_sent, self._binding, self._check
        ).send()
        files = 0
        if not self._binding.artifacts_are_local:
            mirror = Mirror(self._tracker, self._paths, lambda: True, self._check)
            files = mirror.update() + mirror.upload_log()
        self._binding.deliver_end()
        box = self._binding.state.box
        if box.is_withdrawn:
            return f"run {box.name} ({box.run_id}) never began, and is withdrawn from the tracker"
        status = f", status {box.status}" if was_behind else ""
        what = f"{points} metric points, {files} files and checkpoints{status}"
        return f"run {box.name} ({box.run_id}): sent {what}\nEverything is recorded: {self._tracker.where()}"

    def deliver_status(self) -> None:
        """Deliver only the status that the run ended with, in this thread.

        Raises:
            TrackerError: The store cannot be reached.
        """
        self._binding.deliver_status()
        self._check()
        self._tracker.deliver_end()

    def _commit_waiting(self) -> bool:
        """Commit the checkpoints that were handed over; return whether there were any."""
        return bool(self.committer.commit_waiting(self._tell))

    def _tell(self, name: str, error: Exception | None) -> None:
        assert self._on_checkpoint is not None
        self._on_checkpoint(name, error)
        if self._threads is not None:
            self._threads.send_if_hurried()

    def _request_upload(self) -> None:
        if self._threads is not None:
            self._threads.uploader.request()

    @property
    def _following(self) -> "_Threads":
        assert self._threads is not None, "it does not follow the folder yet"
        return self._threads

    def _check(self) -> None:
        if self._is_closed:
            raise TakenOverError(f"run {self._paths.run_id} is no longer recorded here")
        self._check_owner()


class _Threads:
    """The threads that follow a folder: one sends, one uploads, and one commits, so that none waits for another."""

    def __init__(
        self, binding: Binding, paths: PathProvider, commit: Callable[[], bool] | None, interval_s: float
    ) -> None:
        self._binding = binding
        self.uploader = Uploader(binding, paths, self._are_metrics_sent, interval_s)
        binding.on_files = self.uploader.request
        journal = JournalReader(paths.journal)
        self.sender = MetricSender(journal, paths.journal_sent, binding, self.uploader.notify, interval_s)
        self._is_hurried = False
        self._committer = None if commit is None else _Committer(commit, interval_s)

    @property
    def is_failing(self) -> bool:
        return self.sender.is_failing or self.uploader.is_failing

    def notify(self) -> None:
        if self._committer is not None:
            self._committer.notify()
        self.uploader.request()
        if self._binding.has_news:  # points can wait: checkpoints may come every few milliseconds
            self.sender.notify()

    def hurry(self) -> None:
        if self._committer is not None:
            self._is_hurried = True
            self._committer.hurry()

    def send_if_hurried(self) -> None:
        """Send the points once a checkpoint that is waited for is told: the end of a run waits for them next.

        Not before: two threads of Python hold each other up.
        """
        if self._is_hurried:
            self._is_hurried = False
            self.sender.notify()

    def finish(self, timeout_s: float) -> None:
        if self._committer is not None:
            self._committer.finish(timeout_s)
        deadline = time.monotonic() + timeout_s
        if self.sender.flush(timeout_s):
            self.uploader.finish(deadline - _STATUS_S - time.monotonic())
            self.sender.finish(deadline - time.monotonic())

    def close(self) -> None:
        self.sender.close()
        self.uploader.close()
        if self._committer is not None:
            self._committer.close()

    def join(self) -> None:
        for thread in (self.sender, self.uploader, self._committer):
            if thread is not None:
                thread.join()

    def _are_metrics_sent(self) -> bool:
        return self.sender.flush(self._binding.store.close_timeout_s)


class _Committer(Background):
    """Thread that commits the checkpoints that are handed over in the folder, with pauses between them."""

    def __init__(self, commit: Callable[[], bool], interval_s: float) -> None:
        super().__init__("checkpoint-commit", interval_s)
        self._commit = commit
        self._begun = self._done = 0
        self._rests_until = 0.0
        self._is_hurried = threading.Event()
        self._thread.start()

    def hurry(self) -> None:
        """Commit what is handed over by now, without a pause."""
        self._is_hurried.set()
        self.notify()

    def finish(self, timeout_s: float) -> bool:
        """Commit what is handed over by now, within the given time; return whether that is done."""
        with self._changed:
            due = self._begun + 1
        self._is_hurried.set()
        return self._wait_for(lambda: self._done >= due, timeout_s)

    def close(self) -> None:
        """End the thread, without waiting for a commit in progress."""
        self._is_hurried.set()
        self._stop()

    def _work(self) -> None:
        self._is_hurried.wait(self._rests_until - time.monotonic())
        self._is_hurried.clear()
        with self._changed:
            self._begun += 1
            begun = self._begun
        if self._commit():
            self._rests_until = time.monotonic() + COMMIT_PAUSE_S
            self.notify()  # nobody is told of every checkpoint
        self._done = begun
        self._progressed()

    def _log_failing(self, error: BaseException) -> None:
        reason = str(error) if isinstance(error, OSError | KsuitError) else repr(error)
        _LOGGER.warning("Checkpoints cannot be made durable for now (the older ones stay): %s", reason)

    def _log_recovered(self) -> None:
        _LOGGER.warning("Checkpoints can be made durable again, and the newest one is")
