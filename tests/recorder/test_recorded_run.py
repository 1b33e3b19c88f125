"""A run in the recorder, without processes."""

import threading

from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.paths import PathProvider
from ksuit_runner.recorder import recorded_run
from ksuit_runner.recorder.recorded_run import RecordedRun
from ksuit_runner.system.run_lock import RunLock
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
    threading.Thread(target=run.close, daemon=True).start()  # asked for by the process, before it ended
    ending = threading.Thread(target=run.end_dead, args=(None,), daemon=True)
    ending.start()
    ending.join(10)
    is_ended = not ending.is_alive()
    tracker.answer.set()
    assert is_ended
