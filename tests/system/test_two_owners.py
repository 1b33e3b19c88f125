"""Of two processes that both hold a run for theirs, one writes: the one that has taken it over."""

import signal
import socket

import pytest
from command import checkpoint_bytes, journal, mlflow_points, query, read_until, run_dir
from pausing import make_project
from preloaded import ksuit, start

from callbacks.train_loss import TrainLoss
from ksuit_runner.checkpoint.folders import names
from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.delivery.recording import Recording
from ksuit_runner.engine.loop import train
from ksuit_runner.engine.run_record import RunRecord
from ksuit_runner.errors import TakenOverError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import Point
from ksuit_runner.system.background import Background
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.tracker.noop import NoopTracker

RUN = ("model=pauses", "model.pauses_at=50", "trainer.max_epochs=3", "callbacks=[accuracy]")
LOSS = "default_callbacks.train_loss.every_n_updates=1"


def be_elsewhere():
    socket.gethostname = lambda: "elsewhere"
    RunLock.__init__.__defaults__ = (0.2, 0.05)


@pytest.mark.slow
def test_a_suspended_run_is_taken_over_and_its_first_owner_writes_nothing_more(tmp_path):
    make_project(tmp_path)
    (tmp_path / "armed").touch()
    outputs = tmp_path / "outputs"
    first = start(outputs, *RUN, LOSS, cwd=tmp_path)
    read_until(first, "paused")
    first.send_signal(signal.SIGSTOP)
    (tmp_path / "armed").unlink()
    second = start(outputs, "resume=last", cwd=tmp_path, prepare=be_elsewhere)
    taken_over, _ = second.communicate(timeout=120)
    first.send_signal(signal.SIGCONT)
    said, _ = first.communicate(timeout=60)
    assert (second.returncode, first.returncode) == (0, 2), taken_over + said
    assert "another process has resumed run" in said
    ksuit(tmp_path / "whole", *RUN, LOSS, cwd=tmp_path)
    assert journal(run_dir(outputs)) == mlflow_points(outputs) == journal(run_dir(tmp_path / "whole"))
    assert query(outputs, "select status from runs") == [("FINISHED",)]
    last = {name: file for name, file in checkpoint_bytes(run_dir(tmp_path / "whole")).items() if "_U60_" in name}
    assert last and last.items() <= checkpoint_bytes(run_dir(outputs)).items()


@pytest.mark.parametrize("update", [3, 4])  # a flush and a checkpoint come next
def test_a_run_that_is_taken_over_ends_at_its_next_write(maker, update):
    run = maker.run({"loss": (TrainLoss, {"every_n_updates": 1})}, checkpoint={"every_n_updates": 2})

    def check():
        if run.counter.update > update:
            run.taken_over.set()
            raise TakenOverError("another process has resumed it")

    run.checkpoint_writer.check_owner = check
    run.log_writer._journal.check_owner = check
    with pytest.raises(TakenOverError):
        train(run)
    assert max(point.step for points, _ in run.log_writer._journal.read() for point in points) == update
    assert f"_U{update - update % 2}_" in names(maker.paths())[0]


@pytest.fixture
def record(tmp_path):
    """A record whose run is taken over when its lock is removed."""
    paths = PathProvider(tmp_path, "run00000")
    lock = RunLock(paths.lock)
    lock.acquire()
    tracker = RecordedTracker(NoopTracker(), OutputPaths(tmp_path), lambda run_id: lock)
    tracker.resume_run(paths.run_id)
    recording = Recording(tracker.store, paths, lock.check)
    return RunRecord(tracker, paths, lock, Journal(paths.journal, lock.check), recording)


def test_what_is_recorded_elsewhere_is_refused_after_a_takeover(record):
    record.tracker.set_tags({"a": "1"})
    record.paths.lock.unlink()
    stored = {path: path.read_bytes() for path in record.paths.run_dir.glob("*.*")}
    assert {path.name for path in stored} >= {"tracker.json", "metrics.sent"}
    recording = record._follower
    for write in (
        lambda: record.tracker.set_tags({"a": "2"}),
        lambda: record.tracker.log_points([Point("a", 1.0, 1, 1)]),
        lambda: record.tracker.end_run(EndStatus.FINISHED),
        recording.reach,
        recording.deliver_all,
        recording.deliver_status,
    ):
        with pytest.raises(TakenOverError):
            write()
    record.close(EndStatus.FINISHED)
    assert {path: path.read_bytes() for path in record.paths.run_dir.glob("*.*")} == stored
    assert record.taken_over.is_set()
    for thread in (recording._following.sender._thread, recording._following.uploader._thread):
        thread.join(60)
        assert not thread.is_alive()


def test_who_takes_over_by_force_writes_to_a_journal_that_the_first_owner_cannot_reach(tmp_path):
    paths = PathProvider(tmp_path, "run00000")
    first = Journal(paths.journal)
    first.append(1, {"a": 1.0}, 5)
    lock = RunLock(paths.lock)
    lock.acquire()
    lock.was_forced = True
    record = RunRecord.resume(NoopTracker(), paths, lock)
    first.append(2, {"a": 2.0})
    record.journal.append(2, {"a": 3.0})
    assert [point.value for points, _ in record.journal.read() for point in points] == [1.0, 3.0]
    record.close(EndStatus.FINISHED)


def test_a_thread_behind_training_ends_with_the_ownership():
    class Works(Background):
        def _work(self):
            raise TakenOverError("lost")

        def _log_failing(self, error):
            raise AssertionError("it does not fail")

        def _log_recovered(self):
            raise AssertionError("it does not recover")

    works = Works("works", 0.01)
    works._thread.start()
    works._thread.join(60)
    assert not works._thread.is_alive()
