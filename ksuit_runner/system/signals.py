"""Signals that ask a run to end: it finishes the update first; a second Ctrl-C ends it at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from ksuit_runner.errors import Interrupted

Result = TypeVar("Result")

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)
"""Ctrl-C; what ends a job; a closed terminal; what schedulers send before the end of a job's time; its CPU time is up.

SIGQUIT (Ctrl-\\) stays what it is: it ends a process that does not react, at once."""

TIME_IS_UP = signal.SIGXCPU
"""The signal that a run counts as ended by if it has used up the time that it was given itself."""

REQUEUE_SIGNALS = frozenset(SIGNALS) - {signal.SIGINT, signal.SIGTERM}
"""Those with which a scheduler announces that a job's time is up, and TIME_IS_UP: what is left is for another job.

SIGTERM is what it ends a job with, which it requeues itself if it wants to."""

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
        self._grace_s = 0.0
        self._alarm_before: Any = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal; a second SIGINT raises KeyboardInterrupt at once."""
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        if self.is_waiting and self._grace_s:
            self._set_alarm()
        elif self.is_waiting:
            self._end_wait()

    def wait_for(self, get: Callable[[], Result], grace_s: float = 0.0) -> Result:
        """Return what a function returns that may take long; a signal before or meanwhile ends the wait.

        Args:
            get: The function.
            grace_s: How long the wait goes on after the signal, in seconds; in the main thread only.

        Raises:
            Interrupted: The run is asked to end; with the number of the signal.
        """
        self._grace_s = grace_s
        if grace_s and threading.current_thread() is not threading.main_thread():
            self._grace_s = 0.0
        if self.signal is not None and not self._grace_s:
            raise Interrupted(self.signal)
        self.is_waiting = True
        try:
            if self.signal is not None:
                self._set_alarm()
            return get()
        finally:
            self.is_waiting = False
            if self._alarm_before is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, self._alarm_before)
                self._alarm_before = None

    def _set_alarm(self) -> None:
        if self._alarm_before is None:
            before = signal.signal(signal.SIGALRM, lambda number, frame: self._end_wait())
            self._alarm_before = before or signal.SIG_DFL
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)

    def _end_wait(self) -> None:
        if self.is_waiting and self.signal is not None:
            self.is_waiting = False  # another signal finds the program on its way out
            raise Interrupted(self.signal)


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
