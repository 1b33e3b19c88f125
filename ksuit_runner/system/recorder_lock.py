"""The lock of the process that records a run: the next one waits for it, and ends one that does not make way."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ksuit_runner.errors import AliveError, ResumeError
from ksuit_runner.system.lock_file import Holder, kernel, see
from ksuit_runner.system.run_lock import RunLock

RECORDER = "ksuit_runner.recorder"
"""Part of the command line of every process that records runs and does nothing else."""

_PROC = Path("/proc")
_LOOK_S = 0.02
_DEATH_S = 5.0  # a killed process releases its files at once, unless it waits for a disk or a server


class RecorderLock(RunLock):
    """Held by the process, or thread, that records a run, so that of two recorders of a run only one writes.

    It is a lock like that of the run, in a file of its own. The owner of a run may be replaced at any moment; its
    recorder then finishes what it is writing and leaves. One that does not, because it hangs or is suspended, would
    continue in the middle of a write one day: it is killed.

    Args:
        path: The file, in the run's folder.
        stale_after_s: See ``RunLock``.
        beat_s: See ``RunLock``.
    """

    def acquire(self, wait: bool = True, timeout_s: float = 2.0) -> None:
        """Wait for the lock, kill a recorder that keeps it for too long, and acquire it.

        Only a process of this host that runs the recorder and has this very file open is killed; elsewhere, or where
        that cannot be found out, the holder stays.

        Args:
            wait: See ``RunLock.acquire``.
            timeout_s: How long to wait for its release, in seconds.

        Raises:
            AliveError: A process that may not be killed keeps holding it.
        """
        try:
            self._acquire_within(timeout_s, wait=False)
        except AliveError:
            self._acquire_within(_DEATH_S if self._kill_holder() else 0.0, wait)

    def _acquire_within(self, timeout_s: float, wait: bool) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return super().acquire(wait)
            except AliveError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_LOOK_S)

    def _kill_holder(self) -> bool:
        """Kill the holder if it is a recorder of this host; return whether it was killed."""
        with suppress(OSError, ResumeError):
            holder = seen.holder if (seen := see(self.path)) else None
            return holder is not None and _is_local(holder) and _kill_recorder(holder.pid, self.path)
        return False

    def _what(self) -> str:
        return f"the recorder of {super()._what()}"


class StoredRunLock(RunLock):
    """The lock of a run that was recorded before: also waits until its earlier recorder writes to it no more.

    Args:
        path: The file of the run's lock.
        recorder_path: The file of its recorder's lock.
        **timing: See ``RunLock``.
    """

    def __init__(self, path: Path, recorder_path: Path, **timing: float) -> None:
        super().__init__(path, **timing)
        self._recorder_path = recorder_path

    def acquire(self, wait: bool = True) -> None:
        """Acquire the run's lock, and wait for that of the recorder.

        Args:
            wait: See ``RunLock.acquire``.

        Raises:
            AliveError: A process that is alive holds one of them.
        """
        super().acquire(wait)
        try:
            with RecorderLock(self._recorder_path):
                pass
        except BaseException:
            self.release()
            raise


def _is_local(holder: Holder) -> bool:
    is_other = holder.pid != os.getpid()  # another thread of this process records it
    return is_other and holder.host == socket.gethostname() and holder.kernel == kernel()


def _kill_recorder(pid: int, path: Path) -> bool:
    with _signalling(pid) as send:
        if _is_recorder(pid, path):
            send(signal.SIGKILL)
            return True
    return False


def _is_recorder(pid: int, path: Path) -> bool:
    """Whether a process runs the recorder and has a file open; no other one does that has the id by now."""
    process = _PROC / str(pid)
    if RECORDER.encode() not in (process / "cmdline").read_bytes():
        return False
    return any(_is_same(link, path) for link in (process / "fd").iterdir())


def _is_same(link: Path, path: Path) -> bool:
    with suppress(OSError):  # closed meanwhile
        return link.samefile(path)
    return False


@contextmanager
def _signalling(pid: int) -> Iterator[Callable[[int], None]]:
    """Send signals to a process and, where the kernel has pidfds, to no later one of the same id."""
    if not hasattr(os, "pidfd_open"):
        yield partial(os.kill, pid)
        return
    process = os.pidfd_open(pid)
    try:
        yield partial(signal.pidfd_send_signal, process)
    finally:
        os.close(process)
