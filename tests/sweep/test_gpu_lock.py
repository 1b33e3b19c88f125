"""One device per process: real processes that claim devices, hold them, and are killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from ksuit_runner.errors import ConfigError
from ksuit_runner.launchers.base import local_cap
from ksuit_runner.system.gpus import visible_gpus

CLAIM = """
import os, sys
from pathlib import Path
from ksuit_runner.sweep.gpu_lock import claim_device
folder = Path(sys.argv[1])
files = [(device, folder / f"device-{device}.lock") for device in "03"]
print(claim_device(files, timeout_s=float(sys.argv[2])), os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
print(claim_device(files, timeout_s=0), flush=True)
sys.stdin.read()
"""


def claim(folder: Path, timeout_s: float = 0.0) -> tuple[subprocess.Popen, list[str]]:
    command = [sys.executable, "-c", CLAIM, str(folder), str(timeout_s)]
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


def test_as_many_jobs_as_there_are_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_gpus() == ["2", "5"]
    assert local_cap(None, ["2", "5"]) == 2
    assert local_cap(1, ["2", "5"]) == 1
    assert local_cap(7, []) == 7
    assert local_cap(3, ["0"]) == 3  # a single GPU is shared
    with pytest.raises(ConfigError, match="launcher.max_jobs: 3 jobs at once need a GPU each, and there are 2"):
        local_cap(3, ["2", "5"])
