"""The lock of a run: one process at a time writes to it, and a dead one blocks nobody."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from ksuit_runner.errors import AliveError, ResumeError, TakenOverError
from ksuit_runner.system.atomic_files import make_folder
from ksuit_runner.system.lock_file import Holder, Seen, one_at_a_time, read_holder, see, try_lock, without_locks_too
from ksuit_runner.system.untrusted_files import open_stored

_LOGGER = logging.getLogger(__name__)

_LOOK_S = 0.2
_BEATS = 2.5
_STALE_AFTER_S = 30.0


class Ownership:
    """Knows whether the file of a lock still names the holder that it is about.

    Args:
        path: The file, in the run's folder.
        token: Unique id of the acquisition that it is about; None before the lock is acquired.

    Attributes:
        lost: Set when another process has taken the lock over, as it may while the holder is suspended.
    """

    def __init__(self, path: Path, token: str | None = None) -> None:
        self.path = path
        self.lost = threading.Event()
        self._token = token
        self._name = str(path)
        self._identity: tuple[int, int] | None = None
        self._open_file: int | None = None  # while it is open, its inode number is not given to another file
        self._recognizing = threading.Lock()
        self._checked = -math.inf

    def check(self, at_most_s: float = 0.0) -> None:
        """Make sure that no other process has taken the run over.

        Called before every write to the run's folder or to its tracker; takes a few microseconds.

        Args:
            at_most_s: Age up to which an earlier result counts, in seconds; a process that was suspended checks again.

        Raises:
            TakenOverError: One has.
        """
        now = time.monotonic()
        if now - self._checked < at_most_s and not self.lost.is_set():
            return
        self._checked = now
        if self.lost.is_set() or not self._is_in_place():
            self.lost.set()
            raise TakenOverError(
                f"another process has resumed {self._what()}, or {self.path} was removed; it ends here, and leaves the "
                "record to that process"
            )

    def _is_in_place(self) -> bool:
        try:
            found = os.stat(self._name, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError:  # an unreachable file system says nothing about who holds the run
            return True
        # There are file systems on which the numbers of files change.
        return (found.st_dev, found.st_ino) == self._identity or self._recognize()

    def _recognize(self) -> bool:
        """Whether the file in place names the holder; it is known by its inode number from then on."""
        try:
            file = open_stored(self.path, os.O_RDONLY)
        except (OSError, ResumeError):
            return False
        holder, found = read_holder(file), os.fstat(file)
        if holder is None or holder.token != self._token:
            os.close(file)
            return False
        with self._recognizing:
            if self._open_file is not None:
                os.close(self._open_file)
            self._open_file, self._identity = file, (found.st_dev, found.st_ino)
        return True

    def _forget(self) -> None:
        with self._recognizing:
            if self._open_file is not None:
                os.close(self._open_file)
            self._open_file = self._identity = None

    def _what(self) -> str:
        return f"run {self.path.parent.name[:8]}…"


class LockView(Ownership):
    """A run's lock as seen by a process that works for its holder, and does not hold it itself.

    Args:
        path: The file, in the run's folder.
        token: ``RunLock.token`` of the holder.
    """

    def __init__(self, path: Path, token: str) -> None:
        super().__init__(path, token)

    def remove_dead(self, is_known_dead: bool = False) -> bool:
        """Remove the file of a dead holder; what another process has put in its place stays.

        Args:
            is_known_dead: Whether the caller knows of the death, and the kernel need not be asked.

        Returns:
            Whether it was removed. If it cannot be, it keeps nobody waiting: the next owner replaces it.
        """
        try:
            with one_at_a_time(self.path.parent):
                seen = see(self.path)
                if seen is None or not self._is_of_holder(seen) or not (is_known_dead or seen.is_dead):
                    return False
                self.path.unlink()
                return True
        except (OSError, ResumeError) as error:
            _LOGGER.debug("%s could not be removed: %s", self.path, error)
            return False

    def close(self) -> None:
        """Close what is open for the checks; the lock stays as it is."""
        self._forget()

    def _is_of_holder(self, seen: Seen) -> bool:
        return seen.holder is not None and seen.holder.token == self._token


class RunLock(Ownership):
    """Held by the process that writes to a run, so that a run which is alive is not resumed a second time.

    The lock is a small file that belongs to one holder for as long as it exists: whoever takes over puts a file of its
    own in its place, by which the earlier holder knows that it has lost the run (``check``).

    The kernel knows whether a holder is alive: it keeps a lock (``flock``) for it until it dies, whatever its process
    id and the clocks say. Only a holder on another kernel or host, or on a file system without locks, has to be watched
    for a while: a thread of the holder touches the file every few seconds. One that is suspended for longer than that
    can be taken over from another host.

    Args:
        path: The file, in the run's folder.
        stale_after_s: How long a holder on another host may give no sign of life before it counts as dead, in seconds.
        beat_s: Time between two signs of life, in seconds.

    Attributes:
        was_forced: Whether it was taken from a holder that is not certainly dead.
    """

    def __init__(self, path: Path, stale_after_s: float = _STALE_AFTER_S, beat_s: float = 5.0) -> None:
        super().__init__(path)
        self.stale_after_s = stale_after_s
        self.beat_s = beat_s
        self.was_forced = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: int | None = None

    @property
    def token(self) -> str:
        """Unique id of this acquisition, by which another process knows this holder (``LockView``)."""
        assert self._token is not None, "this lock was never held"
        return self._token

    def acquire(self, wait: bool = True) -> None:
        """Acquire the lock, and keep it alive from a thread.

        Args:
            wait: Whether to look for signs of life for a while where the kernel cannot tell; without, such a holder
                counts as alive.

        Raises:
            AliveError: A process that is alive holds it.
        """
        assert self._thread is None, "this lock is already held"
        make_folder(self.path.parent)
        silent: Seen | None = None
        while True:
            with one_at_a_time(self.path.parent):
                seen = self._look()
                if seen is None or seen == silent:
                    self._put_in_place()
                    break
            if silent is not None or not wait:
                raise AliveError(self._explain(seen.holder))
            self._watch(seen)
            silent = seen
        self.was_forced = silent is not None
        self.lost.clear()
        self._stop.clear()
        # A child that lives longer than this process must not keep the kernel's lock: it closes its copy.
        os.register_at_fork(after_in_child=partial(_close_in_child, weakref.ref(self)))
        self._thread = threading.Thread(target=self._beat, args=(self._file,), name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the lock; one that belongs to another process by now, or is not held, stays as it is."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        if self._file is None:  # in a forked child: it belongs to the parent
            return
        try:
            with one_at_a_time(self.path.parent):
                if self._is_in_place():
                    os.ftruncate(self._file, 0)  # names no holder, even if it cannot be removed
                    self.path.unlink()
        except OSError as error:
            _LOGGER.debug("%s could not be removed: %s", self.path, error)
        self._close_file()
        self._forget()

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _look(self) -> Seen | None:
        """Return a holder that may be alive; None if nobody holds the lock.

        Raises:
            AliveError: A process that is alive holds it.
        """
        seen = see(self.path)
        if seen is None or seen.is_dead:
            return None
        if seen.is_alive:
            raise AliveError(self._explain(seen.holder))
        return seen

    def _watch(self, seen: Seen) -> None:
        """Wait until the holder's time is up, or the file changes."""
        assert seen.holder is not None
        # Clocks may be wrong, so that an old file alone says nothing: a live holder touches it twice in this time.
        silent_s = max(0.0, time.time() - seen.touched / 1e9)
        wait_s = max(self.stale_after_s - silent_s, _BEATS * self.beat_s)
        message = "%s was held by pid %d on host %s: waiting for a sign of life, %.0f s at most"
        _LOGGER.warning(message, self._what(), seen.holder.pid, seen.holder.host, wait_s)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and see(self.path) == seen:
            time.sleep(min(_LOOK_S, wait_s))

    def _put_in_place(self) -> None:
        """Make this process's file and put it in place of an earlier one."""
        temporary = self.path.with_name(f".{self.path.name}.{uuid4().hex}")
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            is_locked = False
            with without_locks_too():
                is_locked = try_lock(file)
            holder = Holder.here(is_locked)
            os.write(file, json.dumps(asdict(holder)).encode())
            os.rename(temporary, self.path)
        except BaseException as error:
            os.close(file)
            with suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            raise
        found = os.fstat(file)
        self._file, self._token, self._identity = file, holder.token, (found.st_dev, found.st_ino)

    def _beat(self, file: int) -> None:
        while not self._stop.wait(self.beat_s):
            try:
                self.check()
                os.utime(file)
            except TakenOverError:
                _LOGGER.error("%s has been taken over by another process", self._what())
                return
            except OSError as error:
                _LOGGER.debug("no sign of life given at %s: %s", self.path, error)

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _explain(self, holder: Holder | None) -> str:
        who = f": pid {holder.pid} on host {holder.host}" if holder else ""
        return f"{self._what()} is still running{who}"


def is_held(path: Path) -> bool:
    """Whether the kernel keeps a lock for a process that is alive; false where it cannot tell."""
    return (seen := see(path)) is not None and seen.is_free is False


def seems_held(path: Path) -> bool:
    """Whether a process that is alive holds a lock, for display only: where the kernel cannot tell, the clocks do."""
    seen = see(path)
    if seen is None or seen.is_dead:
        return False
    return seen.is_free is False or time.time() - seen.touched / 1e9 < _STALE_AFTER_S


def _close_in_child(lock: weakref.ref[RunLock]) -> None:
    if (held := lock()) is not None:
        held._close_file()
