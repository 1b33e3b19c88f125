"""A run in the recorder: its checkpoints are committed, it is delivered to its tracker, and its death is recorded."""

import logging
import threading
from collections.abc import Sequence

from ksuit_runner.checkpoint.commit import OnCheckpoint
from ksuit_runner.delivery.recording import Recording, Unsent
from ksuit_runner.errors import KsuitError, TakenOverError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.point import now
from ksuit_runner.system.recorder_lock import RecorderLock
from ksuit_runner.system.run_lock import LockView
from ksuit_runner.tracker.base import EXIT_TAG, BaseTracker
from ksuit_runner.ui.logs import log_to_file

_LOGGER = logging.getLogger(__name__)
_LOOK_S = 0.1  # between two looks at whether the run is still this process's to record
_CLOSE_S = 2.0


class RecordedRun:
    """Records a run for the process that trains it, and after the death of that process to the end.

    Args:
        tracker: The tracker that it is delivered to.
        paths: Paths of the run.
        token: Token of the run's lock, which the training process holds.
        on_checkpoint: See ``Recording``.

    Raises:
        TakenOverError: Another process holds the lock by now.
        AliveError: Another recorder does not let go of the run.
    """

    def __init__(
        self,
        tracker: BaseTracker,
        paths: PathProvider,
        token: str,
        on_checkpoint: OnCheckpoint,
    ) -> None:
        self._tracker = tracker
        self._paths = paths
        self._view = LockView(paths.lock, token)
        self._view.check()
        self._lock = RecorderLock(paths.recorder_lock)
        self._lock.acquire()
        self._recording = Recording(tracker, paths, self._check, on_checkpoint)
        self._is_started = False
        self._closed, self._closing = threading.Event(), threading.Lock()
        threading.Thread(target=self._make_way, name="recorder-owner", daemon=True).start()

    def forget_lost(self) -> bool:
        """See ``RunFollower``."""
        return self._recording.forget_lost()

    def reach(self) -> None:
        """See ``RunFollower``."""
        self._recording.reach()

    def restore_tags(self, name: str, tags: Sequence[str]) -> None:
        """See ``HandOver``."""
        self._recording.committer.restore_tags(name, tags)

    def start(self) -> None:
        """See ``RunFollower``. What a recorder that has died was doing is finished first; asked twice, only once."""
        if not self._is_started:
            self._recording.committer.finish_interrupted()
            self._follow()

    def notify(self) -> None:
        """See ``RunFollower``."""
        if self._is_started:
            self._recording.notify()

    def hurry(self) -> None:
        """See ``HandOver``."""
        if self._is_started:
            self._recording.hurry()

    def finish(self, timeout_s: float) -> Unsent:
        """See ``RunFollower``."""
        return self._recording.finish(timeout_s)

    def close(self) -> None:
        """Write nothing from now on, and let another process record the run once nothing is being written."""
        with self._closing:
            if not self._closed.is_set():
                self._closed.set()
                self._recording.close()
                self._recording.join()
                self._lock.release()
                self._view.close()

    def end_dead(self, reason: str | None) -> None:
        """Record what the training process has left when it died: the rest of its metrics, its last checkpoint, KILLED.

        For a process that ends afterwards: what is in progress is waited for only for a bounded time.

        Args:
            reason: Why it died, if that is known.
        """
        died = now()
        try:
            self._check()
            with log_to_file(self._paths.log):
                _LOGGER.error("the process of this run has died%s", f": {reason}" if reason else "")
                self._recover()
                self._recording.mark_if_killed({EXIT_TAG: reason} if reason else None, died)
                self._follow()
                self.finish(self._tracker.close_timeout_s)
        except TakenOverError:  # the run is another process's by now
            pass
        except (KsuitError, OSError) as error:
            _LOGGER.error("%s", error)
        closing = threading.Thread(target=self.close, daemon=True)
        closing.start()
        closing.join(_CLOSE_S)  # a request that hangs ends with this process
        self._view.remove_dead(is_known_dead=True)

    def _recover(self) -> None:
        """Commit what was handed over; whatever the disk says, the rest of the record does not depend on it."""
        try:
            self._recording.committer.recover()
        except OSError as error:
            _LOGGER.error("its last checkpoints are not committed (a resume tries again): %s", error)

    def _follow(self) -> None:
        if not self._is_started:
            self._recording.start()
            self._is_started = True

    def _check(self) -> None:
        self._view.check()
        self._lock.check()

    def _make_way(self) -> None:
        """Wait until the run is another process's, and make way for its recorder."""
        while not self._closed.wait(_LOOK_S):
            try:
                self._check()
            except TakenOverError:
                self.close()
