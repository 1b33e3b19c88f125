"""The check of the order on the disk finds every step that one of two processes leaves out or does too early."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commit_order import OrderedDisk
from disk import Disk, power_cuts
from watched_calls import Step

PROTOCOL = """
import os, subprocess, sys
from pathlib import Path

role, wrong = sys.argv[1:]
run = Path("runs/r")
checkpoints = run / "artifacts" / "checkpoints"
ready, committed, old = (checkpoints / name for name in (".E2_U2_S4.ready", "E2_U2_S4", "E1_U1_S2"))

def sync(*paths):
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)

def remove():
    (old / "model").unlink()
    old.rmdir()

def latest():
    (checkpoints / ".latest.tmp").write_text(committed.name)
    if wrong != "latest is not synced":
        sync(checkpoints / ".latest.tmp")
    os.replace(checkpoints / ".latest.tmp", checkpoints / "latest")
    sync(checkpoints)

if role == "ksuit_runner":
    with open(run / "metrics.jsonl", "ab", 0) as journal:
        os.write(journal.fileno(), b'{"s":2,"x":0.5}\\n')
        written = checkpoints / ".E2_U2_S4.tmp"
        written.mkdir()
        (written / "model").write_text("weights")
        (written / "manifest.json").write_text("{}")
        written.rename(ready)
        recorder = [sys.executable, __file__, "ksuit_runner.recorder", wrong]
        sys.exit(subprocess.run(recorder).returncode)
if wrong == "removed first":
    remove()
if wrong != "the journal is not synced":
    sync(run / "metrics.jsonl")
sync(ready / "manifest.json")
if wrong != "a file is not synced":
    sync(ready / "model")
if wrong != "the folder is not synced":
    sync(ready)
ready.rename(committed)
if wrong == "latest comes first":
    latest()
if wrong != "the parent is not synced":
    sync(checkpoints)
for path in committed.iterdir() if wrong != "not read back" else ():
    path.read_bytes()
latest()
if wrong == "what is needed is removed":
    (committed / "model").unlink()
if wrong != "removed first":
    remove()
if wrong != "the removal is not synced":
    sync(checkpoints)
"""
ERRORS = {
    "the journal is not synced": "its metrics are not on the disk",
    "a file is not synced": "what gets its name is not on the disk",
    "the folder is not synced": "what gets its name is not on the disk",
    "latest is not synced": "what gets its name is not on the disk",
    "latest comes first": "E2_U2_S4 is not on the disk",
    "the parent is not synced": "E2_U2_S4 is not on the disk",
    "not read back": "E2_U2_S4 was not read back",
    "removed first": "it is needed",
    "what is needed is removed": "it is needed",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    old = tmp_path / "disk" / "runs" / "r" / "artifacts" / "checkpoints" / "E1_U1_S2"
    old.mkdir(parents=True)
    (old / "model").write_text("older weights")
    (old.parent / "latest").write_text(old.name)
    (tmp_path / "disk" / "runs" / "r" / "metrics.jsonl").write_text('{"s":1,"x":0.25}\n')
    return tmp_path / "disk"


def run(folder: Path, variables: dict[str, str], wrong: str) -> int:
    script = folder.parent / "protocol.py"
    script.write_text(PROTOCOL)
    command = [sys.executable, script, "ksuit_runner", wrong]
    return subprocess.run(command, cwd=folder, env=os.environ | variables).returncode


@pytest.mark.parametrize("wrong", ERRORS)
def test_a_wrong_order_is_found(folder, wrong):
    with pytest.raises(AssertionError, match=ERRORS[wrong]), OrderedDisk(folder).of_processes() as variables:
        assert run(folder, variables, wrong) == 0


@pytest.mark.parametrize("wrong", ["", "the removal is not synced"])
def test_the_right_order_of_both_processes_is_recorded(folder, wrong):
    disk = OrderedDisk(folder)
    with disk.of_processes() as variables:
        assert run(folder, variables, wrong) == 0
        removed = "runs/r/artifacts/checkpoints/E1_U1_S2"
        assert disk.needed_but_unsynced() == ([removed, f"{removed}/model"] if wrong else [])
    did = {process: {step.what for step in disk.log if step.process == process} for process in ("training", "recorder")}
    assert did["training"] == {"mkdir", "open", "write", "rename"}
    assert did["recorder"] == {"read", "open", "fsync", "rename", "unlink", "rmdir"}
    assert (disk.committed, disk.removed) == (["E2_U2_S4"], ["E1_U1_S2"])
    assert {path: by for path, by in disk.writers().items() if len(by) > 1} == {}


def test_a_power_cut_ends_both_processes_and_leaves_what_was_synced(folder, tmp_path):
    with power_cuts(folder, tmp_path / "left", [12], is_last=True) as (disk, variables):
        assert run(folder, variables, "") == -signal.SIGKILL
    assert len(disk.log) == 12 and disk.log[-1].process == "recorder"
    assert (tmp_path / "left" / "12" / "runs/r/artifacts/checkpoints/latest").read_text() == "E1_U1_S2"


def test_one_of_the_processes_can_be_killed_before_what_it_is_about_to_do(folder):
    def kill(step: Step) -> None:
        if step.what == "fsync" and step.path.endswith("/model"):
            disk.kill("recorder")

    disk = Disk(folder, kill)
    with disk.of_processes() as variables:
        assert run(folder, variables, "") == 256 - signal.SIGKILL  # as the other one says
        checkpoint = "runs/r/artifacts/checkpoints/.E2_U2_S4.ready"
        assert disk.unsynced(f"{checkpoint}/model") and not disk.unsynced(f"{checkpoint}/manifest.json")
