"""Tells the user at once that a signal was received, while the program is still busy with an update."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ksuit_runner.system.signals import SIGNALS


@contextmanager
def acknowledged(
    say: Callable[[str], None], what: str = "the run finishes this update, saves and ends"
) -> Iterator[None]:
    """Say that a signal which asks the run to end was received, for the first one while the block runs.

    Within another such block nothing is said.

    The interpreter calls handlers of signals only between two instructions of the main thread, which may be in a long
    forward pass. Its wake-up descriptor is written to at once, and read by a thread that waits for that.

    Args:
        say: Called with what is to be said, in another thread.
        what: What happens now.
    """
    if threading.current_thread() is not threading.main_thread() or _is_somebody_told():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_wait, args=(reader, say, what), name="acknowledge", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        writer.close()
        thread.join(1.0)
        reader.close()


def _is_somebody_told() -> bool:
    """Whether somebody in this process is told of signals already."""
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before, warn_on_full_buffer=False)
    return before != -1


def _wait(reader: socket.socket, say: Callable[[str], None], what: str) -> None:
    with suppress(OSError):
        while received := reader.recv(1):
            if received[0] in SIGNALS:
                name = signal.Signals(received[0]).name
                again = "; Ctrl-C once more ends it without saving" if name == "SIGINT" else ""
                say(f"{name}: {what}{again}")
                return
