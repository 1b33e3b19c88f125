from pathlib import Path

import pytest

from ksuit_runner.errors import TrackerError
from ksuit_runner.record.point import Point
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.tracker.noop import NoopTracker


def test_every_run_has_an_id_of_its_own() -> None:
    tracker = NoopTracker()
    first = tracker.start_run("mnist", {"a": "b"}, parent_run_id="0123")
    assert tracker.run == first
    assert (first.name, first.tags, first.parent_run_id, first.status) == ("mnist", {"a": "b"}, "0123", "RUNNING")
    second = tracker.start_run(None, {})
    assert tracker.run_id == second.run_id != first.run_id
    assert second.name == second.run_id[:8]


def test_records_and_finds_nothing(tmp_path: Path) -> None:
    tracker = NoopTracker()
    tracker.resume_run("0123456789abcdef")
    tracker.log_params({"lr": 0.1})
    tracker.log_points([Point("loss", 0.1, 1, 1)])
    tracker.end_run(EndStatus.FINISHED)
    assert tracker.run_id == "0123456789abcdef"
    assert tracker.artifacts_are_local
    assert tracker.find("last") == tracker.children(tracker.run_id) == tracker.history("loss") == []
    assert tracker.last_steps() == {}
    with pytest.raises(TrackerError, match=r"stores no 'config\.yaml'"):
        tracker.download("config.yaml", tmp_path)
