import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from ksuit_runner.errors import ResumeError
from ksuit_runner.run_lock import RunLock

RUN_ID = "3f2a9c51e0d84b7aa1b2c3d4e5f60718"

HOLD = """
import sys
from pathlib import Path
from ksuit_runner.errors import ResumeError
from ksuit_runner.run_lock import RunLock

print("ready", flush=True)
sys.stdin.readline()
try:
    with RunLock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except ResumeError as error:
    print(error, flush=True)
"""


class Contender:
    """A process of its own that takes the lock when told, and gives it back when told."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.read() == "ready"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / RUN_ID / "lock.json"


@pytest.fixture
def contender(path: Path) -> Iterator[Callable[[], Contender]]:
    with ExitStack() as stack:

        def start() -> Contender:
            started = Contender(path)
            stack.callback(started.kill)
            return started

        yield start


def write_holder(path: Path, **changes: object) -> None:
    now = time.time()
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": now, "heartbeat": now, **changes}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(holder))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_the_file_names_the_holder_and_goes_with_it(path):
    lock = RunLock(path)
    for _ in range(2):
        with lock:
            holder = json.loads(path.read_text())
            assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
            assert holder["started"] == pytest.approx(psutil.Process().create_time(), abs=2)
        assert os.listdir(path.parent) == []


def test_it_goes_also_when_the_run_ends_by_an_error(path):
    with pytest.raises(ZeroDivisionError), RunLock(path):
        raise ZeroDivisionError
    assert not path.exists()


def test_a_run_that_is_alive_is_refused_with_who_holds_it(path, contender):
    holder = contender()
    holder.go_on()
    assert holder.read() == "held"
    with pytest.raises(ResumeError) as caught:
        RunLock(path).acquire()
    pid, host = holder.process.pid, socket.gethostname()
    assert str(caught.value).startswith(f"run 3f2a9c51… is still running: pid {pid} on host {host}, last sign of life ")
    holder.go_on()
    assert holder.process.wait() == 0
    with RunLock(path):
        pass


def test_a_second_run_in_the_same_process_is_refused_and_leaves_the_lock(path):
    with RunLock(path):
        second = RunLock(path)
        with pytest.raises(ResumeError):
            second.acquire()
        second.release()
        assert path.exists()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_run_can_go_on_at_once(path, contender, reaped):
    holder = contender()
    holder.go_on()
    assert holder.read() == "held"
    os.kill(holder.process.pid, signal.SIGKILL)
    if reaped:
        holder.process.wait()
    else:
        wait_until(lambda: psutil.Process(holder.process.pid).status() == psutil.STATUS_ZOMBIE)
    assert json.loads(path.read_text())["pid"] == holder.process.pid
    with RunLock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_process_that_is_stopped_still_holds_it(path, contender):
    holder = contender()
    holder.go_on()
    assert holder.read() == "held"
    holder.process.send_signal(signal.SIGSTOP)
    with pytest.raises(ResumeError):
        RunLock(path, stale_after_s=0).acquire()


def test_of_several_that_find_a_dead_holder_one_takes_over(path, contender):
    first = contender()
    first.go_on()
    assert first.read() == "held"
    first.kill()
    others = [contender() for _ in range(4)]
    for other in others:
        other.go_on()
    answers = [other.read() for other in others]
    assert answers.count("held") == 1
    winner = others[answers.index("held")].process.pid
    assert all(f"pid {winner} on host" in answer for answer in answers if answer != "held")


def test_many_short_holders_never_overlap(path):
    script = """
import os, sys, time
from pathlib import Path
from ksuit_runner.errors import ResumeError
from ksuit_runner.run_lock import RunLock
path, inside, count = Path(sys.argv[1]), Path(sys.argv[2]), 0
while count < 30:
    try:
        with RunLock(path):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            inside.unlink()
            count += 1
    except ResumeError:
        pass
"""
    arguments = [sys.executable, "-c", script, str(path), str(path.parent.parent / "inside")]
    processes = [subprocess.Popen(arguments) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert not path.exists()


def test_a_process_id_that_was_given_out_again_is_no_holder(path):
    write_holder(path, started=psutil.Process().create_time() - 3600)
    with RunLock(path):
        assert json.loads(path.read_text())["started"] == pytest.approx(psutil.Process().create_time(), abs=2)


def test_another_host_counts_by_its_heartbeat(path):
    write_holder(path, host="elsewhere", heartbeat=time.time() - 100)
    with pytest.raises(ResumeError, match=r"on host elsewhere, last sign of life 10\d s ago"):
        RunLock(path, stale_after_s=1000).acquire()
    with RunLock(path, stale_after_s=30):
        assert json.loads(path.read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("text", ["", '{"pid": 12', "[]", '{"pid": 12}'])
def test_a_file_that_was_never_finished_holds_nobody_up(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with RunLock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_the_heartbeat_goes_on_and_comes_back_when_the_file_is_lost(path):
    with RunLock(path, beat_s=0.01):
        first = json.loads(path.read_text())["heartbeat"]
        wait_until(lambda: json.loads(path.read_text())["heartbeat"] > first)
        path.unlink()
        wait_until(path.exists)
    assert not path.exists()


def test_who_was_taken_over_is_told_and_leaves_the_lock_to_its_successor(path):
    lock = RunLock(path, beat_s=0.01)
    lock.acquire()
    # In one step, as a reader of the file would otherwise see it empty.
    write_holder(path.with_name("next.json"), host="elsewhere")
    path.with_name("next.json").replace(path)
    assert lock.lost.wait(60)
    lock.release()
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_a_forked_child_does_not_end_what_its_parent_holds(path):
    script = """
import os, sys
from pathlib import Path
from ksuit_runner.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
if (child := os.fork()) == 0:
    lock.release()
    os._exit(0)
os.waitpid(child, 0)
print(Path(sys.argv[1]).exists())
lock.release()
print(Path(sys.argv[1]).exists())
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
