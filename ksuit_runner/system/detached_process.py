"""A process that outlives what ends its starter: Ctrl-C, a scheduler's signals to a job, a closed terminal."""

import errno
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from ksuit_runner.system.signals import SIGNALS

_REFUSED = (errno.EAGAIN, errno.ENOMEM, errno.EPERM, errno.EACCES, errno.ENOSYS)


def start_detached(command: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which no signal in ``SIGNALS`` ends; it calls ``ignore_signals`` first.

    Until then the signals wait: they are blocked in this thread, and a new process inherits that.

    Args:
        command: The program and its arguments.
        options: Further arguments of ``subprocess.Popen``.

    Raises:
        OSError: It cannot be started; see ``is_refused``.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return subprocess.Popen(command, start_new_session=True, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals() -> None:
    """Ignore the signals in ``SIGNALS``, those that have waited since the start included; for the main thread."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def is_refused(error: OSError) -> bool:
    """Whether a process could not be started because no further one is allowed here.

    The limit of processes or memory is reached (``ulimit -u``, a cgroup), or a sandbox forbids it. A program that is
    missing is another matter.
    """
    return error.errno in _REFUSED
