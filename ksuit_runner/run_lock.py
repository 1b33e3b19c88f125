"""The lock of a run: one process at a time goes on with it, and a dead one keeps nobody waiting."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

from ksuit_runner.durable_files import make_folder
from ksuit_runner.errors import ResumeError
from ksuit_runner.stored_files import open_stored

_LOGGER = logging.getLogger(__name__)

# The start of a process is known as ticks since the machine's start; its time of day can move by about a second.
_START_TOLERANCE_S = 2.0
_FILE_SIZE = 512
_NO_FILE_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        pid: Process id on its host.
        host: Name of the host.
        started: When the process was started, in seconds since 1970; tells it from a later one with the same id.
        heartbeat: Last sign of life, in seconds since 1970.
    """

    pid: int
    host: str
    started: float
    heartbeat: float

    @classmethod
    def this_process(cls) -> Holder:
        """Describe the calling process, alive now."""
        started = psutil.Process().create_time()
        return cls(pid=os.getpid(), host=socket.gethostname(), started=started, heartbeat=time.time())

    def is_alive(self, stale_after_s: float) -> bool:
        """Whether the process still runs: known on its own host, by the age of its heartbeat on all others."""
        if self.host != socket.gethostname():
            return time.time() - self.heartbeat < stale_after_s
        try:
            process = psutil.Process(self.pid)
            # A killed process stays in the table as a zombie until its parent asks for it.
            ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return not ended and abs(process.create_time() - self.started) < _START_TOLERANCE_S
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True

    def is_same_process(self, other: Holder | None) -> bool:
        """Whether both describe one process, whenever they were written."""
        return other is not None and (self.pid, self.host, self.started) == (other.pid, other.host, other.started)


class RunLock:
    """Held by the process that runs a run, so that a run which is alive is not resumed a second time.

    The lock is a small JSON file. On the same host a holder counts as alive if its process is; a killed run can be
    resumed at once. On another host it counts as alive while its heartbeat is young, which asks for clocks that
    agree better than ``stale_after_s``. All reading and writing happens under ``flock`` on the file, so that of two
    processes that find a dead holder only one takes its place.

    Args:
        path: The file, in the run's folder.
        stale_after_s: Age at which a heartbeat from another host counts as dead, in seconds.
        beat_s: Time between two heartbeats, in seconds.

    Attributes:
        lost: Set when another process has taken the lock over, as it may while this one is suspended.
    """

    def __init__(self, path: Path, stale_after_s: float = 30.0, beat_s: float = 5.0) -> None:
        self.path = path
        self.stale_after_s = stale_after_s
        self.beat_s = beat_s
        self.lost = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._written: Holder | None = None

    def acquire(self) -> None:
        """Take the lock and keep it alive from a thread.

        Raises:
            ResumeError: A process that is alive holds it.
        """
        assert self._thread is None, "this lock is already held"
        make_folder(self.path.parent)
        with _exclusive(self.path) as file:
            holder = _read(file)
            if holder is not None and holder.is_alive(self.stale_after_s):
                raise ResumeError(self._explain(holder))
            self._sign(file)
        self.lost.clear()
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back; a lock that meanwhile belongs to another process, or is not held, is left alone."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        assert self._written is not None
        # A forked child has a copy of this object, and may not end what belongs to its parent.
        if self._written.pid != os.getpid() or not self.path.exists():
            return
        with _exclusive(self.path) as file:
            holder = _read(file)
            if holder is None or holder.is_same_process(self._written):
                self.path.unlink(missing_ok=True)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._stop.wait(self.beat_s):
            try:
                with _exclusive(self.path) as file:
                    holder = _read(file)
                    if holder is None or holder.is_same_process(self._written):
                        self._sign(file)
                        continue
            except (OSError, ResumeError) as error:
                _LOGGER.debug("no heartbeat written to %s: %s", self.path, error)
                continue
            self.lost.set()
            _LOGGER.error("this run has been taken over by pid %d on host %s", holder.pid, holder.host)
            return

    def _sign(self, file: int) -> None:
        # The start is written anew each time: when the machine's clock is set, it moves along.
        self._written = Holder.this_process()
        _write(file, self._written)

    def _explain(self, holder: Holder) -> str:
        age = max(0, round(time.time() - holder.heartbeat))
        return (
            f"run {self.path.parent.name[:8]}… is still running: "
            f"pid {holder.pid} on host {holder.host}, last sign of life {age} s ago"
        )


@contextmanager
def _exclusive(path: Path) -> Iterator[int]:
    """Open the file, making it if there is none, and keep all others out until the block ends."""
    file = _open_locked(path)
    try:
        yield file
    finally:
        os.close(file)


def _open_locked(path: Path) -> int:
    while True:
        file = open_stored(path, os.O_RDWR | os.O_CREAT)
        try:
            _flock(file)
            # Whoever released the lock while this process waited has removed the file that was opened here.
            if os.fstat(file).st_ino == path.lstat().st_ino:
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _flock(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        # A network file system without locks: what the file says still keeps a second process out, except one that
        # comes at the very same moment.
        if error.errno not in _NO_FILE_LOCKS:
            raise


def _read(file: int) -> Holder | None:
    """Return who the file names; None if it is new, or if the one who wrote it was killed in the middle of it."""
    try:
        return Holder(**json.loads(os.pread(file, _FILE_SIZE, 0)))
    except (ValueError, TypeError):
        return None


def _write(file: int, holder: Holder) -> None:
    # Always the same length: a person who looks at the file never sees the rest of an older, longer text.
    os.pwrite(file, json.dumps(asdict(holder)).ljust(_FILE_SIZE).encode(), 0)
