"""Processes in sessions of their own, which get no signal but those that are meant for them.

One outlives what ends its starter: Ctrl-C, a scheduler's signals to a job, a closed terminal. Another ends with it.
"""

import ctypes
import errno
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from ksuit_runner.system.signals import SIGNALS

_PR_SET_PDEATHSIG = 1
_REFUSED = (errno.EAGAIN, errno.ENOMEM, errno.EPERM, errno.EACCES, errno.ENOSYS)


def start_detached(command: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own; it calls ``ignore_signals`` or ``accept_signals`` first.

    Until then the signals in ``SIGNALS`` wait: they are blocked in this thread, and a new process inherits that.

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


def accept_signals() -> None:
    """Let the signals in ``SIGNALS`` end this process until somebody handles them; for the main thread.

    One that the starter ignores stays ignored.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end_with(starter: int, connection: Connection) -> None:
    """Have this process killed when its starter is gone, however that ends.

    Args:
        starter: Process id of the starter.
        connection: A connection whose other end only the starter has; it sends nothing more.
    """
    with suppress(OSError, AttributeError):  # Linux only; elsewhere the connection has to do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != starter:
        os.kill(os.getpid(), signal.SIGKILL)

    def wait() -> None:
        with suppress(EOFError, OSError):
            connection.poll(None)
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="starter-watch", daemon=True).start()


def is_refused(error: OSError) -> bool:
    """Whether a process could not be started because no further one is allowed here.

    The limit of processes or memory is reached (``ulimit -u``, a cgroup), or a sandbox forbids it. A program that is
    missing is another matter.
    """
    return error.errno in _REFUSED
