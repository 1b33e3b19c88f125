"""Several trackers at once: none delays another, and each has everything once, in order, in the end."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.delivery.recording import Recording
from ksuit_runner.errors import ConfigError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import Point
from ksuit_runner.tracker.base import RUN_ID_TAG, DatasetInfo, EndStatus, RunInfo
from ksuit_runner.tracker.noop import NoopTracker
from ksuit_runner.tracker.several import SeveralTrackers

RUN = "0" * 32


class Store:
    """What a tracker's store holds, and what it makes of the next calls: each takes one of its faults."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.points: list[Point] = []
        self.faults: list[str] = []  # "before" or "after" what it is asked for is done, or "" for none
        self.is_away = False
        self.error: Exception = TrackerError("no answer")

    def take(self, what: object, action: Callable[[], None] = lambda: None) -> None:
        fault = self.faults.pop(0) if self.faults else ""
        if self.is_away or fault == "before":
            raise TrackerError("away")
        self.calls.append(what)
        action()
        if fault == "after":
            raise self.error


class FaultyTracker(NoopTracker):
    """Fails as its store says."""

    def __init__(self, store: Store, require: bool = False) -> None:
        super().__init__()
        self.store, self.require = store, require

    def check_answer(self) -> None:
        self.store.take(("answer",))

    def start_run(self, name, tags, parent_run_id=None, start_time=None) -> RunInfo:
        self.store.take(("start", tags.get(RUN_ID_TAG), parent_run_id, start_time))
        info = super().start_run(name, tags, parent_run_id, start_time)
        self._run = RunInfo(tags.get(RUN_ID_TAG, RUN), info.name, "RUNNING", info.tags, parent_run_id, info.start_time)
        return self._run

    def resume_run(self, run_id) -> RunInfo:
        self.store.take(("resume", run_id))
        self._run = RunInfo(run_id, "x", "RUNNING", {}, None, 7)
        return self._run

    def attach_run(self, run_id) -> RunInfo:
        self._run = RunInfo(run_id, "x", "FINISHED", {}, None, 7)
        return self._run

    def log_points(self, points: Sequence[Point]) -> None:
        new = [point for point in points if str(point) not in map(str, self.store.points)]
        self.store.take(("points", len(points)), lambda: self.store.points.extend(new))

    def log_params(self, params) -> None:
        self.store.take(("params", dict(params)))

    def log_inputs(self, datasets) -> None:
        self.store.take(("inputs", list(datasets)))

    def set_tags(self, tags, run_id=None) -> None:
        self.store.take(("tags", dict(tags), run_id))

    def end_run(self, status, end_time=None) -> None:
        self.store.take(("end", status, end_time))

    def delete_run(self) -> None:
        self.store.take(("delete",))


@pytest.fixture
def first() -> Store:
    return Store()


@pytest.fixture
def second() -> Store:
    return Store()


@pytest.fixture
def outputs(tmp_path: Path) -> OutputPaths:
    return OutputPaths(tmp_path / "outputs")


def both(outputs: OutputPaths, first: Store, second: Store, require: bool = False) -> SeveralTrackers:
    return SeveralTrackers(outputs, FaultyTracker(first), {"second": FaultyTracker(second, require)})


def batch(number: int) -> list[Point]:
    value = (math.nan, math.inf, 0.1)[number % 3]
    return [Point("loss", value, 2 * number + step, 1000 + number) for step in range(2)]


def backlog(outputs: OutputPaths) -> Path:
    return PathProvider(outputs.output_dir, RUN).backlog("second")


def kinds(store: Store) -> list[object]:
    return [call[0] for call in store.calls]


def test_both_get_everything_once_under_the_ids_of_the_first(outputs, first, second) -> None:
    tracker = both(outputs, first, second)
    tracker.start_run("x", {"a": "b"}, "parent")
    tracker.log_params({"lr": 0.1})
    tracker.log_inputs([DatasetInfo("train", "training", "c0ffee", "somewhere")])
    tracker.set_tags({"c": "d"})
    tracker.set_tags({"e": "f"}, "another")
    tracker.log_points(batch(0))
    tracker.end_run(EndStatus.FINISHED, 9)
    assert kinds(first) == ["start", "params", "inputs", "tags", "tags", "points", "end"]
    assert kinds(second) == ["start", "params", "inputs", "tags", "points", "end"]
    assert second.calls[0][:3] == ("start", RUN, "parent") and second.calls[0][3] > 0
    assert second.calls[1:3] == [("params", {"lr": "0.1"}), first.calls[2]] and second.calls[-1] == first.calls[-1]
    assert not tracker.is_behind and not backlog(outputs).exists() and tracker.run_id == RUN
    tracker.deliver_end()


@pytest.mark.parametrize("fault", ["before", "after"])
@pytest.mark.parametrize("at", range(6))
def test_a_failing_second_tracker_delays_nothing_and_gets_the_rest_later(outputs, first, second, fault, at) -> None:
    tracker = both(outputs, first, second)
    tracker.start_run("x", {})
    second.faults = [*[""] * at, fault]
    second.error = TrackerError("no answer") if at % 2 else ValueError("raised by mistake")
    for number in range(6):
        tracker.log_points(batch(number))
        assert [call for call in first.calls if call[0] == "points"] == [("points", 2)] * (number + 1)
    assert tracker.is_behind
    tracker.deliver_end()
    assert not tracker.is_behind and not backlog(outputs).exists()
    assert str(second.points) == str(first.points) == str([point for number in range(6) for point in batch(number)])


def test_what_a_second_tracker_lacks_survives_the_process(outputs, first, second, caplog) -> None:
    tracker = both(outputs, first, second)
    tracker.start_run("x", {})
    second.is_away = True
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            tracker.log_points(batch(number))
            tracker.deliver()
    assert len([record for record in caplog.records if "tracker.second cannot be used for now" in record.message]) == 1
    tracker.log_params({"lr": 0.1})
    with pytest.raises(TrackerError, match=r"^tracker\.second: away$"):
        tracker.deliver_end()
    with backlog(outputs).open("a") as file:
        file.write('\n{"points": [["loss", 1.0, 7')  # torn by the kill; the batch is sent again
    second.is_away = False
    again = both(outputs, first, second)
    again.resume_run(RUN)
    assert again.is_behind
    again.log_points(batch(3))
    again.end_run(EndStatus.KILLED, 5)
    again.deliver()
    assert str(second.points) == str(first.points)
    assert kinds(second) == ["start", "start", "resume", "points", "points", "points", "params", "points", "end"]
    assert not again.is_behind


def test_a_second_tracker_that_fails_is_tried_again_after_a_pause(outputs, first, second) -> None:
    tracker = both(outputs, first, second)
    tracker.start_run("x", {})
    second.faults = ["before"]
    tracker.log_points(batch(0))
    tracker.deliver()
    assert tracker.is_behind and second.points == []


def test_a_backlog_continues_where_it_failed(outputs, first, second) -> None:
    tracker = both(outputs, first, second)
    tracker.start_run("x", {})
    second.is_away = True
    for number in range(4):
        tracker.log_points(batch(number))
    second.is_away, second.faults = False, ["", "", "before"]
    with pytest.raises(TrackerError):
        tracker.deliver_end()
    assert len(second.points) == 4
    tracker.deliver_end()
    assert [call for call in second.calls if call[0] == "points"] == [("points", 2)] * 4


def test_while_the_first_tracker_fails_the_others_wait(outputs, first, second) -> None:
    tracker = both(outputs, first, second)
    tracker.start_run("x", {})
    first.faults = ["before", "after", ""]
    for _ in range(2):
        with pytest.raises(TrackerError):
            tracker.log_points(batch(0))
    assert second.points == []
    tracker.log_points(batch(0))
    assert str(first.points) == str(second.points) == str(batch(0))


def test_a_run_that_requires_the_second_tracker_does_not_start_without_it(outputs, first, second) -> None:
    second.is_away = True
    tracker = both(outputs, first, second, require=True)
    assert tracker.require
    with pytest.raises(TrackerError, match=r"^tracker\.second: away$"):
        RecordedTracker(tracker, outputs).start_run("x", {})
    assert kinds(first) == ["start", "end"] and first.calls[-1][1] == "FAILED"
    assert not outputs.runs_dir.exists()
    tracker = both(outputs, first, second, require=True)
    tracker.check_answer()
    tracker.resume_run(RUN)
    tracker.log_points(batch(0))
    assert kinds(first) == ["start", "end", "answer", "resume", "points"] and tracker.is_behind
    backlog(outputs).unlink()
    tracker = both(outputs, first, second)
    assert not tracker.require
    tracker.start_run("x", {})
    assert not tracker.is_behind  # there is nothing yet that it lacks


def test_sync_sends_what_the_second_tracker_lacks(outputs, first, second) -> None:
    tracker = RecordedTracker(both(outputs, first, second), outputs)
    run_id = tracker.start_run("x", {}).run_id
    tracker.log_params({"lr": 0.1})
    paths = PathProvider(outputs.output_dir, run_id)
    journal = Journal(paths.journal)
    for step in range(3):
        journal.append(step, {"loss": float(step)})
    journal.close()
    second.is_away = True
    with pytest.raises(TrackerError, match="away"):
        tracker.end_run(EndStatus.FINISHED)
        Recording(tracker.store, paths).deliver_all()
    assert tracker.store.is_behind and [point.step for point in first.points] == [0, 1, 2] and second.points == []
    assert first.calls[-1][:2] == ("end", "FINISHED")
    before = len(first.calls)
    second.is_away = False
    again = both(outputs, first, second)
    assert "Everything is recorded" in Recording(again, paths).deliver_all()
    assert not again.is_behind and [point.step for point in second.points] == [0, 1, 2]
    assert kinds(second) == ["start", "start", "params", "points", "end"] and second.calls[-1][1] == "FINISHED"
    assert len(first.calls) == before


def test_both_are_asked_for_a_key_and_where_they_are(outputs, first, second) -> None:
    class Strict(FaultyTracker):
        def check_key(self, key) -> None:
            raise ConfigError("not this")

        def where(self) -> str:
            return "here"

    tracker = SeveralTrackers(outputs, FaultyTracker(first), {"second": Strict(second)})
    with pytest.raises(ConfigError, match="not this"):
        tracker.check_key("loss")
    assert tracker.where() == "FaultyTracker (nothing is recorded)\nhere"


def test_a_run_is_deleted_in_all_trackers_and_in_the_first_one_last(outputs, first, second) -> None:
    tracker = both(outputs, first, second)
    tracker.start_run("x", {})
    second.is_away = True
    tracker.end_run(EndStatus.FAILED, 9)
    with pytest.raises(TrackerError, match=r"^tracker\.second: away$"):
        tracker.delete_run()
    assert kinds(first) == ["start", "end"], "without it the second is not asked"
    second.is_away = False
    for _ in range(2):
        first.faults = ["", "after"]
        tracker.end_run(EndStatus.FAILED, 9)
        with pytest.raises(TrackerError):
            tracker.delete_run()
    assert kinds(second) == ["start", "end", "delete"], "what was deleted gets nothing more"
    assert kinds(first)[-2:] == ["end", "delete"] and not backlog(outputs).exists()
