"""The lock of a run: one process at a time writes to it, and a dead one blocks nobody."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from uuid import uuid4

from ksuit_runner.errors import AliveError, ResumeError, TakenOverError
from ksuit_runner.system.atomic_files import make_folder
from ksuit_runner.system.untrusted_files import UnsafeFileError, conform, open_stored, parse_json

_LOGGER = logging.getLogger(__name__)

_MOST_BYTES = 4096
_NO_FILE_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)  # the last one: of a folder on NFS
_LOOK_S = 0.2
_BEATS = 2.5


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as its file names it.

    Attributes:
        pid: Process id, in the process table of its container.
        host: Name of the host or container.
        kernel: Id of the running kernel, the same for all containers on it and another one after a restart.
        has_kernel_lock: Whether the kernel holds the lock for it, and releases it when the process dies.
        token: Unique id of this acquisition.
    """

    pid: int
    host: str
    kernel: str
    has_kernel_lock: bool
    token: str


class _Seen(NamedTuple):
    """A look at a lock: its holder, its file, when that was touched, and whether the kernel says it is free."""

    holder: Holder | None
    number: int
    touched: int
    is_free: bool | None


class RunLock:
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
        lost: Set when another process has taken the lock over, as it may while this one is suspended.
        was_forced: Whether it was taken from a holder that is not certainly dead.
    """

    def __init__(self, path: Path, stale_after_s: float = 30.0, beat_s: float = 5.0) -> None:
        self.path = path
        self.stale_after_s = stale_after_s
        self.beat_s = beat_s
        self.lost = threading.Event()
        self.was_forced = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._name = str(path)
        self._file: int | None = None
        self._holder: Holder | None = None
        self._identity: tuple[int, int] | None = None
        self._checked = -math.inf

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
        silent: _Seen | None = None
        while True:
            with _one_at_a_time(self.path.parent):
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

    def seems_alive(self) -> bool:
        """Whether the holder has given a sign of life recently, by the clocks of both machines; for display only."""
        seen = _see(self.path)
        return seen is not None and time.time() - seen.touched / 1e9 < self.stale_after_s

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
                f"another process has resumed {self._run()}, or {self.path} was removed; it ends here, and leaves the "
                "record to that process"
            )

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
            with _one_at_a_time(self.path.parent):
                if self._is_in_place():
                    os.ftruncate(self._file, 0)  # names no holder, even if it cannot be removed
                    self.path.unlink()
        except OSError as error:
            _LOGGER.debug("%s could not be removed: %s", self.path, error)
        self._close()

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _look(self) -> _Seen | None:
        """Return a holder that may be alive; None if nobody holds the lock.

        Raises:
            AliveError: A process that is alive holds it.
        """
        seen = _see(self.path)
        if seen is None or seen.holder is None:
            return None
        is_here = seen.holder.kernel == _kernel()
        if seen.is_free and is_here and seen.holder.has_kernel_lock:
            return None
        if seen.is_free is False and seen.holder.host == socket.gethostname():
            raise AliveError(self._explain(seen.holder))
        return seen

    def _watch(self, seen: _Seen) -> None:
        """Wait until the holder's time is up, or the file changes."""
        assert seen.holder is not None
        # Clocks may be wrong, so that an old file alone says nothing: a live holder touches it twice in this time.
        silent_s = max(0.0, time.time() - seen.touched / 1e9)
        wait_s = max(self.stale_after_s - silent_s, _BEATS * self.beat_s)
        message = "%s was held by pid %d on host %s: waiting for a sign of life, %.0f s at most"
        _LOGGER.warning(message, self._run(), seen.holder.pid, seen.holder.host, wait_s)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and _see(self.path) == seen:
            time.sleep(min(_LOOK_S, wait_s))

    def _put_in_place(self) -> None:
        """Make this process's file and put it in place of an earlier one."""
        token = uuid4().hex
        temporary = self.path.with_name(f".{self.path.name}.{token}")
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            is_locked = False
            with _without_locks_too():
                is_locked = try_lock(file)
            self._holder = Holder(os.getpid(), socket.gethostname(), _kernel(), is_locked, token)
            os.write(file, json.dumps(asdict(self._holder)).encode())
            os.rename(temporary, self.path)
        except BaseException as error:
            os.close(file)
            with suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            raise
        found = os.fstat(file)
        self._file, self._identity = file, (found.st_dev, found.st_ino)

    def _is_in_place(self) -> bool:
        try:
            found = os.stat(self._name, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError:  # an unreachable file system says nothing about who holds the run
            return True
        identity = (found.st_dev, found.st_ino)
        # There are file systems on which the numbers of files change.
        if identity != self._identity and self._is_named():
            self._identity = identity
        return identity == self._identity

    def _is_named(self) -> bool:
        try:
            seen = _see(self.path)
        except (OSError, ResumeError):
            return False
        return seen is not None and seen.holder == self._holder

    def _beat(self, file: int) -> None:
        while not self._stop.wait(self.beat_s):
            try:
                self.check()
                os.utime(file)
            except TakenOverError:
                _LOGGER.error("%s has been taken over by another process", self._run())
                return
            except OSError as error:
                _LOGGER.debug("no sign of life given at %s: %s", self.path, error)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _run(self) -> str:
        return f"run {self.path.parent.name[:8]}…"

    def _explain(self, holder: Holder | None) -> str:
        who = f": pid {holder.pid} on host {holder.host}" if holder else ""
        return f"{self._run()} is still running{who}"


def _close_in_child(lock: weakref.ref[RunLock]) -> None:
    if (held := lock()) is not None:
        held._close()


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process of this kernel at a time look at the lock in a folder and acquire it."""
    file = os.open(folder, os.O_RDONLY)
    try:
        with _without_locks_too():
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def try_lock(file: int, operation: int = fcntl.LOCK_EX) -> bool:
    """Ask the kernel for a lock on an open file, which it keeps until the file is closed or the process dies.

    Args:
        file: Descriptor of the file.
        operation: ``LOCK_EX``, or ``LOCK_SH`` for a lock that several processes may hold.

    Returns:
        Whether it was granted; not while another process holds it.

    Raises:
        OSError: The file system has no locks.
    """
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _without_locks_too() -> Iterator[None]:
    """Continue where the file system has no locks."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_FILE_LOCKS:
            raise


def _kernel() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _read(file: int) -> Holder | None:
    """Return the holder that a file names; None if it is empty, or nothing that this module writes."""
    try:
        return conform(Holder, parse_json(os.pread(file, _MOST_BYTES, 0).decode()))
    except (UnsafeFileError, UnicodeDecodeError):
        return None


def _see(path: Path) -> _Seen | None:
    """Look at a lock; None if there is no file.

    The file is opened, because a network file system then asks the server for its times.

    Raises:
        ResumeError: It is not a file that a run would have left.
    """
    try:
        file = open_stored(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        found = os.fstat(file)
        is_free = None
        with _without_locks_too():  # shared, so that several may look at once: only the holder keeps it for itself
            is_free = try_lock(file, fcntl.LOCK_SH)
        return _Seen(_read(file), found.st_ino, found.st_mtime_ns, is_free)
    finally:
        os.close(file)
