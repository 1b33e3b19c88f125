"""The file of a lock: which process it names as the holder, and what the kernel knows about that process."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from ksuit_runner.system.untrusted_files import UnsafeFileError, conform, open_stored, parse_json

_MOST_BYTES = 4096
_NO_FILE_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)  # the last one: of a folder on NFS


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

    @classmethod
    def here(cls, has_kernel_lock: bool) -> Holder:
        """Return this process as the holder of a new lock."""
        return cls(os.getpid(), socket.gethostname(), kernel(), has_kernel_lock, uuid4().hex)


class Seen(NamedTuple):
    """A look at a lock: its holder, its file, when that was touched, and whether the kernel says it is free."""

    holder: Holder | None
    number: int
    touched: int
    is_free: bool | None

    @property
    def is_dead(self) -> bool:
        """Whether certainly nobody holds it: it names no holder, or one whose lock this kernel has released."""
        if self.holder is None:
            return True
        return bool(self.is_free) and self.holder.has_kernel_lock and self.holder.kernel == kernel()

    @property
    def is_alive(self) -> bool:
        """Whether its holder is certainly alive; where the kernel cannot tell, neither this nor ``is_dead`` holds."""
        return self.is_free is False and self.holder is not None and self.holder.host == socket.gethostname()


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process of this kernel at a time look at the lock in a folder and acquire it."""
    file = os.open(folder, os.O_RDONLY)
    try:
        with without_locks_too():
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
def without_locks_too() -> Iterator[None]:
    """Continue where the file system has no locks."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_FILE_LOCKS:
            raise


@cache
def kernel() -> str:
    """Return the id of the running kernel; the name of the host where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def read_holder(file: int) -> Holder | None:
    """Return the holder that a file names; None if it is empty, or nothing that this module writes."""
    try:
        return conform(Holder, parse_json(os.pread(file, _MOST_BYTES, 0).decode()))
    except (UnsafeFileError, UnicodeDecodeError):
        return None


def see(path: Path) -> Seen | None:
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
        with without_locks_too():  # shared, so that several may look at once: only the holder keeps it for itself
            is_free = try_lock(file, fcntl.LOCK_SH)
        return Seen(read_holder(file), found.st_ino, found.st_mtime_ns, is_free)
    finally:
        os.close(file)
