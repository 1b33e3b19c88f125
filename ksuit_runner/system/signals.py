"""Signals that ask a run to end: it finishes the update first; a second Ctrl-C ends it at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from ksuit_runner.errors import Interrupted

Result = TypeVar("Result")

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)
"""Ctrl-C; what ends a job; a closed terminal; what schedulers send before the end of a job's time; its CPU time is up.

SIGQUIT (Ctrl-\\) stays what it is: it ends a process that does not react, at once."""

_KEPT = (signal.SIG_IGN, None)  # ignored, or handled by something other than Python


class Interruption:
    """Remembers the signal that asked the run to end.

    Attributes:
        signal: Number of the first signal, None while there was none.
        is_waiting: Whether the program waits for data, and so can be interrupted at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.is_waiting = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal; a second SIGINT raises KeyboardInterrupt at once."""
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        if self.is_waiting:
            self.is_waiting = False  # a second signal finds the program on its way out
            raise Interrupted(number)

    def wait_for(self, get: Callable[[], Result]) -> Result:
        """Return what a function returns that may take long; a signal before or meanwhile ends the wait.

        Raises:
            Interrupted: The run is asked to end.
        """
        if self.signal is not None:
            raise Interrupted(self.signal)
        self.is_waiting = True
        try:
            return get()
        finally:
            self.is_waiting = False


@contextmanager
def catch_signals(interruption: Interruption | None = None) -> Iterator[Interruption]:
    """Catch what asks a run to end while the block runs; outside of the main thread nothing is caught.

    A signal that the process was started to ignore (``nohup``, ``&`` in a script) stays ignored.

    Args:
        interruption: What handles the signals; by default it remembers them.
    """
    interruption = interruption or Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) not in _KEPT}
    for number in before:
        signal.signal(number, interruption.handle)
    for handler in before.values():
        outer = getattr(handler, "__self__", None)
        if isinstance(outer, Interruption):  # a sweep that was asked to end while this run of it was being built
            interruption.signal = interruption.signal or outer.signal
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
