"""The recording of a run as the training process sees it: everything is done by the recorder."""

import msgspec

from ksuit_runner.delivery.recording import Unsent
from ksuit_runner.paths import PathProvider
from ksuit_runner.recorder.tracker import RemoteTracker
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.base import BaseTracker


class RemoteRecording:
    """Has the recorder follow a run; see ``RunFollower``.

    Args:
        tracker: Tracker of the run, in the recorder.
        paths: Paths of the run.
        lock: The run's lock, held by this process.
    """

    def __init__(self, tracker: BaseTracker, paths: PathProvider, lock: RunLock) -> None:
        assert isinstance(tracker, RemoteTracker), "its tracker is in another process"
        self._client, self._session = tracker.client, tracker.session
        self._client.record(self._session, paths.run_id, lock.token)

    def forget_lost(self) -> bool:
        """Have the run registered again if the store has lost it; return whether it was lost, or never registered."""
        return bool(self._client.call(self._session, "forget_lost", {}))

    def reach(self) -> None:
        """Connect to the store now and not at the first delivery."""
        self._client.call(self._session, "reach", {})

    def start(self) -> None:
        """Begin to follow the folder."""
        self._client.start(self._session)

    def notify(self) -> None:
        """Have the folder looked at now."""
        self._client.notify(self._session)

    def finish(self, timeout_s: float) -> Unsent:
        """Have the rest and how the run ended delivered, and return what is left."""
        return msgspec.convert(self._client.call(self._session, "finish", {"timeout_s": timeout_s}), Unsent)

    def close(self) -> None:
        """Have nothing written and recorded from now on."""
        self._client.close_run(self._session)
