import os
import signal
import threading

import pytest

from ksuit_runner.system.signals import catch_signals
from ksuit_runner.ui.acknowledge import acknowledged


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_acknowledged_once(number):
    said, is_said = [], threading.Event()

    def say(text):
        said.append(text)
        is_said.set()

    with catch_signals() as interruption, acknowledged(say):
        os.kill(os.getpid(), number)
        assert is_said.wait(5)
        assert interruption.signal == number
        if number == signal.SIGTERM:
            os.kill(os.getpid(), number)
    assert len(said) == 1 and said[0].startswith(f"{number.name}: the run finishes this update, saves and ends")
    assert ("Ctrl-C once more" in said[0]) is (number == signal.SIGINT)
    assert signal.set_wakeup_fd(-1) == -1
    assert "acknowledge" not in [thread.name for thread in threading.enumerate()]
