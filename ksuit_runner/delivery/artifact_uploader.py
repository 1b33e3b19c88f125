"""Uploads a run's files and checkpoints in the background."""

import logging
from collections.abc import Callable

from ksuit_runner.delivery.artifact_mirror import Mirror
from ksuit_runner.delivery.binding import Binding
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import PathProvider
from ksuit_runner.system.background import Background

_LOGGER = logging.getLogger(__name__)


class Uploader(Background):
    """Thread that keeps the store's copy of a run's artifacts up to date; idle where the run's folder is the store.

    Args:
        binding: The run in the tracker's store.
        paths: Paths of the run.
        are_metrics_sent: Returns whether the tracker has all metrics up to now; may wait for a while.
        interval_s: How often to check for new requests, in seconds.
    """

    def __init__(
        self,
        binding: Binding,
        paths: PathProvider,
        are_metrics_sent: Callable[[], bool],
        interval_s: float = 1.0,
    ) -> None:
        super().__init__("artifact-upload", interval_s)
        self._binding = binding
        self._mirror = Mirror(binding.store, paths, are_metrics_sent, binding.check_owner)
        self._asked = self._done = 0
        self._is_last = False
        self._thread.start()

    def request(self) -> None:
        """Have what is new uploaded; returns at once."""
        with self._changed:
            self._asked += 1
        self.notify()

    def finish(self, timeout_s: float) -> bool:
        """Upload everything, the log included, within the given time; return whether all of it is uploaded."""
        self._is_last = True
        self.request()
        return self._wait_for(lambda: self._done == self._asked, timeout_s)

    def missing(self) -> int:
        """Number of files and checkpoints that are not known to be uploaded."""
        if self._binding.is_bound and self._binding.artifacts_are_local:
            return 0
        return len(self._mirror.missing())

    def close(self) -> None:
        """End the thread, without waiting for an upload in progress."""
        self._stop()

    def _work(self) -> None:
        asked = self._asked
        if asked == self._done or not self._binding.is_bound:
            return
        if not self._binding.artifacts_are_local:
            self._mirror.update()
            if self._is_last:
                self._mirror.upload_log()
        self._done = asked
        self._progressed()

    def _log_failing(self, error: BaseException) -> None:
        reason = str(error) if isinstance(error, TrackerError | OSError) else repr(error)
        _LOGGER.warning("Files cannot be uploaded for now (they stay on this disk): %s", reason)

    def _log_recovered(self) -> None:
        _LOGGER.warning("Files can be uploaded again, and all of them are")
