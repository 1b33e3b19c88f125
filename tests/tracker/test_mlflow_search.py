import time

import pytest

from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.tracker.mlflow import MlflowTracker


def test_find_by_id_prefix_name_and_last(paths: OutputPaths, tracker: MlflowTracker) -> None:
    first = tracker.run_id
    time.sleep(0.002)  # the order of the runs is that of their start in ms
    sweep = MlflowTracker(paths, experiment="another").start_run("sw'eep", {"ksuit.kind": "sweep"})
    found = MlflowTracker(paths)
    assert [run.run_id for run in found.find(first)] == [first]
    assert [run.run_id for run in found.find(first[:6])] == [first]
    assert found.find(first[:5]) == []
    assert [run.run_id for run in found.find("digits")] == [first]
    assert [run.run_id for run in found.find("sw'eep")] == [sweep.run_id]
    assert [run.run_id for run in found.find("last")] == [first]
    for unknown in ("0" * 32, "0" * 8, "nobody", "digit", "", '"', "' OR 1"):
        assert found.find(unknown) == []


def test_find_returns_all_of_a_name_newest_first(tracker: MlflowTracker) -> None:
    ids = [tracker.run_id]
    for _ in range(2):
        time.sleep(0.002)
        ids.append(tracker.start_run("digits", {}).run_id)
    assert [run.run_id for run in tracker.find("digits")] == ids[::-1]
    assert [run.run_id for run in tracker.find("last")] == ids[-1:]


def test_children_oldest_first(tracker: MlflowTracker) -> None:
    parent = tracker.run_id
    names = [f"child{i}" for i in range(3)]
    for name in names:
        time.sleep(0.002)
        assert tracker.start_run(name, {}, parent_run_id=parent).parent_run_id == parent
    assert [run.name for run in tracker.children(parent)] == names
    assert tracker.children(tracker.run_id) == []


def test_a_deleted_run_is_not_resumed(tracker: MlflowTracker) -> None:
    tracker._client.delete_run(tracker.run_id)
    assert tracker.find(tracker.run_id) == tracker.find("digits") == []
    with pytest.raises(TrackerError, match="was deleted"):
        tracker.resume_run(tracker.run_id)
