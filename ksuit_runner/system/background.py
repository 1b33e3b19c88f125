"""Background work that never raises into training: repeated at an interval, with a backoff while it fails."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from ksuit_runner.errors import TakenOverError

_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0


class Background(ABC):
    """A daemon thread that works at an interval, and retries after a failure in 0.5 s, 1 s, ... 30 s.

    It ends when another process has taken the run over. It never keeps a process from ending, even while it hangs.

    Args:
        name: Name of the thread.
        interval_s: How often to check whether there is something to do, in seconds.
    """

    def __init__(self, name: str, interval_s: float) -> None:
        self._interval_s = interval_s
        self._delay_s = 0.0  # 0 while it succeeds
        self._is_stopped = False
        self._has_ended = False  # then there is nothing to wait for
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_failing(self) -> bool:
        """Whether the last attempt failed."""
        return self._delay_s > 0

    def notify(self) -> None:
        """Work now instead of at the next interval, and try again at once after a failure."""
        self._wake.set()

    def join(self) -> None:
        """Wait until the thread has ended, which it does once it was stopped and its current work is done."""
        self._thread.join()

    @abstractmethod
    def _work(self) -> None:
        """Do what there is to do; anything that it raises is a failure."""

    @abstractmethod
    def _log_failing(self, error: BaseException) -> None:
        """Log that it fails; called once per outage."""

    @abstractmethod
    def _log_recovered(self) -> None:
        """Log that it works again."""

    def _wait_for(self, is_done: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until the thread has made something true, for a bounded time; return whether it is."""
        with self._changed:
            self._delay_s = min(self._delay_s, _FIRST_DELAY_S)  # someone waits: try more often
            self.notify()
            self._changed.wait_for(lambda: self._has_ended or is_done(), max(0.0, timeout_s))
            return is_done()

    def _stop(self) -> None:
        """Have the thread end after its current work, without waiting for it."""
        self._is_stopped = True
        self.notify()

    def _progressed(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._repeat()
        finally:
            self._has_ended = True
            self._progressed()

    def _repeat(self) -> None:
        while True:
            self._wake.wait(self._delay_s or self._interval_s)
            self._wake.clear()
            if self._is_stopped:
                return
            try:
                self._work()
            except TakenOverError:
                return
            except BaseException as error:  # whatever it raises, training continues
                if not self._delay_s and not self._is_stopped:
                    self._log_failing(error)
                self._delay_s = min(2 * self._delay_s or _FIRST_DELAY_S, _LONGEST_DELAY_S)
                continue
            if self._delay_s and not self._is_stopped:
                self._delay_s = 0.0
                self._log_recovered()
