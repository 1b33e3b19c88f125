import os
import signal
import threading
import time

import pytest

from ksuit_runner.errors import Interrupted
from ksuit_runner.system.signals import SIGNALS, catch_signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_ends_nothing(number):
    with catch_signals() as interruption:
        assert interruption.signal is None
        os.kill(os.getpid(), number)
        assert interruption.signal == number


def test_a_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt), catch_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_after_a_sigterm_ends_at_once():
    with pytest.raises(KeyboardInterrupt), catch_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("second", sorted(set(SIGNALS) - {signal.SIGINT}))
def test_the_first_signal_counts_and_another_one_changes_nothing(second):
    with catch_signals() as interruption:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), second)
        assert interruption.signal == signal.SIGUSR1


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with catch_signals() as interruption:
            os.kill(os.getpid(), number)
            assert interruption.signal is None and signal.getsignal(number) is signal.SIG_IGN
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_run_within_a_sweep_knows_of_the_signal_before_it():
    with catch_signals():
        with catch_signals() as first:
            assert first.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        with catch_signals() as second:
            assert second.signal == signal.SIGTERM


def test_handlers_are_given_back_also_after_an_error():
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), catch_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
        _ = 1 / 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_of_the_main_thread_nothing_is_caught():
    before, found = [signal.getsignal(number) for number in SIGNALS], []

    def work():
        with catch_signals() as interruption:
            found.append((interruption.signal, [signal.getsignal(number) for number in SIGNALS]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


@pytest.mark.parametrize("is_early", [True, False])
def test_a_wait_goes_on_for_its_grace_and_ends_then(is_early):
    with catch_signals() as interruption:
        threading.Timer(0.0 if is_early else 0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(0.05 * is_early)
        assert interruption.wait_for(lambda: time.sleep(0.1) or "batch", grace_s=5.0) == "batch"
        start, before = time.monotonic(), signal.getsignal(signal.SIGALRM)
        with pytest.raises(Interrupted) as caught:
            interruption.wait_for(lambda: time.sleep(10), grace_s=0.1)
        assert 0.1 <= time.monotonic() - start < 5 and caught.value.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL)[0] == 0
