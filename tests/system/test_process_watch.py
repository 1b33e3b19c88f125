"""A child watches its parent, which dies in many ways."""

import os
import signal
import subprocess
import sys

import pytest

from ksuit_runner.system import process_watch
from ksuit_runner.system.process_watch import ProcessWatch

PARENT = """
import os, resource, signal, subprocess, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], start_new_session=True)
sys.stdin.readline()
number = int(sys.argv[2])
os._exit(number) if number >= 0 else os.kill(os.getpid(), -number)
"""
CHILD = """
import os, sys
from ksuit_runner.system.process_watch import ProcessWatch
watch = ProcessWatch(int(sys.argv[1]))
print(watch.is_gone(), watch.reason(), flush=True)
print(watch.is_gone(timeout_s=60), watch.reason(), flush=True)
watch.close()
print(watch.is_gone(), watch.reason(), flush=True)
"""
WITHOUT_PIDFD = "import os; del os.pidfd_open" + CHILD
REASONS = {
    -signal.SIGKILL: "SIGKILL",
    -signal.SIGSEGV: "SIGSEGV",
    -signal.SIGRTMAX: "SIGRTMAX",
    -(signal.SIGRTMIN + 3): f"signal {signal.SIGRTMIN + 3}",
    3: "exit status 3",
    0: "exit status 0",
}
KERNEL = tuple(int(part) for part in os.uname().release.split(".")[:2])
"""Since 6.15 a reason that the parent of a process has asked for is still known."""


def watched(child: str, end: int, *under: str) -> list[str]:
    """Return what a child says about its parent: while that lives, after its end, and after the watch."""
    command = [*under, sys.executable, "-c", PARENT, child, str(end)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        first = process.stdout.readline()
        process.stdin.close()
        return [first.strip(), *process.stdout.read().splitlines()]


@pytest.mark.parametrize("end", REASONS)
def test_the_reason_is_known_while_nobody_has_asked_for_it(end):
    assert watched(CHILD, end) == ["False None", *[f"True {REASONS[end]}"] * 2]


def test_without_pidfds_a_child_knows_its_parent():
    assert watched(WITHOUT_PIDFD, -signal.SIGKILL) == ["False None", *["True SIGKILL"] * 2]


def test_the_reason_is_known_also_when_the_shell_has_asked_for_it_where_the_kernel_keeps_it():
    """Else it depends on who comes first."""
    said = watched(CHILD, 3, "sh", "-c", '"$@"; true', "sh")
    assert said[0] == "False None" and said[1] == said[2]
    assert said[1] in ("True exit status 3", *["True None"] * (KERNEL < (6, 15)))


def test_a_process_that_has_ended_before_is_gone_for_an_unknown_reason():
    process = subprocess.Popen(["true"])
    process.wait()
    watch = ProcessWatch(process.pid)
    assert watch.is_gone() and watch.is_gone(60) and watch.reason() is None
    watch.close()


def test_a_process_that_was_a_zombie_is_gone_for_the_reason_that_it_had():
    process = subprocess.Popen(["false"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    before = os.listdir("/proc/self/fd")
    watch = ProcessWatch(process.pid)
    process.wait()  # from here on, only a kernel that keeps the reason knows it
    assert watch.is_gone() and watch.reason() == ("exit status 1" if KERNEL >= (6, 15) else None)
    watch.close()
    watch.close()
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def child():
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def tables(monkeypatch, tmp_path, child):
    """A process table and cgroups in a folder, in which the child is the only process."""
    (tmp_path / "proc" / str(child.pid)).mkdir(parents=True)
    (tmp_path / "proc" / str(child.pid) / "stat").symlink_to(f"/proc/{child.pid}/stat")
    monkeypatch.setattr(process_watch, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(process_watch, "_CGROUPS", tmp_path / "cgroup")
    return tmp_path


@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("4:memory:/job\n0::/", "memory/job/memory.oom_control"),
        ("4:memory:/docker/f00\n0::/", "memory/memory.oom_control"),
        ("0::/job:1/step", "job:1/step/memory.events"),
        ("0::/", "memory.events"),
        ("0::/../../job", "memory.events"),
    ],
)
@pytest.mark.parametrize(
    ("number", "kills", "reason"),
    [
        (signal.SIGKILL, 4, "out of memory (SIGKILL)"),
        (signal.SIGKILL, 3, "SIGKILL"),
        (signal.SIGTERM, 4, "SIGTERM"),  # a worker of it was killed for want of memory
    ],
)
def test_a_process_that_was_killed_for_want_of_memory(tables, child, group, file, number, kills, reason):
    path = tables / "cgroup" / file
    path.parent.mkdir(parents=True)
    path.write_text("low 0\noom 9\noom_kill 3\n")
    (tables / "proc" / str(child.pid) / "cgroup").write_text(group)
    watch = ProcessWatch(child.pid)
    path.write_text(f"low 0\noom 10\noom_kill {kills}\n")
    child.send_signal(number)
    assert watch.is_gone(60) and watch.reason() == reason
    watch.close()


def test_memory_that_ran_out_is_a_reason_also_without_a_signal(tables, child, monkeypatch):
    path = tables / "cgroup" / "memory.events"
    path.parent.mkdir()
    path.write_text("oom_kill 0\n")
    (tables / "proc" / str(child.pid) / "cgroup").write_text("0::/\n")
    watch = ProcessWatch(child.pid)
    monkeypatch.setattr(ProcessWatch, "_wait_status", lambda self: None)
    path.write_text("oom_kill 1\n")
    child.kill()
    assert watch.is_gone(60) and watch.reason() == "out of memory"
    watch.close()


@pytest.mark.parametrize("text", [None, "", "\n", "1 (sh) Z 1", "1 (sh) " + "Z " * 60, b"\xff" * 999])
def test_what_the_tables_say_is_not_trusted(tables, child, text):
    folder = tables / "proc" / str(child.pid)
    (folder / "stat").unlink()
    for path in (folder / "stat", folder / "cgroup") if text is not None else ():
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    watch = ProcessWatch(child.pid)
    assert not watch.is_gone()
    child.kill()
    assert watch.is_gone(60) and watch.reason() is None
    watch.close()


@pytest.mark.parametrize(
    ("later", "status", "reason"), [(0, "256", "exit status 1"), (1, "256", None), (0, "127", None)]
)
def test_the_status_of_another_process_or_that_is_none_is_not_taken(tables, child, later, status, reason):
    watch = ProcessWatch(child.pid)
    stat = tables / "proc" / str(child.pid) / "stat"
    fields = stat.read_text().split()
    stat.unlink()
    fields[2], fields[21], fields[51] = "Z", str(int(fields[21]) + later), status
    stat.write_text(" ".join(fields))
    child.kill()
    assert watch.is_gone(60) and watch.reason() == reason
    watch.close()
