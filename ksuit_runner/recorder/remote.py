"""The recording of a run as the training process sees it: everything is done by the recorder."""

import errno
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from time import monotonic

import msgspec

from ksuit_runner.checkpoint.commit import EVERY, Committer, hand_over
from ksuit_runner.checkpoint.folders import READY, beside, damage, names, update_of
from ksuit_runner.checkpoint.manifest import is_common
from ksuit_runner.delivery.recording import COMMIT_PAUSE_S, Unsent
from ksuit_runner.errors import KsuitError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import JournalReader
from ksuit_runner.recorder.client import RecorderClient
from ksuit_runner.recorder.tracker import RemoteTracker
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.base import BaseTracker


class RemoteRecording:
    """Has the recorder follow a run; see ``RunFollower``.

    Args:
        tracker: Tracker of the run, in the recorder.
        paths: Paths of the run.
        lock: The run's lock, held by this process.

    Attributes:
        checkpoints: Has the run's checkpoints committed by the recorder.
    """

    def __init__(self, tracker: BaseTracker, paths: PathProvider, lock: RunLock) -> None:
        assert isinstance(tracker, RemoteTracker), "its tracker is in another process"
        self._tracker = tracker  # whose session is open for as long as it is used
        self._client, self._session = tracker.client, tracker.session
        self._run_id, self._token = paths.run_id, lock.token
        self.checkpoints = RemoteHandOver(self._client, self._session, paths, lock)
        self._record()

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
        if not self._client.follows(self._session):  # it was given up, and gets another chance
            self._record()
            self.start()
        return msgspec.convert(self._client.call(self._session, "finish", {"timeout_s": timeout_s}), Unsent)

    def close(self) -> None:
        """Have nothing written and recorded from now on."""
        self._client.close_run(self._session)

    def _record(self) -> None:
        self._client.record(self._session, self._run_id, self._token, self.checkpoints)


class RemoteHandOver:
    """Has the recorder commit a run's checkpoints; if it has died too often, they are committed here. See ``HandOver``.

    Args:
        client: The recorder.
        session: Number of the run's session.
        paths: Paths of the run.
        lock: The run's lock, held by this process.
    """

    def __init__(self, client: RecorderClient, session: int, paths: PathProvider, lock: RunLock) -> None:
        self._client, self._session, self._paths = client, session, paths
        # Made anew each time: a recorder may have written tags in between.
        self._make_committer = partial(Committer, paths, lock.check, JournalReader(paths.journal).sync)
        self._waiting: dict[str, Future[None]] = {}
        self._renamed: list[str] = []  # by a recorder that has died, which may not have done the rest
        self._next_notice = 0.0
        self._is_given_up = False
        self._lock = threading.RLock()

    def submit(self, name: str) -> Future[None]:
        """Have a checkpoint committed, without waiting for it."""
        done = Future[None]()
        with self._lock:  # the recorder looks by itself, too: whatever becomes of it now, this one waits for it
            hand_over(self._paths, name)
            self._waiting[name] = done
        if self._is_given_up:
            self._commit_here()
        elif monotonic() >= self._next_notice:  # until then it looks by itself
            self._next_notice = monotonic() + COMMIT_PAUSE_S
            self._client.notify(self._session)
        return done

    def hurry(self) -> None:
        """Have the recorder commit what was submitted without a pause."""
        self._client.hurry(self._session)

    def restore_tags(self, name: str, tags: Sequence[str]) -> None:
        """Have the tags of a committed checkpoint restored."""
        self._client.call(self._session, "restore_tags", {"name": name, "tags": list(tags)})

    def close(self) -> None:
        """Do nothing: what was submitted is committed."""

    def ended(self, name: str, error: Exception | None) -> None:
        """See ``Checkpoints``."""
        with self._lock:
            ended = [self._waiting.pop(one) for one in [*self._waiting] if name in (one, EVERY)]
        for done in ended:
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

    def recorder_died(self) -> None:
        """See ``Checkpoints``."""
        with self._lock:
            self._renamed = [name for name in self._waiting if not self._is_ready(name)]

    def recorder_restarted(self) -> None:
        """See ``Checkpoints``."""
        renamed, self._renamed = self._renamed, []
        for name in renamed:
            self.ended(name, self._error_of(name))

    def recorder_given_up(self) -> None:
        """See ``Checkpoints``."""
        self._is_given_up = True
        self.recorder_died()
        with suppress(KsuitError, OSError):  # each checkpoint gets an error of its own
            self._make_committer().finish_interrupted()
        self.recorder_restarted()
        with suppress(OSError):  # those that wait have it
            self._commit_here()

    def _is_ready(self, name: str) -> bool:
        # False, too, where one cannot look: then ``_error_of`` says what has become of it, and nobody waits for ever.
        return os.path.exists(beside(self._paths.checkpoints_dir / name, READY))

    def _error_of(self, name: str) -> OSError | None:
        """Return the error of a checkpoint that a dead recorder has renamed; None for one that is whole or dropped."""
        try:
            existing = names(self._paths)
        except OSError as error:
            return error
        with self._lock:  # training goes on, and submits more
            newer = [other for other in (*existing, *self._waiting) if update_of(other) > update_of(name)]
        if name not in existing and newer:  # superseded by one that is committed, or will be
            return None
        problem = damage(self._paths.checkpoints_dir / name, reads=is_common)
        return None if problem is None else OSError(errno.EIO, problem)

    def _commit_here(self) -> None:
        with self._lock:
            self._make_committer().commit_waiting(self.ended)
