"""Watches another process, which need not be a child, and finds out why it ended."""

import os
import select
import signal
import struct
import time
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path
from typing import NamedTuple

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_LOOK_S = 0.02
# Linux 6.15's request PIDFD_GET_INFO, the part that is asked for, and the structure: a mask, ..., the wait status.
_GET_INFO, _INFO_EXIT, _INFO = 0xC040FF0B, 1 << 3, struct.Struct("=Q52xi")
# Where a cgroup counts processes that were killed for want of memory, by controller: version 2, version 1.
_OOM_COUNTERS = {"": "memory.events", "memory": "memory.oom_control"}


class _Stat(NamedTuple):
    """What the process table says: the state, when the process began, and its wait status once it is a zombie."""

    state: str
    begin: str
    status: int


class ProcessWatch:
    """Knows whether a process has ended, and why. Nothing here raises.

    Linux keeps the reason until the parent asks for it, and since 6.15 for everyone who watches. Whatever else cannot
    be found out is unknown.

    Args:
        pid: Id of the parent of this process, or of any process where the kernel has pidfds.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._begin = stat.begin if (stat := _stat(pid)) else None
        self._oom_counter = _oom_counter(pid)
        self._oom_kills = self._count_oom_kills()
        self._is_gone = False
        self._reason: str | None = None
        self._pidfd: int | None = None
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._is_gone = True
        except (AttributeError, OSError):  # not Linux, an old one, or a sandbox: only for the parent
            self._is_gone = os.getppid() != pid

    def is_gone(self, timeout_s: float = 0.0) -> bool:
        """Whether the process has ended; takes a few microseconds.

        Args:
            timeout_s: How long to wait for its end, in seconds. Who waits learns the reason before its parent takes it.
        """
        if not self._is_gone and self._ends_within(timeout_s):
            self._reason = self._find_reason()
            self._is_gone = True
        return self._is_gone

    def reason(self) -> str | None:
        """Return ``SIGKILL``, ``out of memory (SIGKILL)``, ``exit status 3`` ...; None if it is unknown, or alive."""
        self.is_gone()
        return self._reason

    def is_suspended(self) -> bool:
        """Whether the process stands still until somebody lets it continue, as after SIGSTOP."""
        stat = _stat(self._pid)
        return stat is not None and stat.begin == self._begin and stat.state in "Tt"

    def close(self) -> None:
        """Stop watching; the answers stay."""
        if self._pidfd is not None:
            self.is_gone()
            os.close(self._pidfd)
            self._pidfd, self._is_gone = None, True

    def _ends_within(self, timeout_s: float) -> bool:
        if self._pidfd is not None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            return bool(poll.poll(1000 * timeout_s))
        deadline = time.monotonic() + timeout_s
        while os.getppid() == self._pid and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return os.getppid() != self._pid

    def _find_reason(self) -> str | None:
        code: int | None = None
        with suppress(ValueError):  # of no process that has ended
            if (status := self._wait_status()) is not None:
                code = os.waitstatus_to_exitcode(status)
        if self._count_oom_kills() > self._oom_kills and code in (None, -signal.SIGKILL):
            return "out of memory" if code is None else "out of memory (SIGKILL)"
        if code is None:
            return None
        return f"exit status {code}" if code >= 0 else _name(-code)

    def _wait_status(self) -> int | None:
        stat = _stat(self._pid)
        if stat is not None and stat.state == "Z" and stat.begin == self._begin:
            return stat.status
        with suppress(OSError):  # an older kernel
            if self._pidfd is not None:
                known, status = _INFO.unpack(ioctl(self._pidfd, _GET_INFO, _INFO.pack(_INFO_EXIT, 0)))
                return int(status) if known & _INFO_EXIT else None
        return None

    def _count_oom_kills(self) -> int:
        with suppress(OSError, ValueError):
            if self._oom_counter is not None:
                counts = dict(line.split() for line in self._oom_counter.read_text().splitlines())
                return int(counts.get("oom_kill", 0))
        return 0


def identity(pid: int) -> str:
    """Return a text that stands for a process of this machine, and for no later one with the same id."""
    stat = _stat(pid)
    return f"{pid} {stat.begin if stat else ''}"


def _stat(pid: int) -> _Stat | None:
    with suppress(OSError, ValueError, IndexError):
        # The name of the program is in parentheses, and may hold anything.
        fields = (_PROC / str(pid) / "stat").read_bytes().decode(errors="replace").rpartition(")")[2].split()
        return _Stat(fields[0], fields[19], int(fields[49]))
    return None


def _oom_counter(pid: int) -> Path | None:
    """Return the file in which the cgroup of a process counts; in a container, that may be mounted as the root."""
    with suppress(OSError, ValueError):
        for line in (_PROC / str(pid) / "cgroup").read_text().splitlines():
            _, controller, path = line.split(":", 2)
            if (name := _OOM_COUNTERS.get(controller)) is not None:
                root = _CGROUPS / controller
                found = [folder / name for folder in (root / path.lstrip("/"), root) if (folder / name).is_file()]
                if found:
                    return found[0]
    return None


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"
