"""A run in the recorder, without processes."""

import threading

import pytest

from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.errors import TakenOverError, TrackerError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.point import now
from ksuit_runner.recorder import recorded_run
from ksuit_runner.recorder.recorded_run import RecordedRun
from ksuit_runner.recorder.session import Opening, Session
from ksuit_runner.system.run_lock import RunLock, is_held
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.tracker.noop import NoopTracker


class Hanging(NoopTracker):
    """A store that does not answer until it is let go."""

    def __init__(self):
        super().__init__()
        self.is_asked, self.answer = threading.Event(), threading.Event()

    def start_run(self, *args, **kwargs):
        self.is_asked.set()
        self.answer.wait()
        return super().start_run(*args, **kwargs)


def test_a_store_that_hangs_does_not_keep_the_recorder_of_a_process_that_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded_run, "_CLOSE_S", 0.1)
    paths, tracker = PathProvider(tmp_path, "run00000"), Hanging()
    with RunLock(paths.lock) as lock:
        Outbox("run00000", "name").store(paths)
        run = RecordedRun(tracker, paths, lock.token, lambda name, error: None)
        run.start()
        assert tracker.is_asked.wait(10)
    closing = threading.Thread(target=run.close, daemon=True)  # asked for by the process, before it ended
    closing.start()
    ending = threading.Thread(target=run.end_dead, args=(None,), daemon=True)
    ending.start()
    ending.join(10)
    is_ended, still_writes = not ending.is_alive(), is_held(paths.recorder_lock)
    tracker.answer.set()
    closing.join(10)
    assert is_ended
    assert still_writes and not is_held(paths.recorder_lock), "no other recorder begins meanwhile"


class Ending(NoopTracker):
    """Notes how runs end; from the death of the training process on it cannot be reached."""

    def __init__(self):
        super().__init__()
        self.ends = []

    def end_run(self, status, end_time=None):
        self.ends.append((self.run_id, status))
        if status == EndStatus.KILLED:
            raise TrackerError("it is away")


@pytest.mark.parametrize(("then", "ends"), [(None, ["KILLED"]), ("end_run", ["FINISHED"]), ("close_run", [])])
def test_a_run_that_was_begun_is_killed_by_the_death_of_its_process_before_it_has_a_folder(tmp_path, then, ends):
    session = Session(Opening({"_target_": "ksuit_runner.tracker.noop.NoopTracker"}, str(tmp_path)), lambda *_: None)
    session._tracker = tracker = Ending()
    session.submit("start_run", {"name": "a", "tags": {}}).result(10)
    assert session.records_run
    if then is not None:
        session.submit(then, {"status": "FINISHED"} if then == "end_run" else {}).result(10)
        assert not session.records_run
    session.end_dead(None)
    assert tracker.ends == [(tracker.run_id, end) for end in ends]


def test_a_run_of_another_process_is_neither_recorded_nor_told_that_its_process_has_died(tmp_path):
    paths, tracker = PathProvider(tmp_path, "run00000"), Ending()
    with RunLock(paths.lock) as first:
        run = RecordedRun(tracker, paths, first.token, lambda name, error: None)
    with RunLock(paths.lock) as second:
        assert run._closed.wait(10), "it makes way"
        run.end_dead("SIGKILL")
        assert not paths.log.exists() and not tracker.ends
        assert not is_held(paths.recorder_lock)
        with pytest.raises(TakenOverError):
            RecordedRun(tracker, paths, first.token, lambda name, error: None)
        assert not is_held(paths.recorder_lock)
        second.check()


def test_a_run_is_recorded_once_however_often_that_is_asked_for(tmp_path):
    paths = PathProvider(tmp_path, "run00000")
    session = Session(Opening({"_target_": "ksuit_runner.tracker.noop.NoopTracker"}, str(tmp_path)), lambda *_: None)
    with RunLock(paths.lock) as lock:
        runs = []
        for _ in range(2):
            session.submit("record", {"run_id": "run00000", "token": lock.token}).result(10)
            runs.append(session._run)
        assert runs[0] is runs[1] and is_held(paths.recorder_lock)
        session.submit("close_run", {}).result(10)
        assert not is_held(paths.recorder_lock)
        with pytest.raises(TrackerError, match="could not be started again for this run"):
            session.submit("finish", {"timeout_s": 1.0}).result(10)


def test_a_run_whose_process_has_died_ended_then(tmp_path):
    paths = PathProvider(tmp_path, "run00000")
    with RunLock(paths.lock) as lock:
        Outbox("run00000", "name").store(paths)
        run = RecordedRun(NoopTracker(), paths, lock.token, lambda name, error: None)
        run.start()
        before = now()
        run.end_dead("SIGKILL")
        assert not paths.lock.exists() and not is_held(paths.recorder_lock)
    box = Outbox.load(paths)
    assert box.status == EndStatus.KILLED and before <= box.end_time <= now()


def test_a_recorder_that_has_lost_its_lock_records_no_more(tmp_path):
    paths = PathProvider(tmp_path, "run00000")
    with RunLock(paths.lock) as lock:
        run = RecordedRun(NoopTracker(), paths, lock.token, lambda name, error: None)
        paths.recorder_lock.unlink()
        assert run._closed.wait(10)
