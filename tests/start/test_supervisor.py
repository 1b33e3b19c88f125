"""The process that starts the ranks: signals, restarts, orphans; with ranks that train nothing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ksuit_runner.start import supervisor
from ksuit_runner.start.supervisor import Lost, Supervisor

ROOT = Path(__file__).parents[2]
# A rank executes the code that is its task: with its number, the number of the attempt, a folder, and these functions.
RANK = """
import json, os, signal, sys, time
from multiprocessing.connection import Connection
from pathlib import Path
import msgspec
from ksuit_runner.start.supervised_rank import Report
from ksuit_runner.system.detached_process import accept_signals, end_with
accept_signals()
connection = Connection(int(sys.argv[1]))
task = json.loads(connection.recv_bytes())
end_with(int(sys.argv[2]), connection)
rank, folder = int(os.environ["RANK"]), Path(task["folder"])
attempt = len(list(folder.glob(f"begun{rank}-*")))
(folder / f"begun{rank}-{attempt}").touch()
got = []
def end(status, text="", blames_others=False):
    connection.send_bytes(msgspec.msgpack.encode(Report(blames_others, (text or str(got)).encode())))
    os._exit(status)
def ready(name="ready"):
    (folder / f"{name}{rank}").touch()
    while len(list(folder.glob(f"{name}*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
def take(*numbers):
    for number in numbers:
        signal.signal(number, lambda number, frame: got.append(number))
def wait(count):
    while len(got) < count:
        time.sleep(0.01)
    time.sleep(0.2)
exec(task["code"])
"""


@pytest.fixture
def ranks(tmp_path):
    """Return what runs ranks with some code, and returns how they have ended and what was said meanwhile."""

    def run(code, size=2, max_restarts=0):
        said: list[str] = []
        task = json.dumps({"code": code, "folder": str(tmp_path)}).encode()
        supervisor = Supervisor([sys.executable, "-c", RANK], size, max_restarts, said.append)
        return supervisor.run(task), said

    before = psutil.Process().children(recursive=True)
    yield run
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    assert left == []


def texts(ended):
    return [None if report is None else report.content.decode() for report in ended.reports]


def test_ranks_know_their_places_and_report(ranks, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(supervisor, "core_count", lambda: 7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b,2")  # of parts of GPUs, CUDA shows the first one only
    code = """
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
names += ("CUDA_VISIBLE_DEVICES", "MASTER_PORT")
end(0, " ".join(os.environ[name] for name in names) + " " * 1_000_000 * rank)"""
    ended, said = ranks(code, size=3)
    places = [text.split() for text in texts(ended)]
    assert [place[:-1] for place in places] == [
        [str(n), str(n), "3", "3", "127.0.0.1", "2", gpu] for n, gpu in enumerate(["MIG-a", "MIG-b", "MIG-a,MIG-b,2"])
    ]
    assert len({place[-1] for place in places}) == 1
    assert (ended.statuses, ended.lost, ended.signal, said) == ([0, 0, 0], None, None, [])


def test_a_signal_reaches_every_rank_once(ranks):
    code = """
take(signal.SIGTERM, signal.SIGUSR1)
ready()
if rank == 1:
    os.kill(os.getppid(), signal.SIGUSR1)
    wait(1)
    os.kill(os.getppid(), signal.SIGTERM)  # too late: it ends already
wait(1)
end(128 + got[0])"""
    ended, _ = ranks(code, max_restarts=3)
    assert texts(ended) == [f"[{int(signal.SIGUSR1)}]"] * 2
    assert (ended.statuses, ended.signal, ended.lost) == ([128 + signal.SIGUSR1] * 2, signal.SIGUSR1, None)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_signal_that_ends_one_rank_before_it_can_tell_reaches_the_others(ranks):
    code = """
take(signal.SIGTERM) if rank == 0 else None
ready()
os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else wait(1)
end(128 + signal.SIGTERM)"""
    ended, _ = ranks(code, max_restarts=3)
    assert (ended.statuses, ended.signal) == ([143, -signal.SIGTERM], signal.SIGTERM)


def test_the_second_interrupt_ends_ranks_that_do_not_react(ranks, monkeypatch):
    monkeypatch.setattr(supervisor, "_AT_ONCE_S", 0.3)
    code = """
take(signal.SIGINT)
ready()
if rank == 1:
    os.kill(os.getppid(), signal.SIGINT)
    wait(1)
    os.kill(os.getppid(), signal.SIGINT)
time.sleep(60)"""
    started = time.monotonic()
    ended, _ = ranks(code, max_restarts=3)
    assert time.monotonic() - started < 20
    assert (ended.statuses, ended.signal, ended.lost) == ([-signal.SIGKILL] * 2, signal.SIGINT, None)


@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_start_again_when_one_is_killed(ranks, victim, tmp_path):
    code = f"""
import subprocess
(folder / f"worker{{rank}}-{{attempt}}").write_text(str(subprocess.Popen(["sleep", "60"]).pid))
ready(f"attempt{{attempt}}-")
if rank == {victim} and attempt < 2:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60) if attempt < 2 else end(0, "done")"""
    ended, said = ranks(code, max_restarts=2)
    assert texts(ended) == ["done", "done"]
    again = f"rank {victim} was killed (SIGKILL): all ranks start again"
    assert said == [f"{again} (1 of at most 2 times)", f"{again} (2 of at most 2 times)"]
    workers = [int(path.read_text()) for path in tmp_path.glob("worker*")]
    assert len(workers) == 6
    assert not psutil.wait_procs([psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)], timeout=10)[1]


def test_they_start_again_only_so_often(ranks):
    ended, said = ranks("os.abort() if rank == 1 else time.sleep(60)", max_restarts=1)
    assert ended.lost == Lost("rank 1 was killed (SIGABRT)", 128 + signal.SIGABRT)
    assert ended.statuses[1] == -signal.SIGABRT
    assert len(said) == 1


def test_an_error_is_no_reason_to_start_again(ranks):
    code = """
if rank == 1:
    end(1, "the cause")
time.sleep(0.5)
end(1, "of the other", blames_others=True)"""
    ended, said = ranks(code, max_restarts=3)
    assert texts(ended) == ["of the other", "the cause"]
    assert (ended.statuses, ended.lost, said) == ([1, 1], None, [])
    ended, said = ranks("os._exit(3) if rank == 1 else end(1, blames_others=True)", max_restarts=3)
    assert (ended.statuses, ended.lost, said) == ([1, 3], None, [])


def test_a_crash_after_the_report_changes_nothing(ranks):
    code = """
connection.send_bytes(msgspec.msgpack.encode(Report(False, b"done")))
os.abort() if rank == 1 else os._exit(0)"""
    ended, said = ranks(code, max_restarts=3)
    assert (texts(ended), ended.lost, said) == (["done", "done"], None, [])


@pytest.mark.parametrize("stuck", ["os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(60)"])
def test_a_rank_that_others_give_up_is_killed_and_all_start_again(ranks, stuck, monkeypatch):
    monkeypatch.setattr(supervisor, "_OTHERS_S", 60 if "SIGSTOP" in stuck else 0.5)
    code = f"""
if attempt == 0:
    ready()
    {stuck} if rank == 0 else time.sleep(0.2)
    end(1, blames_others=True)
end(0, "done")"""
    ended, said = ranks(code, max_restarts=1)
    assert texts(ended) == ["done", "done"]
    assert said == ["rank 0 did not react any more and was killed: all ranks start again (1 of at most 1 times)"]


def test_what_a_rank_has_still_to_record_is_waited_for(ranks, monkeypatch):
    monkeypatch.setattr(supervisor, "_OTHERS_S", 0.2)
    code = """
if rank == 1:
    end(1, "the cause")
time.sleep(1)
end(1, "recorded", blames_others=True)"""
    ended, _ = ranks(code)
    assert texts(ended) == ["recorded", "the cause"]


STARTER = """
import json, sys
from ksuit_runner.start.supervisor import Supervisor
code = "ready(); (folder / f'pid{rank}').write_text(str(os.getpid())); time.sleep(60)"
task = json.dumps({"code": code, "folder": sys.argv[2]}).encode()
Supervisor([sys.executable, "-c", sys.argv[1]], 2, 3, print).run(task)
"""


def test_no_rank_outlives_the_process_that_has_started_it(tmp_path):
    starter = subprocess.Popen([sys.executable, "-c", STARTER, RANK, str(tmp_path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"pid{n}").exists() and (tmp_path / f"pid{n}").read_text() for n in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        processes = [psutil.Process(int((tmp_path / f"pid{n}").read_text())) for n in (0, 1)]
    finally:
        starter.kill()
        starter.wait()
    assert not psutil.wait_procs(processes, timeout=10)[1]
