"""Runs the command line in processes of its own, as a user does, and reads the files they leave."""

import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import psutil

from ksuit_runner.record.journal import Journal, JournalReader
from ksuit_runner.tracker.mlflow_names import metric_key

REPOSITORY = Path(__file__).parents[1]
SMALL = ("model=linear", "trainer.max_epochs=4")
# Unread output must not block a run: a pipe holds 64 KiB by default, and Linux grants a mebibyte.
PIPE_BYTES = 1 << 20
MEASURED = (
    "*_per_second",
    "data_wait_fraction",
    "peak_memory_gb",
    "time/*",
    "system/*",
    "utilization",
)  # patterns of their keys


class Process(Protocol):
    """What a started command line is: ``subprocess.Popen``, or one of ``preloaded``."""

    stdout: Any

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float = ...) -> int: ...
    def communicate(self, *, timeout: float = ...) -> tuple[str, None]: ...


_started: list[Process] = []


def start(output_dir: Path, *arguments: str, cwd: Path = REPOSITORY, under: Sequence[str] = ()) -> subprocess.Popen:
    """Start the command line, under another command if one is given."""
    command = [*under, sys.executable, "-m", "ksuit_runner", f"output_dir={output_dir}", *arguments]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "pipesize": PIPE_BYTES}
    process = subprocess.Popen(command, cwd=cwd, env=environment(), **output)
    remember(process)
    return process


def remember(process: Process) -> None:
    """Have a process ended after the test."""
    _started.append(process)


def environment() -> dict[str, str]:
    """Return the environment of the command line, without the time-outs that a tracker here has set for MLflow."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    return found | {"NO_COLOR": "1", "COLUMNS": "200"}


def end_started() -> None:
    """End the processes that a failed test has left."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for part in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.NoSuchProcess):
                        part.kill()
            process.kill()
        if process.stdout is not None:
            process.stdout.close()
        process.wait()


def ksuit(output_dir: Path, *arguments: str, status: int = 0, cwd: Path = REPOSITORY) -> str:
    process = start(output_dir, *arguments, cwd=cwd)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


def read_until(process: Process, *texts: str) -> str:
    """Read the output of a process until it contains all these texts, and return it."""
    output = ""
    while not all(text in output for text in texts):
        line = process.stdout.readline()
        assert line, output
        output += line
    return output


def wait_until(condition: Callable[[], object], process: Process, seconds: float = 120) -> None:
    """Wait until a condition holds while a process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def run_dirs(output_dir: Path) -> list[Path]:
    """Return the folders of all runs, oldest first, without the parents of sweeps."""
    sweeps = {path.name for path in (output_dir / "sweeps").glob("*")}
    found = [path for path in (output_dir / "runs").iterdir() if path.name not in sweeps]
    return sorted(found, key=lambda path: path.stat().st_ctime)


def run_dir(output_dir: Path) -> Path:
    (only,) = run_dirs(output_dir)
    return only


def stop_at(process: Process, output_dir: Path, update: int, number: int = signal.SIGKILL) -> str:
    """Send a signal as soon as the run has logged an update at or after the given one."""
    wait_until(lambda: last_step(output_dir) >= update, process)
    return end_by(process, number)


def recorders_of(pid: int) -> list[psutil.Process]:
    """Return the recorders that a process has started, itself or by a process that forks them for it."""
    return [child for child in psutil.Process(pid).children(recursive=True) if is_recorder(child)]


def is_recorder(process: psutil.Process) -> bool:
    """Whether a process below one that trains is its recorder: no other one has a session of its own."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        return os.getsid(process.pid) == process.pid and process.status() != psutil.STATUS_ZOMBIE
    return False


def end_by(process: Process, number: int) -> str:
    """Send a signal, and return the output once the process and its recorder have ended."""
    recorders = recorders_of(process.pid)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert not psutil.wait_procs(recorders, timeout=30)[1]
    return output


def lose_machine(process: Process) -> None:
    """Kill a process and its recorder, which cannot notice the death of the other."""
    recorders = recorders_of(process.pid)
    for recorder in recorders:
        recorder.suspend()
    process.kill()
    for recorder in recorders:
        recorder.kill()
    process.communicate(timeout=60)


def interrupt_again(process: Process) -> None:
    """Send a second SIGINT after the process has received the first: two pending ones would be one."""
    status = Path(f"/proc/{process.pid}/status")
    wait_until(lambda: not any(_has_sigint(line) for line in status.read_text().splitlines()), process)
    time.sleep(0.5)
    assert process.poll() is None  # it would finish its update
    process.send_signal(signal.SIGINT)


def _has_sigint(line: str) -> bool:
    return line.startswith(("SigPnd", "ShdPnd")) and bool(int(line.split()[1], 16) & 1 << (signal.SIGINT - 1))


def last_step(output_dir: Path) -> int:
    steps = [step for path in output_dir.glob("runs/*/metrics.jsonl") for step, *_ in [tail(path)]]
    return max(steps, default=-1)


def tail(path: Path) -> tuple[int]:
    lines = path.read_bytes().splitlines()
    whole = [line for line in lines if line.endswith(b"}}")]
    return (int(whole[-1].split(b'"s":')[1].split(b",")[0]) if whole else -1,)


def is_measured(key: str) -> bool:
    """Whether the values of a metric differ from run to run, because they are times and the like."""
    return any(fnmatchcase(key, pattern) for pattern in MEASURED)


def journal(directory: Path) -> dict[tuple[str, int], float | None]:
    """Return all points, without the values of timings; checks that there are no duplicates."""
    file = Journal(directory / "metrics.jsonl")
    points = [point for points, _ in file.read() for point in points]
    file.close()
    found = {(point.key, point.step): None if is_measured(point.key) else point.value for point in points}
    assert len(found) == len(points)
    return found


def mlflow_points(output_dir: Path) -> dict[tuple[str, int], float | None]:
    """Return all points by their own keys, without the values of timings; checks that there are no duplicates."""
    rows = query(output_dir, "select key, step, value from metrics")
    found = {(metric_key(key), step): None if is_measured(key) else value for key, step, value in rows}
    assert len(found) == len(rows)
    return found


def query(output_dir: Path, sql: str) -> list[tuple]:
    connection = sqlite3.connect(output_dir / "mlflow.db")
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def checkpoint_bytes(directory: Path) -> dict[str, str]:
    """Return a hash of every file of every checkpoint, except for manifests, which depend on the output folder."""
    files = (directory / "artifacts" / "checkpoints").glob("E*/*")
    return {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "manifest.json"
    }


def logged_files(directory: Path) -> dict[tuple[str, int], str]:
    """Return a hash of every file that was logged and not measured, by key and update; checks that none is twice."""
    artifacts = directory / "artifacts"
    listed = [file for line, _ in JournalReader(directory / "metrics.jsonl").lines() for file in line.files]
    found = {(file.key, file.step): artifacts / file.path for file in listed}
    assert len(found) == len(listed)
    named = {path.name for path in found.values()}
    kinds = {path.parent for path in found.values()}
    there = {path.name for kind in kinds for path in kind.iterdir() if path.is_file() and path.suffix != ".webp"}
    assert there == named
    return {
        (key, step): "" if is_measured(key.partition("/")[2]) else hashlib.sha256(path.read_bytes()).hexdigest()
        for (key, step), path in found.items()
    }
