"""A run is recorded from what is in its folder, by whoever follows it."""

import subprocess
import sys
import threading
import time
from queue import Empty, Queue

import pytest
import torch
from folder_tracker import FolderTracker
from stored_checkpoint import hand_over_checkpoint

from ksuit_runner.checkpoint.folders import names
from ksuit_runner.checkpoint.format import pack_state
from ksuit_runner.delivery import recording as recording_module
from ksuit_runner.delivery.binding import Binding
from ksuit_runner.delivery.delivered import read_state
from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.delivery.recording import Recording, RunFollower, Unsent
from ksuit_runner.errors import LostRunError, TakenOverError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import LoggedFile, Point
from ksuit_runner.tracker.base import EndStatus, ModelVersion, RunInfo


class Store(FolderTracker):
    """Keeps what it is sent, in its order; can be away."""

    artifacts_are_local = False
    require = False

    def __init__(self, folder):
        super().__init__(folder)
        self.is_away = False
        self.gate = threading.Event()
        self.gate.set()

    def attach_run(self, run_id):
        self._answer("attach")
        self._run = RunInfo(run_id, "mine", "FINISHED")
        return self._run

    def resume_run(self, run_id):
        self._answer("resume")
        return super().resume_run(run_id)

    def log_files(self, files):
        self._answer(f"files {len(files)}")

    def set_tags(self, tags, run_id=None):
        self._answer(f"tags {sorted(tags)}")

    def log_points(self, points):
        self._answer(f"points {len(points)}")

    def end_run(self, status, end_time=None):
        self._answer(f"end {status.value}")

    def register_model(self, version):
        self._answer(f"model {version.name}")

    def upload(self, path, artifact_path):
        self.gate.wait(60)
        super().upload(path, artifact_path)

    def _answer(self, what):
        if self.is_away:
            raise TrackerError("the server is away")
        self.log.append(what)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "there")


@pytest.fixture
def tracker(store, tmp_path):
    """The tracker of a run that has begun."""
    tracker = RecordedTracker(store, OutputPaths(tmp_path / "outputs"))
    tracker.start_run("mine", {})
    return tracker


@pytest.fixture
def paths(tracker, tmp_path):
    paths = PathProvider(tmp_path / "outputs", tracker.run_id)
    paths.artifacts_dir.mkdir()
    paths.config.write_text("seed: 1")
    with_points(paths, 1)
    return paths


def with_points(paths, *steps):
    journal = Journal(paths.journal)
    for step in steps:
        journal.append(step, {"a": step / 3})
    journal.close()


def content(paths):
    return {path.name: path.read_bytes() for path in paths.run_dir.glob("*.*") if path.is_file()}


EVERYTHING = ["tags ['t']", "points 1", "config.yaml", "end FINISHED"]


def end(tracker):
    tracker.set_tags({"t": "1"})
    tracker.end_run(EndStatus.FINISHED)


def test_whoever_records_a_run_writes_only_how_much_is_delivered(store, tracker, paths):
    end(tracker)
    before = content(paths)
    recording: RunFollower = Recording(store, paths, interval_s=60)
    recording.start()
    assert recording.finish(60) == Unsent() and not recording.finish(60)
    recording.close()
    recording.join()
    assert store.log == EVERYTHING
    after = content(paths)
    assert after.keys() - before.keys() == {"delivered.json", "metrics.sent", "uploaded.json"}
    assert before.items() <= after.items()
    state = read_state(paths)
    assert not (state.has_messages or state.has_end)


def test_what_is_left_is_delivered_by_the_next_one_in_threads_or_at_once(store, tracker, paths):
    end(tracker)
    first = Recording(store, paths, interval_s=60)
    store.is_away = True
    first.start()
    begun = time.monotonic()
    assert first.finish(0.2) == Unsent(1, 1, True)
    assert time.monotonic() - begun < 10
    first.close()
    store.is_away = False
    said = Recording(store, paths).deliver_all()
    assert said.startswith(
        f"run mine ({paths.run_id}): sent 1 metric points, 1 files and checkpoints, status FINISHED\n"
    )
    assert store.log == EVERYTHING
    assert "sent 0 metric points, 0 files and checkpoints\n" in Recording(store, paths).deliver_all()


def test_what_the_process_that_trains_adds_is_read_from_its_files(store, tracker, paths):
    recording = Recording(store, paths, interval_s=0.01)
    recording.start()
    tracker.set_tags({"t": "1"})
    assert recording.flush(60)
    with_points(paths, 2, 3)
    assert recording.flush(60)
    (paths.artifacts_dir / "b").write_text("new")
    recording.notify()
    tracker.end_run(EndStatus.FINISHED)
    assert not recording.finish(60)
    recording.close()
    assert [line for line in store.log if line.startswith("tags")] == EVERYTHING[:1]
    assert store.log[-1] == "end FINISHED" and {"b", "config.yaml"} <= {*store.log}


def test_the_store_hears_that_a_run_is_resumed_and_how_it_ends_then(store, tracker, paths):
    end(tracker)
    Recording(store, paths).deliver_all()
    store.log.clear()
    store._run = None  # as in another process
    recording = Recording(store, paths)
    recording.reach()
    assert store.log == ["attach"]  # it may still be refused
    again = RecordedTracker(store, paths)
    again.resume_run(paths.run_id)
    recording.start()
    again.end_run(EndStatus.KILLED)
    assert not recording.finish(60)
    recording.close()
    assert store.log[1:] in (["end KILLED"], ["resume", "end KILLED"])  # it may have ended before it was looked at


@pytest.mark.parametrize("lost", ["tags ['t']", "end FINISHED", "model digits"])
def test_what_the_store_did_not_take_is_delivered_the_next_time(store, tracker, paths, monkeypatch, lost):
    tracker.register_model(ModelVersion("models/a", "digits"))
    end(tracker)

    def fail(what, answer=store._answer):
        if what == lost:
            monkeypatch.setattr(store, "_answer", answer)
            raise TrackerError("the server is away")
        answer(what)

    monkeypatch.setattr(store, "_answer", fail)
    with pytest.raises(TrackerError):
        Recording(store, paths).deliver_all()
    assert lost not in store.log
    Recording(store, paths).deliver_all()
    assert store.log.count(lost) == 1


def test_a_killed_run_is_marked_so_without_sending_the_rest(store, tracker, paths):
    recording = Recording(store, paths)
    recording.mark_if_killed()
    recording.deliver_status()
    assert store.log == ["end KILLED"]


def test_an_upload_that_hangs_delays_neither_points_nor_the_status(store, tracker, paths):
    store.gate.clear()
    end(tracker)
    recording = Recording(store, paths, interval_s=0.01)
    recording.start()
    assert recording.finish(2.5) == Unsent(0, 1, False)
    recording.close()
    state = content(paths)
    store.gate.set()  # it comes back long after that, and writes nothing
    uploader = recording._following.uploader
    uploader.request()
    uploader._thread.join(60)
    assert content(paths) == state and store.log[-2:] == ["end FINISHED", "config.yaml"]


@pytest.mark.parametrize(
    ("method", "given"),
    [
        *(("deliver", ()), ("mark_if_killed", ()), ("deliver_end", ())),
        *(("log_points", [[Point("a", 1.0, 1, 1)]]), ("log_files", [[LoggedFile("a", "a.png", 1, 1)]])),
    ],
)
def test_a_store_is_asked_for_nothing_once_the_run_is_another_ones(store, tracker, paths, monkeypatch, method, given):
    taken = []

    def check():
        if taken:
            raise TakenOverError("another process has resumed it")

    binding = Binding(store, paths, check)
    binding.bind()
    tracker.set_tags({"t": "1"})
    if method == "deliver_end":
        tracker.end_run(EndStatus.FINISHED)
    monkeypatch.setattr(store, "deliver", lambda: store.log.append("deliver"))
    store.log.clear()
    before = content(paths)
    taken.append(True)
    with pytest.raises(TakenOverError):
        getattr(binding, method)(*given)
    assert (store.log, content(paths)) == ([], before)


def test_of_a_run_that_is_withdrawn_nothing_is_recorded(store, tracker, paths):
    tracker.end_run(EndStatus.FAILED)
    tracker.delete_run()
    store.log.clear()
    binding = Binding(store, paths, lambda: None)
    binding.deliver()
    binding.log_points([Point("a", 1.0, 1, 1)])
    binding.log_files([LoggedFile("a", "a.png", 1, 1)])
    assert store.log == []


def test_everything_is_sent_again_to_a_store_that_has_lost_the_run(store, tracker, paths, monkeypatch):
    end(tracker)
    Recording(store, paths).deliver_all()

    def lost(run_id):
        raise LostRunError("it is gone")

    monkeypatch.setattr(store, "attach_run", lost)
    store.log.clear()
    recording = Recording(store, paths)
    assert recording.forget_lost()
    recording.deliver_all()
    assert store.log == EVERYTHING


@pytest.mark.parametrize("method", ["deliver", "end_run"])
def test_a_request_over_which_the_run_is_taken_over_is_the_last(store, tracker, paths, monkeypatch, method):
    taken = []

    def check():
        if taken:
            raise TakenOverError("another process has resumed it")

    end(tracker)
    monkeypatch.setattr(store, method, lambda *given: taken.append(given))
    with pytest.raises(TakenOverError):
        Recording(store, paths, check).deliver_all()
    state = read_state(paths)
    assert taken and state.has_end and (method == "end_run" or (state.has_messages and store.log == []))


def test_nothing_is_written_once_the_run_is_another_ones(store, tracker, paths):
    end(tracker)

    def check():
        raise TakenOverError("another process has resumed it")

    before = content(paths)
    recording = Recording(store, paths, check)
    for act in (recording.reach, recording.start, recording.deliver_all, recording.deliver_status):
        with pytest.raises(TakenOverError):
            act()
    closed = Recording(store, paths)
    closed.close()
    with pytest.raises(TakenOverError, match="no longer recorded here"):
        closed.deliver_all()
    assert content(paths) == before and store.log == []


def hand_over(paths, update):
    name = f"E0_U{update}_S{update}"
    content = pack_state({"model": {"w": torch.full((2,), float(update))}}, {})
    hand_over_checkpoint(paths, name, content, keep_last=2)
    return name


def test_checkpoints_are_committed_whether_the_store_answers_or_not(store, tracker, paths):
    ends = []
    recording = Recording(store, paths, on_checkpoint=lambda name, error: ends.append((name, error)), interval_s=60)
    store.is_away = True
    first = hand_over(paths, 1)
    recording.start()
    recording.notify()
    recording.finish(10)
    assert ends == [(first, None)] and names(paths) == [first]
    damaged = hand_over(paths, 2)
    (paths.checkpoints_dir / f".{damaged}.ready" / "trainer.json").write_text("{")
    store.is_away = False
    assert not recording.finish(60)
    assert f"checkpoints/{first}/manifest.json" in store.log
    assert [name for name, _ in ends] == [first, damaged] and isinstance(ends[1][1], OSError)
    recording.close()
    last = hand_over(paths, 3)
    Recording(store, paths).deliver_all()
    assert names(paths) == [last, first]
    assert f"checkpoints/{last}/manifest.json" in store.log


@pytest.mark.parametrize("pause_s", [60.0, 0.1])
def test_checkpoints_are_committed_with_a_pause_unless_one_is_waited_for(store, tracker, paths, monkeypatch, pause_s):
    monkeypatch.setattr(recording_module, "COMMIT_PAUSE_S", pause_s)
    ends, later = Queue(), []

    def note(name, error):
        if not later:  # before the pause begins, however long that is
            later.extend(hand_over(paths, update) for update in (2, 3, 4))
        ends.put((name, error))

    recording = Recording(store, paths, on_checkpoint=note, interval_s=60)
    recording.start()
    first = hand_over(paths, 1)
    recording.notify()
    assert ends.get(timeout=30) == (first, None)
    if pause_s == 60:
        recording.notify()
        with pytest.raises(Empty):
            ends.get(timeout=0.3)
        recording.hurry()
    assert [ends.get(timeout=30) for _ in later] == [(name, None) for name in reversed(later)]  # found by itself
    last = hand_over(paths, 5)
    recording.finish(30)
    assert ends.get(timeout=0) == (last, None)
    assert names(paths) == [last, later[2]]
    recording.close()


def test_points_are_sent_as_soon_as_a_checkpoint_is_told_that_is_waited_for(store, tracker, paths):
    ends = Queue()
    store.artifacts_are_local = True  # an upload would have them sent, too
    recording = Recording(store, paths, on_checkpoint=lambda *end: ends.put((end, list(store.log))), interval_s=60)
    recording.reach()
    recording.start()
    tracker.set_tags({"t": "1"})
    recording.notify()
    wait_for(store, "points 1")
    with_points(paths, 2, 3)
    first = hand_over(paths, 1)
    recording.notify()
    assert ends.get(timeout=30)[0] == (first, None)
    time.sleep(0.2)
    assert "points 2" not in store.log, "nobody waits"
    last = hand_over(paths, 2)
    recording.hurry()
    end, before = ends.get(timeout=30)
    assert end == (last, None) and "points 2" not in before
    wait_for(store, "points 2")
    recording.close()


def wait_for(store, *lines):
    deadline = time.monotonic() + 30
    while not {*lines} <= {*store.log} and time.monotonic() < deadline:
        time.sleep(0.001)
    assert {*lines} <= {*store.log}


def test_points_are_sent_at_the_interval_and_what_is_told_at_once(store, tracker, paths):
    recording = Recording(store, paths, interval_s=60)
    recording.reach()
    recording.start()
    tracker.set_tags({"t": "1"})
    recording.notify()
    wait_for(store, "tags ['t']", "points 1", "config.yaml")
    with_points(paths, 2)
    (paths.artifacts_dir / "b").write_text("new")
    recording.notify()
    wait_for(store, "b")
    assert store.log.count("points 1") == 1
    recording.close()


def test_an_outbox_that_cannot_be_read_is_not_delivered(store, tracker, paths):
    end(tracker)
    recording = Recording(store, paths, interval_s=60)
    recording.start()
    paths.outbox.write_text("{")
    assert recording.finish(0.1).messages
    recording.close()


def test_it_needs_neither_torch_nor_a_tracker_of_its_own():
    code = "import sys, ksuit_runner.delivery.recording; print({'torch', 'mlflow', 'sqlalchemy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
