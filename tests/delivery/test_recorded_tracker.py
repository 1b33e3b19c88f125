import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.engine.loop import train
from ksuit_runner.errors import TakenOverError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.tracker.noop import NoopTracker


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tracker_id", "../x"),
        ("tracker_id", 1),
        ("name", None),
        ("start_time", 10**30),
        ("start_time", True),
        ("parent_run_id", "a/b"),
        ("params", {"a": 1}),
        ("tags", ["a"]),
        ("inputs", [{"name": "a"}]),
        ("other_tags", {"../x": {}}),
        ("other_tags", {"a": {"b": None}}),
        ("models", [{"path": "a"}]),
        ("listed", {"best": []}),
        ("exports", [{"path": "a"}]),
        ("status", "RUNNING"),
        ("status", []),
        ("end_time", -1),
        ("version", -1),
    ],
)
def test_an_outbox_of_wrong_types_is_refused(tmp_path: Path, key: str, value: object) -> None:
    paths = OutputPaths(tmp_path)
    run = PathProvider(tmp_path, RecordedTracker(NoopTracker(), paths).start_run(None, {}).run_id)
    run.outbox.write_text(json.dumps({**json.loads(run.outbox.read_text()), key: value}))
    with pytest.raises(TrackerError, match=rf"tracker\.json is damaged: it does not fit its schema: .*\$\.{key}"):
        RecordedTracker(NoopTracker(), paths).resume_run(run.run_id)


def test_nothing_is_written_of_a_run_that_is_taken_over(tmp_path: Path) -> None:
    paths = OutputPaths(tmp_path)
    lock: RunLock | None = None

    def lock_run(run_id: str) -> RunLock:
        nonlocal lock
        lock = RunLock(PathProvider(tmp_path, run_id).lock)
        lock.acquire()
        return lock

    tracker = RecordedTracker(NoopTracker(), paths, lock_run)
    run = PathProvider(tmp_path, tracker.start_run(None, {}).run_id)
    run.lock.unlink()
    before = run.outbox.read_bytes()
    for write in (lambda: tracker.set_tags({"a": "b"}), lambda: tracker.end_run(EndStatus.FINISHED)):
        with pytest.raises(TakenOverError):
            write()
    assert run.outbox.read_bytes() == before
    assert lock is not None
    lock.release()


def test_passwords_are_stored_nowhere(tmp_path: Path) -> None:
    tracker = RecordedTracker(NoopTracker(), OutputPaths(tmp_path))
    run = PathProvider(tmp_path, tracker.start_run(None, {"uri": "http://me:c0ffee@there"}).run_id)
    tracker.log_params({"password": "c0ffee", "uri": "http://me:c0ffee@there"})
    tracker.set_tags({"uri": "http://me:c0ffee@there"})
    assert run.outbox.read_text().count("uri") == 3 and "c0ffee" not in run.outbox.read_text()


def test_nothing_is_written_after_it_was_closed(tmp_path: Path) -> None:
    paths = OutputPaths(tmp_path)
    tracker = RecordedTracker(NoopTracker(), paths)
    run = PathProvider(tmp_path, tracker.start_run(None, {}).run_id)
    assert tracker.is_stored
    tracker.close()
    tracker.end_run(EndStatus.FINISHED)
    box = Outbox.load(run)
    assert box is not None
    assert box.status is None


def test_a_damaged_outbox_is_said(tmp_path: Path) -> None:
    paths = OutputPaths(tmp_path)
    run = PathProvider(tmp_path, RecordedTracker(NoopTracker(), paths).start_run(None, {}).run_id)
    for damage in ("", "[]", '{"inputs": [1]}', '{"inputs": [], "run_id": "a", "what": 1}'):
        run.outbox.write_text(damage)
        with pytest.raises(TrackerError, match=r"tracker\.json is damaged"):
            RecordedTracker(NoopTracker(), paths).resume_run(run.run_id)


def test_files_are_stored_in_the_folder_before_anybody_is_told(tmp_path: Path) -> None:
    tracker = RecordedTracker(NoopTracker(), OutputPaths(tmp_path / "outputs"))
    run_id, changes = tracker.start_run(None, {}).run_id, []
    tracker.on_files = lambda: changes.append(tracker.list_artifacts())
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.txt").write_text("a")
    tracker.upload(tmp_path / "plots" / "a.txt", "a.txt")
    tracker.upload(tmp_path / "plots", "plots")
    assert tracker.list_artifacts() == ["a.txt", "plots"]
    assert tracker.list_artifacts("plots", run_id) == ["plots/a.txt"]
    assert tracker.download("plots", tmp_path / "there").joinpath("a.txt").read_text() == "a"
    tracker.delete_artifacts("a.txt")
    tracker.delete_artifacts("a.txt")
    assert tracker.list_artifacts() == ["plots"]
    assert changes == [["a.txt"], ["a.txt", "plots"], ["plots"], ["plots"]]
    with pytest.raises(TrackerError):
        tracker.download("nothing", tmp_path / "there")


class Describes(CallbackBase):
    """Records a parameter before training, by its own name, or fails before it can."""

    def _before_training(self, update_counter: UpdateCounter) -> None:
        self.tracker.log_params({self.display_name: 1})
        if self.display_name == "fails":
            raise ArithmeticError


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "fails", "c")])
def test_what_callbacks_record_before_training_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: Any, names: tuple[str, ...]
) -> None:
    tracker = RecordedTracker(NoopTracker(), OutputPaths(tmp_path))
    run = PathProvider(tmp_path, tracker.start_run(None, {}).run_id)
    made = maker.run({name: (Describes, {}) for name in names}, model=nn.Linear(4, 3), max_updates=1)
    made.tracker = tracker
    for callback in made.hooks.callbacks.values():
        callback.tracker = tracker
    written: list[dict[str, str]] = []
    store = Outbox.store
    monkeypatch.setattr(Outbox, "store", lambda box, paths: (written.append({**box.params}), store(box, paths))[1])
    if "fails" in names:
        with pytest.raises(ArithmeticError):
            train(made)
    else:
        train(made)
    expected = dict.fromkeys(names[: names.index("fails") + 1] if "fails" in names else names, "1")
    assert written == [expected]
    box = Outbox.load(run)
    assert box is not None
    assert box.params == expected
