"""One device per process: real processes that claim devices, hold them, and are killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from ksuit_runner.errors import ConfigError
from ksuit_runner.launchers.base import Launcher, local_cap
from ksuit_runner.record.stored_run import Launch
from ksuit_runner.sweep.job_queue import run_jobs
from ksuit_runner.sweep.run_job import JobResult, JobTask
from ksuit_runner.system.gpus import visible_gpus
from ksuit_runner.system.signals import Interruption
from ksuit_runner.tracker.base import EndStatus

CLAIM = """
import os, sys
from pathlib import Path
from ksuit_runner.sweep.gpu_lock import claim_devices
folder = Path(sys.argv[1])
files = [(device, folder / f"device-{device}.lock") for device in "03"]
count = int(sys.argv[3])
print(claim_devices(files, count, timeout_s=float(sys.argv[2])), os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
print(claim_devices(files, count, timeout_s=0), flush=True)
sys.stdin.read()
"""


def claim(folder: Path, timeout_s: float = 0.0, count: int = 1) -> tuple[subprocess.Popen, list[str]]:
    command = [sys.executable, "-c", CLAIM, str(folder), str(timeout_s), str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().split()


def test_each_process_has_a_device_of_its_own_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    processes = []
    try:
        for expected in (["0", "0"], ["3", "3"], ["None", "None"]):
            process, found = claim(tmp_path)
            processes.append(process)
            assert found == expected
        assert processes[0].stdout.readline().strip() == "0"  # it keeps the one that it has
        assert processes[2].stdout.readline().strip() == "None"  # it has looked for the last time
        processes[0].kill()
        processes[0].wait()
        process, found = claim(tmp_path, timeout_s=20)
        processes.append(process)
        assert found == ["0", "0"]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_job_of_several_ranks_has_all_of_its_devices_or_none(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    processes = []
    try:
        for count, expected in ((1, ["0", "0"]), (2, ["None", "None"]), (1, ["3", "3"])):
            process, found = claim(tmp_path, count=count)
            processes.append(process)
            assert found == expected
        for process in processes:
            process.kill()
            process.wait()
        process, found = claim(tmp_path, timeout_s=20, count=8)  # more than there are
        processes.append(process)
        assert found == ["0,3", "0,3"]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


class Job:
    """A job that ends when it was asked twice."""

    def __init__(self, running, task):
        self.running, self.task, self.asked = running, task, 0
        running.append(task.ranks)

    def done(self):
        self.asked += 1
        if self.asked == 2:
            self.running.remove(self.task.ranks)
        return self.asked >= 2

    def result(self):
        return JobResult(self.task.index, EndStatus.FINISHED)


class FourGpus(Launcher):
    max_jobs = 4
    devices = ("0", "1", "2", "3")

    def __init__(self):
        self.running, self.seen = [], []

    def submit(self, function, task):
        job = Job(self.running, task)
        self.seen.append(tuple(sorted(self.running)))
        return job


def test_no_more_ranks_run_than_there_are_gpus(tmp_path):
    launcher, ended = FourGpus(), []
    tasks = [
        JobTask(index, tmp_path, "sweep", tmp_path, {"ranks": ranks}, Launch("", []), devices=launcher.devices)
        for index, ranks in enumerate([2, 1, 2, 1, 1, 4, 8])
    ]

    def on_end(task, result):
        ended.append(task.index)

    run_jobs(iter(tasks), launcher, Interruption(), lambda task: None, on_end, lambda task, reason: None)
    assert sorted(ended) == list(range(7))
    assert launcher.seen == [(2,), (1, 2), (2,), (1, 2), (1, 1, 2), (4,), (8,)]  # the last one takes what there is


def test_as_many_jobs_as_there_are_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_gpus() == ["2", "5"]
    assert local_cap(None, ["2", "5"]) == 2
    assert local_cap(1, ["2", "5"]) == 1
    assert local_cap(7, []) == 7
    assert local_cap(3, ["0"]) == 3  # a single GPU is shared
    with pytest.raises(ConfigError, match="launcher.max_jobs: 3 jobs at once need a GPU each, and there are 2"):
        local_cap(3, ["2", "5"])
