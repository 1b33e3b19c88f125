"""What a dead process has left is finished by its recorder or, once that is gone, by whoever reads the run."""

import threading
import time

import pytest
import torch
from stored_checkpoint import hand_over_checkpoint

from ksuit_runner.checkpoint.commit import Committer
from ksuit_runner.checkpoint.folders import needs_recovery
from ksuit_runner.checkpoint.format import pack_state
from ksuit_runner.paths import PathProvider
from ksuit_runner.record import recovery
from ksuit_runner.system.recorder_lock import RecorderLock


@pytest.fixture
def paths(tmp_path):
    """Return the paths of a run whose process was killed right after it had handed a checkpoint over."""
    paths = PathProvider(tmp_path, "run00000")
    hand_over_checkpoint(paths, "E1_U1_S1", pack_state({"model": {"w": torch.ones(3)}}, {}))
    return paths


def test_a_reader_recovers_what_nobody_else_does(paths):
    recovery.recover_idle(paths)
    assert not needs_recovery(paths) and paths.latest.read_text() == "E1_U1_S1\n"


def test_a_reader_waits_for_the_recorder_of_a_dead_process(paths):
    lock, found = RecorderLock(paths.recorder_lock), []
    lock.acquire()

    def record():
        time.sleep(0.3)
        found.append(needs_recovery(paths))
        Committer(paths).recover()
        lock.release()

    recorder = threading.Thread(target=record)
    recorder.start()
    recovery.recover_idle(paths)
    assert found == [True], "the reader has recovered it itself"
    recorder.join()
    assert not needs_recovery(paths) and not paths.lock.exists()


def test_a_reader_waits_for_a_bounded_time_and_leaves_it_to_the_recorder(paths, monkeypatch):
    monkeypatch.setattr(recovery, "_RECORDER_S", 0.1)
    with RecorderLock(paths.recorder_lock):
        recovery.recover_idle(paths)
    assert needs_recovery(paths) and not paths.lock.exists()
