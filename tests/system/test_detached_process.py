"""A process that is started to outlive signals, and one that may not be started."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from ksuit_runner.system.detached_process import ignore_signals, is_refused, start_detached
from ksuit_runner.system.signals import SIGNALS

OUTLIVES = """
import signal, subprocess, sys, time
from ksuit_runner.system.detached_process import ignore_signals
from ksuit_runner.system.signals import SIGNALS
sys.stdin.readline()  # the signals come before it is ready for them
ignore_signals()
for number in SIGNALS:
    signal.raise_signal(number)
print("alive", signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)
"""


def test_no_signal_ends_it_neither_before_it_is_ready_nor_afterwards():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    command = [sys.executable, "-c", OUTLIVES]
    with start_detached(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
        for number in SIGNALS:
            process.send_signal(number)
        assert process.communicate(b"\n") == (b"alive set()\n", None)
    assert process.returncode == 0


def test_it_can_still_be_killed():
    with start_detached([sys.executable, "-c", OUTLIVES], stdin=subprocess.PIPE) as process:
        process.kill()
    assert process.returncode == -signal.SIGKILL


def test_a_program_that_is_missing_is_not_refused_and_leaves_the_signals_as_they_were(tmp_path):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(FileNotFoundError) as caught:
        start_detached([tmp_path / "missing"])
    assert not is_refused(caught.value)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_signals_are_ignored_in_this_process_too():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ignore_signals()
        for number in SIGNALS:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


LIMITED = """
import os, resource
from ksuit_runner.system.detached_process import is_refused, start_detached
if os.getuid() == 0:  # whom the limit does not concern
    os.setgid(65534)
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    start_detached(["true"])
except OSError as error:
    print(is_refused(error), error.strerror)
"""


def test_a_limit_of_processes_refuses_it():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    assert done.stdout == f"True {os.strerror(errno.EAGAIN)}\n", done.stderr
