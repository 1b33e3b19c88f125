"""A thread that works behind training: how often, how it waits after failures, and how it ends."""

import threading
import time

from ksuit_runner.errors import TakenOverError
from ksuit_runner.system.background import Background


class Worker(Background):
    """Fails as often as it is told to, and notes how long it waits before each attempt."""

    def __init__(self, failures, interval_s=0.25):
        super().__init__("worker", interval_s)
        self.failures, self.waits, self.said, self.attempts = failures, [], [], 0
        self.is_idle = threading.Event()
        self._wake = Clock(self)

    def start(self):
        self._thread.start()
        return self

    def _work(self):
        self.attempts += 1
        if self.attempts <= self.failures:
            raise ZeroDivisionError(self.attempts)
        self._progressed()

    def _log_failing(self, error):
        self.said.append(f"fails: {error}")

    def _log_recovered(self):
        self.said.append("recovered")


class Clock(threading.Event):
    """Takes no time, and stops when enough has been seen."""

    def __init__(self, worker):
        super().__init__()
        self.worker = worker

    def wait(self, timeout=None):
        self.worker.waits.append(timeout)
        if len(self.worker.waits) > self.worker.failures + 2:
            self.worker.is_idle.set()
            return super().wait(60)
        return True


def test_after_failures_it_waits_longer_up_to_half_a_minute_and_then_as_before():
    worker = Worker(failures=10).start()
    assert worker.is_idle.wait(30)
    assert worker.waits == [0.25, 0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 0.25, 0.25]
    assert worker.said == ["fails: 1", "recovered"]
    assert not worker.is_failing
    worker._stop()
    worker._thread.join(30)
    assert not worker._thread.is_alive() and worker.attempts == 12


def test_who_waits_makes_it_try_again_at_once_and_soon_after():
    worker = Worker(failures=0)
    worker._delay_s = 30.0
    assert not worker._wait_for(lambda: False, -1.0)
    assert worker._delay_s == 0.5 and worker._wake.is_set()
    worker.start()
    assert worker._wait_for(lambda: worker.attempts > 0, 30)
    worker._stop()


def test_once_it_is_to_end_it_says_nothing_more():
    worker = Worker(failures=1)
    worker._stop_work = worker._work

    def work():
        worker._is_stopped = True
        worker._stop_work()

    worker._work = work
    worker.start()
    worker._thread.join(30)
    assert worker.said == [] and not worker._thread.is_alive()


def test_who_waits_is_let_go_when_the_run_is_taken_over():
    worker, waits = Worker(failures=0), threading.Event()

    def is_done():
        waits.set()
        return False

    def work():
        waits.wait(30)
        raise TakenOverError("another process has resumed it")

    worker._work = work
    start = time.monotonic()
    worker.start()
    assert not worker._wait_for(is_done, 60)
    assert time.monotonic() - start < 30
    assert not worker._wait_for(is_done, 60)
    worker._thread.join(30)
    assert worker.said == [] and not worker._thread.is_alive()


def test_it_keeps_no_process_from_ending():
    assert Worker(failures=0)._thread.daemon


def test_who_waits_is_let_go_when_it_is_stopped():
    worker = Worker(failures=0).start()
    assert worker.is_idle.wait(30)
    threading.Timer(0.1, worker._stop).start()
    start = time.monotonic()
    assert not worker._wait_for(lambda: False, 60)
    assert time.monotonic() - start < 30
