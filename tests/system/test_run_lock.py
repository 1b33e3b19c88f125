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
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
import pytest

from ksuit_runner.errors import AliveError, ResumeError, TakenOverError
from ksuit_runner.system import lock_file, run_lock
from ksuit_runner.system.run_lock import LockView, RunLock, seems_held

RUN_ID = "3f2a9c51e0d84b7aa1b2c3d4e5f60718"

HOLD = """
import sys
from pathlib import Path
from ksuit_runner.errors import ResumeError, TakenOverError
from ksuit_runner.system.run_lock import RunLock

print("ready", flush=True)
sys.stdin.readline()
try:
    with RunLock(Path(sys.argv[1])) as lock:
        print("held", flush=True)
        sys.stdin.readline()
        lock.check()
except TakenOverError:
    print("lost", flush=True)
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

    def proceed(self) -> None:
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


def leave_behind(path: Path, **changes: object) -> None:
    """Leave the lock of a process that has died, or is suspended, on some host."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with RunLock(path):
        holder = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(holder))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_the_file_names_the_holder_and_goes_with_it(path):
    lock = RunLock(path)
    assert not lock.was_forced
    for _ in range(2):
        with lock:
            holder = json.loads(path.read_text())
            assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        assert os.listdir(path.parent) == []


def test_it_goes_also_when_the_run_ends_by_an_error(path):
    with pytest.raises(ZeroDivisionError), RunLock(path):
        raise ZeroDivisionError
    assert not path.exists()


def test_a_run_that_is_alive_is_refused_with_who_holds_it(path, contender):
    holder = contender()
    holder.proceed()
    assert holder.read() == "held"
    with pytest.raises(ResumeError) as caught:
        RunLock(path).acquire()
    pid, host = holder.process.pid, socket.gethostname()
    assert str(caught.value) == f"run 3f2a9c51… is still running: pid {pid} on host {host}"
    holder.proceed()
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
def test_a_killed_run_can_be_resumed_at_once(path, contender, reaped):
    holder = contender()
    holder.proceed()
    assert holder.read() == "held"
    os.kill(holder.process.pid, signal.SIGKILL)
    if reaped:
        holder.process.wait()
    else:
        wait_until(lambda: psutil.Process(holder.process.pid).status() == psutil.STATUS_ZOMBIE)
        # The file is closed when the last thread has ended, and not with the first.
        wait_until(lambda: os.listdir(f"/proc/{holder.process.pid}/task") == [str(holder.process.pid)])
    assert json.loads(path.read_text())["pid"] == holder.process.pid
    with RunLock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_process_that_is_stopped_still_holds_it(path, contender):
    holder = contender()
    holder.proceed()
    assert holder.read() == "held"
    holder.process.send_signal(signal.SIGSTOP)
    with pytest.raises(ResumeError):
        RunLock(path, stale_after_s=0).acquire()


def test_of_several_that_find_a_dead_holder_one_takes_over(path, contender):
    first = contender()
    first.proceed()
    assert first.read() == "held"
    first.kill()
    others = [contender() for _ in range(4)]
    for other in others:
        other.proceed()
    answers = [other.read() for other in others]
    assert answers.count("held") == 1
    winner = others[answers.index("held")].process.pid
    assert all(f"pid {winner} on host" in answer for answer in answers if answer != "held")


def test_many_short_holders_never_overlap(path):
    script = """
import os, sys, time
from pathlib import Path
from ksuit_runner.errors import ResumeError
from ksuit_runner.system.run_lock import RunLock
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


@pytest.mark.parametrize("changes", [{"pid": 1}, {"pid": 4_000_000}, {"host": "elsewhere"}])
def test_a_dead_holder_on_this_kernel_keeps_nobody_waiting_whatever_its_process_id(path, changes):
    leave_behind(path, **changes)
    with RunLock(path) as lock:
        assert not lock.was_forced
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("changes", [{}, {"pid": 4_000_000}, {"host": "elsewhere"}, {"kernel": "another"}])
@pytest.mark.parametrize("step_s", [0, -3600, 3600])
def test_a_live_holder_is_refused_whatever_its_process_table_and_the_clocks_say(path, changes, step_s):
    """In a container of another process table, or of another name; on a host that shares only the files."""
    with RunLock(path, beat_s=0.02):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        os.utime(path, (time.time() + step_s,) * 2)
        with pytest.raises(ResumeError, match="is still running"):
            RunLock(path, stale_after_s=0.5, beat_s=0.2).acquire()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_of_the_file_system_a_holder_is_alive_while_it_touches_its_file(path, monkeypatch, code):
    monkeypatch.setattr(fcntl, "flock", partial(fails_with, code))
    with RunLock(path, beat_s=0.02), pytest.raises(ResumeError):
        RunLock(path, stale_after_s=0.2).acquire()
    assert os.listdir(path.parent) == []
    leave_behind(path)
    with RunLock(path, stale_after_s=0.2, beat_s=0.01) as lock:
        assert lock.was_forced


def fails_with(code, *arguments):
    raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("step_s", [0, -3600, 3600])
def test_a_silent_holder_elsewhere_is_waited_for_and_then_taken_over(path, step_s, caplog):
    leave_behind(path, host="elsewhere", kernel="another", pid=12)
    os.utime(path, (time.time() + step_s,) * 2)
    with pytest.raises(ResumeError, match="pid 12 on host elsewhere"):
        RunLock(path).acquire(wait=False)
    assert seems_held(path) == (step_s >= 0)
    with RunLock(path, stale_after_s=0.2, beat_s=0.04) as lock:
        assert lock.was_forced
    assert "pid 12 on host elsewhere: waiting for a sign of life" in caplog.text


def test_of_several_that_wait_for_a_silent_holder_one_takes_over(path):
    leave_behind(path, host="elsewhere", kernel="another")
    ends: list[str] = []

    def take():
        try:
            with RunLock(path, stale_after_s=0.2, beat_s=0.01):
                time.sleep(1)
                ends.append("held")
        except ResumeError:
            ends.append("refused")

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == ["held", "refused", "refused", "refused"]


def test_who_is_suspended_can_be_taken_over_from_elsewhere_and_stops_writing_at_once(path, contender, monkeypatch):
    suspended = contender()
    suspended.proceed()
    assert suspended.read() == "held"
    suspended.process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with RunLock(path, stale_after_s=0.1, beat_s=0.01) as lock:
        assert lock.was_forced
        suspended.process.send_signal(signal.SIGCONT)
        suspended.proceed()
        assert suspended.read() == "lost"
        lock.check()
    assert os.listdir(path.parent) == []


def test_who_was_taken_over_knows_so_also_after_its_successor_has_ended(path):
    lock = RunLock(path, beat_s=0.01)
    lock.acquire()
    path.unlink()
    assert lock.lost.wait(60)
    with pytest.raises(TakenOverError):
        lock.check()
    lock.release()
    assert os.listdir(path.parent) == []
    with lock:  # taken anew, it is its own again
        lock.check()


def test_numbers_of_files_that_change_are_no_takeover(path):
    with RunLock(path) as lock:
        for suffix in ("a", "b"):
            copy = path.with_name(suffix)
            copy.write_text(path.read_text())
            copy.replace(path)
            lock.check()


def test_what_was_lost_once_stays_lost(path):
    with RunLock(path) as lock:
        moved = path.rename(path.with_name("moved"))
        with pytest.raises(TakenOverError):
            lock.check()
        moved.rename(path)  # somebody else may have held it meanwhile
        with pytest.raises(TakenOverError):
            lock.check()


def test_a_holder_that_had_no_lock_of_the_kernel_is_not_dead_because_that_is_free(path):
    leave_behind(path, has_kernel_lock=False)
    with pytest.raises(AliveError):
        RunLock(path).acquire(wait=False)
    with RunLock(path, stale_after_s=0.1, beat_s=0.01) as lock:
        assert lock.was_forced


def test_what_cannot_be_read_in_its_place_is_a_takeover(path, monkeypatch):
    for error in (None, errno.ESTALE):
        with RunLock(path) as lock:
            moved = path.rename(path.with_name("moved"))
            path.symlink_to(moved)  # to the very file, which no process would have put there
            if error:
                monkeypatch.setattr(run_lock, "open_stored", partial(fails_with, error))
            with pytest.raises(TakenOverError):
                lock.check()
        path.unlink()


def test_a_file_system_that_is_away_is_no_takeover(path, monkeypatch):
    with RunLock(path) as lock:
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", lambda *_, **__: fails_with(errno.EIO))
            lock.check()
        path.unlink()
        with pytest.raises(TakenOverError):
            lock.check()


def test_a_sign_of_life_that_fails_is_not_the_last(path, monkeypatch):
    with RunLock(path, beat_s=0.001):
        with monkeypatch.context() as patch:
            failed = threading.Event()
            patch.setattr(os, "utime", lambda file: (failed.set(), fails_with(errno.EIO)))
            assert failed.wait(60)
        os.utime(path, (1, 1))
        wait_until(lambda: path.stat().st_mtime > 1)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_lock_that_cannot_be_taken_leaves_nothing_behind(path, monkeypatch, error):
    def fails(*_):
        raise error

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(type(error)) as caught:
        RunLock(path).acquire()
    assert os.listdir(path.parent) == [] and os.listdir("/proc/self/fd") == before
    assert getattr(caught.value, "filename", str(path)) == str(path)


def test_it_leaves_no_file_open(path):
    before = os.listdir("/proc/self/fd")
    for _ in range(2):
        with RunLock(path) as lock:
            assert seems_held(path)
            with pytest.raises(ResumeError):
                RunLock(path).acquire()
    lock.release()
    assert os.listdir("/proc/self/fd") == before


def test_locks_that_fail_for_another_reason_than_the_file_system_are_an_error(path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", partial(fails_with, errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        RunLock(path).acquire()


def test_without_an_id_of_the_kernel_its_host_stands_for_it(path, monkeypatch):
    monkeypatch.setattr(Path, "read_text", partial(fails_with, errno.ENOENT))
    assert lock_file.kernel.__wrapped__() == socket.gethostname()


class Clock(types.SimpleNamespace):
    """Stands for the module ``time`` in ``run_lock``; it goes by what is slept."""

    def __init__(self):
        super().__init__(now=0.0, slept=[], time=time.time)

    def monotonic(self):
        self.now += 0.001  # who only asks for the time comes to an end, too
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


@pytest.mark.parametrize(("age_s", "waited_s"), [(0, 30), (10, 20), (-3600, 30), (3600, 12.5)])
def test_who_is_silent_elsewhere_is_waited_for_until_its_time_is_up_and_for_two_beats_at_least(
    path, monkeypatch, age_s, waited_s
):
    leave_behind(path, kernel="another", has_kernel_lock=False)
    os.utime(path, (time.time() - age_s,) * 2)
    monkeypatch.setattr(run_lock, "time", clock := Clock())
    with RunLock(path):
        pass
    assert sum(clock.slept) == pytest.approx(waited_s, abs=0.5)


def test_a_sign_of_life_is_noticed_at_once(path, monkeypatch):
    leave_behind(path, kernel="another")
    monkeypatch.setattr(run_lock, "time", clock := Clock())
    clock.sleep = lambda seconds: (Clock.sleep(clock, seconds), os.utime(path))
    with pytest.raises(ResumeError, match="is still running"):
        RunLock(path).acquire()
    assert clock.slept == [0.2]


@pytest.mark.parametrize("text", ["", '{"pid": 12', "[]", '{"pid": 12}', "\0" * 99])
def test_a_file_that_names_nobody_holds_nobody_up(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with RunLock(path) as lock:
        assert json.loads(path.read_text())["pid"] == os.getpid() and not lock.was_forced


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EACCES])
def test_a_file_that_cannot_be_removed_holds_nobody_up(path, monkeypatch, code):
    with RunLock(path):
        monkeypatch.setattr(os, "unlink", partial(fails_with, code))
    assert path.read_bytes() == b""
    monkeypatch.undo()
    with RunLock(path) as lock:
        assert not lock.was_forced


def test_a_child_that_lives_longer_does_not_hold_it(path):
    script = """
import os, sys, time
from pathlib import Path
from ksuit_runner.system.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
os.kill(os.getpid(), 9)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.wait()
    try:
        with RunLock(path) as lock:
            assert not lock.was_forced
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_forked_child_does_not_end_what_its_parent_holds(path):
    script = """
import os, sys
from pathlib import Path
from ksuit_runner.system.run_lock import RunLock
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


def test_an_earlier_answer_counts_for_as_long_as_it_may(path):
    lock = RunLock(path, beat_s=60)
    lock.acquire()
    lock.check()
    path.unlink()
    lock.check(at_most_s=60)
    with pytest.raises(TakenOverError):
        lock.check(at_most_s=0)
    with pytest.raises(TakenOverError):
        lock.check(at_most_s=60)  # what is lost stays lost
    lock.release()


def test_the_first_question_is_asked_and_no_answer_counts_at_the_same_instant(path, monkeypatch):
    monkeypatch.setattr(run_lock, "time", types.SimpleNamespace(monotonic=lambda: 1.0))
    for asked_s in (60.0, 0.0):
        with RunLock(path, beat_s=60) as lock:
            if not asked_s:
                lock.check()
            path.unlink()
            with pytest.raises(TakenOverError):
                lock.check(asked_s)


def held_by(contender: Contender, path: Path) -> LockView:
    contender.proceed()
    assert contender.read() == "held"
    return LockView(path, json.loads(path.read_text())["token"])


def test_who_works_for_the_holder_sees_it_live_die_and_be_taken_over(path, contender):
    before = os.listdir("/proc/self/fd")
    holder = contender()
    view = held_by(holder, path)
    view.check()
    assert not view.remove_dead() and path.exists()
    holder.kill()
    view.check()  # nobody has taken it over
    with RunLock(path) as lock:
        assert lock.token != view._token
        assert not view.remove_dead(is_known_dead=True)
        view.check(at_most_s=60)
        with pytest.raises(TakenOverError, match="another process has resumed run 3f2a9c51"):
            view.check()
        assert view.lost.is_set()
        lock.check()
    view.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_dead_holder_is_removed_once_and_only_where_it_is_still_in_place(path, contender):
    holder = contender()
    view = held_by(holder, path)
    holder.kill()
    assert view.remove_dead() and os.listdir(path.parent) == []
    assert not view.remove_dead(is_known_dead=True)
    with pytest.raises(TakenOverError):
        view.check()


def test_a_lock_that_is_released_was_not_left_by_a_dead_holder(path):
    with RunLock(path) as lock:
        view = LockView(path, lock.token)
        view.check()
    assert not view.remove_dead()
    with pytest.raises(TakenOverError):
        view.check()


def test_a_later_file_is_not_taken_for_that_of_the_holder_when_its_inode_number_is_used_again(path):
    """The file that the view has seen is kept, or the file system gives its number to one of the next."""
    with RunLock(path) as lock:
        view = LockView(path, lock.token)
        view.check()
    for _ in range(20):
        with RunLock(path):
            assert not view._is_in_place()


def test_a_view_finds_the_holder_again_where_the_numbers_of_files_change(path):
    before = os.listdir("/proc/self/fd")
    with RunLock(path) as lock:
        view = LockView(path, lock.token)
        for suffix in ("a", "b"):
            copy = path.with_name(suffix)
            copy.write_text(path.read_text())
            copy.replace(path)
            view.check()
        view.close()
        view.check()
        view.close()
    assert os.listdir("/proc/self/fd") == before


def test_of_a_holder_whom_the_kernel_does_not_know_the_caller_says_that_it_is_dead(path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", partial(fails_with, errno.ENOLCK))
    leave_behind(path)
    view = LockView(path, json.loads(path.read_text())["token"])
    assert not view.remove_dead() and path.exists()
    assert view.remove_dead(is_known_dead=True) and not path.exists()


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("elsewhere"), os.mkfifo])
def test_something_else_in_the_place_of_a_lock_is_a_takeover_for_a_view_and_stays(path, make):
    path.parent.mkdir()
    make(path)
    view = LockView(path, "token")
    assert not view.remove_dead(is_known_dead=True)
    with pytest.raises(TakenOverError):
        view.check()
    assert os.listdir(path.parent) == [path.name]


def test_a_taker_and_the_removal_of_a_dead_holder_do_not_meet(path, monkeypatch):
    """Whoever takes the lock while its dead holder is removed has it afterwards."""
    leave_behind(path)
    view = LockView(path, json.loads(path.read_text())["token"])
    taker = RunLock(path)
    thread = threading.Thread(target=taker.acquire)

    def look(path):
        seen = lock_file.see(path)
        thread.start()
        time.sleep(0.2)  # enough to take it, if it were not excluded
        return seen

    with monkeypatch.context() as patch:
        patch.setattr(run_lock, "see", lambda path: look(path) if not thread.ident else lock_file.see(path))
        assert view.remove_dead()
        thread.join()
    taker.check()
    taker.release()
