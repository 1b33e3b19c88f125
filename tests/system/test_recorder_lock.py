"""The lock of a run's recorder: who waits for it gets it, at the latest from one that it kills."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ksuit_runner.errors import AliveError
from ksuit_runner.paths import PathProvider
from ksuit_runner.system import recorder_lock
from ksuit_runner.system.recorder_lock import RECORDER, RecorderLock, StoredRunLock
from ksuit_runner.system.run_lock import RunLock

HOLD = """
import subprocess, sys
from pathlib import Path
from ksuit_runner.errors import AliveError
from ksuit_runner.system.recorder_lock import RecorderLock
path = Path(sys.argv[1])
lock = RecorderLock(path)
lock.acquire()
try:
    RecorderLock(path).acquire(timeout_s=0.1)
except AliveError:  # it has not killed itself
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    print(child.pid, flush=True)
sys.stdin.readline()
lock.release()
"""
WAIT = "import sys; print('ready', flush=True); sys.stdin.readline()"


class Process:
    """Holds a recorder's lock, or only waits, under a command line of one's choice, and has a child."""

    def __init__(self, script: str, *arguments: object) -> None:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.answer = self.process.stdout.readline().strip()
        assert self.answer

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def make_way(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self) -> None:
        with self.process:
            self.process.kill()
        if self.answer.isdigit():
            os.kill(int(self.answer), signal.SIGKILL)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = PathProvider(tmp_path, "3f2a9c51e0d84b7a").recorder_lock
    path.parent.mkdir(parents=True)
    return path


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def begin(*arguments: Any) -> Process:
        started.append(Process(*arguments))
        return started[-1]

    yield begin
    for process in started:
        process.end()


def test_a_stored_run_is_held_only_once_its_recorder_has_let_go(path):
    run = path.with_name("lock.json")
    with RecorderLock(path), pytest.raises(AliveError, match="the recorder of run"):
        StoredRunLock(run, path).acquire()
    assert not run.exists()
    with StoredRunLock(run, path):
        assert run.exists()


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_it_is_apart_from_the_lock_of_the_run_and_excludes_another_thread_until_its_release(path):
    before = os.listdir("/proc/self/fd")
    first, second, ends = RecorderLock(path), RecorderLock(path), []
    with RunLock(path.with_name("lock.json")):
        first.acquire()

        def take():
            second.acquire(timeout_s=60)
            ends.append("taken")

        thread = threading.Thread(target=take)
        thread.start()
        time.sleep(0.1)
        assert not ends
        with pytest.raises(AliveError, match=rf"^the recorder of run 3f2a9c51… is still running: pid {os.getpid()} on"):
            RecorderLock(path).acquire(timeout_s=0.05)
        first.release()
        thread.join(60)
        assert ends == ["taken"] and not second.was_forced
        second.check()
        second.release()
    assert os.listdir(path.parent) == [] and os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_a_recorder_that_is_suspended_is_killed_and_its_child_holds_nothing(path, start, monkeypatch, has_pidfd):
    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    holder = start(HOLD, path, RECORDER)
    holder.process.send_signal(signal.SIGSTOP)
    lock = RecorderLock(path)
    begun = time.monotonic()
    lock.acquire(timeout_s=0.3)
    assert time.monotonic() - begun >= 0.3
    assert holder.process.wait(60) == -signal.SIGKILL and not lock.was_forced
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()


def test_a_recorder_that_makes_way_in_time_is_not_killed(path, start):
    holder = start(HOLD, path, RECORDER)
    threading.Timer(0.2, holder.make_way).start()
    lock = RecorderLock(path)
    lock.acquire(timeout_s=60)
    assert holder.process.wait(60) == 0
    lock.release()


def test_a_process_that_is_not_a_recorder_is_not_killed(path, start):
    holder = start(HOLD, path)
    with pytest.raises(AliveError, match=f"pid {holder.pid} on host {socket.gethostname()}"):
        RecorderLock(path).acquire(timeout_s=0)
    assert holder.is_alive()


def test_a_process_that_has_the_holder_s_id_by_now_is_not_killed(path, start):
    """Nor one that has it in another container."""
    start(HOLD, path)
    other = start(WAIT, path, RECORDER)
    change(path, pid=other.pid)
    with pytest.raises(AliveError):
        RecorderLock(path).acquire(timeout_s=0)
    assert other.is_alive()


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"kernel": "another"}])
def test_a_recorder_elsewhere_is_not_killed(path, start, changes):
    holder = start(HOLD, path, RECORDER)
    change(path, **changes)
    with pytest.raises(AliveError):
        RecorderLock(path).acquire(wait=False, timeout_s=0)
    assert holder.is_alive()


def test_where_processes_cannot_be_looked_at_none_is_killed(path, start, monkeypatch, tmp_path):
    holder = start(HOLD, path, RECORDER)
    monkeypatch.setattr(recorder_lock, "_PROC", tmp_path)
    with pytest.raises(AliveError):
        RecorderLock(path).acquire(timeout_s=0)
    assert holder.is_alive()


def test_a_recorder_that_has_died_keeps_nobody_waiting(path, start):
    holder = start(HOLD, path, RECORDER)
    holder.process.kill()
    holder.process.wait()
    lock = RecorderLock(path)
    lock.acquire(timeout_s=0)
    assert not lock.was_forced
    lock.release()


def test_without_locks_of_the_file_system_a_silent_recorder_is_killed_before_it_is_taken_over(path, start, monkeypatch):
    holder = start(HOLD, path, RECORDER)
    holder.process.send_signal(signal.SIGSTOP)

    def fails(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fails)
    lock = RecorderLock(path, stale_after_s=0.2, beat_s=0.01)
    lock.acquire(timeout_s=0.1)
    assert lock.was_forced and holder.process.wait(60) == -signal.SIGKILL
    lock.release()
