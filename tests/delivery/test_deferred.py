import json
import math
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from servers import locked

from ksuit_runner.delivery.catch_up import send_all
from ksuit_runner.delivery.deferred import DeferredTracker
from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.errors import LostRunError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import Point
from ksuit_runner.record.stored_run import find_local
from ksuit_runner.tracker.base import RUN_ID_TAG, START_TAG, DatasetInfo, EndStatus, RunInfo
from ksuit_runner.tracker.mlflow import MlflowTracker
from ksuit_runner.tracker.noop import NoopTracker


def _mlflow(paths: OutputPaths, require: bool = False) -> MlflowTracker:
    return MlflowTracker(paths, timeout_s=0.1, require=require)


def _begun_in_an_outage(paths: OutputPaths, name: str = "early", parent: str | None = None) -> str:
    """Begin a run while the store is locked, and end it; return its id."""
    with locked(paths.database):
        tracker = DeferredTracker(_mlflow(paths), paths)
        run_id = tracker.start_run(name, {"author": "me"}, parent).run_id
        assert not tracker.is_bound
        tracker.log_params({"lr": 0.1})
        tracker.set_tags({"command": "x"})
        tracker.log_inputs([DatasetInfo("digits", "training", "c0ffee", "somewhere")])
        tracker.end_run(EndStatus.FAILED)
        with pytest.raises(TrackerError, match="database is locked"):
            tracker.deliver()
    return run_id


def _deliver(paths: OutputPaths, run_id: str, store: MlflowTracker | None = None) -> DeferredTracker:
    tracker = DeferredTracker(store or _mlflow(paths), paths)
    tracker.attach_run(run_id)
    tracker.deliver()
    tracker.deliver_end()
    return tracker


def test_without_an_outage_a_run_has_the_id_of_the_store(paths: OutputPaths) -> None:
    tracker = DeferredTracker(_mlflow(paths), paths)
    info = tracker.start_run("digits", {"author": "me"})
    tracker.log_params({"lr": 0.1})
    (found,) = MlflowTracker(paths).find(info.run_id)
    assert (found.name, found.status, found.local_id) == ("digits", "RUNNING", info.run_id)
    assert MlflowTracker(paths)._client.get_run(info.run_id).data.params == {}  # kept, for a thread that may wait
    assert tracker.is_behind
    tracker.deliver()
    assert not tracker.is_behind
    assert MlflowTracker(paths)._client.get_run(info.run_id).data.params == {"lr": "0.1"}


def test_a_run_that_requires_the_store_leaves_nothing_without_it(paths: OutputPaths) -> None:
    with locked(paths.database), pytest.raises(TrackerError, match="locked"):
        DeferredTracker(_mlflow(paths, require=True), paths).start_run("digits", {})
    assert not paths.runs_dir.exists()


def test_a_run_that_began_in_an_outage_is_registered_as_it_was(paths: OutputPaths) -> None:
    before = time.time_ns() // 1_000_000
    run_id = _begun_in_an_outage(paths)
    after = time.time_ns() // 1_000_000
    tracker = _deliver(paths, run_id)
    assert not tracker.is_behind
    assert tracker.artifacts_are_local
    (found,) = MlflowTracker(paths).find("early")
    assert found.run_id != run_id == found.local_id
    assert before <= found.start_time <= after
    assert (found.status, found.tags["author"], found.tags["command"]) == ("FAILED", "me", "x")
    run = MlflowTracker(paths)._client.get_run(found.run_id)
    assert (run.data.params, len(run.inputs.dataset_inputs)) == ({"lr": "0.1"}, 1)
    assert before <= run.info.end_time <= after
    assert run.info.artifact_uri == str(PathProvider(paths.output_dir, run_id).artifacts_dir)
    for query in (found.run_id, found.run_id[:8], run_id[:8]):
        assert [info.run_id for info in MlflowTracker(paths).find(query)] == [found.run_id]
        assert find_local(paths, query) == run_id


def test_delivering_again_changes_nothing(paths: OutputPaths) -> None:
    run_id = _begun_in_an_outage(paths)
    _deliver(paths, run_id)
    (first,) = MlflowTracker(paths).find("early")
    run = MlflowTracker(paths)._client.get_run(first.run_id).to_dictionary()
    _deliver(paths, run_id)
    assert MlflowTracker(paths).find("early") == [first]
    assert MlflowTracker(paths)._client.get_run(first.run_id).to_dictionary() == run


class Crash(BaseException):
    """Stands for a kill at one place."""


class Unheard(MlflowTracker):
    """Creates a run and is gone before it can say so."""

    def start_run(
        self,
        name: str | None,
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        start_time: int | None = None,
    ) -> RunInfo:
        super().start_run(name, tags, parent_run_id, start_time)
        raise Crash


def test_a_crash_between_creation_and_its_note_does_not_make_two_runs(paths: OutputPaths) -> None:
    run_id = _begun_in_an_outage(paths)
    with pytest.raises(Crash):
        _deliver(paths, run_id, Unheard(paths))
    assert len(MlflowTracker(paths).find("early")) == 1
    _deliver(paths, run_id)
    (found,) = MlflowTracker(paths).find("early")
    assert (found.local_id, found.status) == (run_id, "FAILED")
    with closing(sqlite3.connect(paths.database)) as database:
        assert database.execute("select count(*) from runs").fetchall() == [(1,)]  # nor was another one deleted


class Late(MlflowTracker):
    """Does what it is asked for, but so late that nobody hears of it."""

    def start_run(
        self,
        name: str | None,
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        start_time: int | None = None,
    ) -> RunInfo:
        super().start_run(name, tags, parent_run_id, start_time)
        raise TrackerError("too late")


def test_a_start_that_was_not_heard_of_is_found_again(paths: OutputPaths) -> None:
    run_id = DeferredTracker(Late(paths, require=False), paths).start_run("early", {}).run_id
    (unheard,) = MlflowTracker(paths).find("early")
    assert unheard.run_id != run_id
    assert _deliver(paths, run_id).artifacts_are_local
    (found,) = MlflowTracker(paths).find("early")
    assert (found.run_id, found.local_id) == (unheard.run_id, run_id)


def test_of_two_runs_of_one_start_one_stays(paths: OutputPaths) -> None:
    run_id = _begun_in_an_outage(paths)
    for _ in range(2):  # two requests that a server took in long after they had been given up
        MlflowTracker(paths).start_run("early", {START_TAG: run_id, RUN_ID_TAG: run_id})
    _deliver(paths, run_id)
    (found,) = MlflowTracker(paths).find("early")
    assert (found.local_id, found.status) == (run_id, "FAILED")


def test_a_moved_folder_keeps_the_files_of_a_run_that_was_registered_later(paths: OutputPaths, tmp_path: Path) -> None:
    run_id = _begun_in_an_outage(paths)
    _deliver(paths, run_id)
    moved = OutputPaths(paths.output_dir.rename(tmp_path / "moved"))
    tracker = DeferredTracker(_mlflow(moved), moved)
    tracker.resume_run(run_id)
    assert tracker.artifacts_are_local


def test_a_parent_is_registered_with_its_child(paths: OutputPaths) -> None:
    parent = _begun_in_an_outage(paths, "sweep")
    child = _begun_in_an_outage(paths, "child", parent)
    _deliver(paths, child)
    (above,) = MlflowTracker(paths).find("sweep")
    assert above.local_id == parent
    assert [info.local_id for info in MlflowTracker(paths).children(above.run_id)] == [child]
    _deliver(paths, parent)
    assert [(info.run_id, info.status) for info in MlflowTracker(paths).find("sweep")] == [(above.run_id, "FAILED")]


def test_an_outage_at_a_resume_ends_as_the_run_does(paths: OutputPaths) -> None:
    tracker = DeferredTracker(_mlflow(paths), paths)
    run_id = tracker.start_run("digits", {}).run_id
    tracker.end_run(EndStatus.FINISHED)
    tracker.deliver_end()
    again = DeferredTracker(_mlflow(paths), paths)
    with locked(paths.database):
        with pytest.raises(TrackerError):
            DeferredTracker(_mlflow(paths, require=True), paths).resume_run(run_id)
        again.resume_run(run_id)
        assert again.status_before == "FINISHED"
    assert again.is_behind
    again.deliver()
    assert MlflowTracker(paths).find(run_id)[0].status == "RUNNING"
    again.log_points([Point("a", 1, 1, 1)])
    assert again.last_steps() == {"a": 1}
    again.end_run(EndStatus.KILLED)
    again.deliver_end()
    assert MlflowTracker(paths).find(run_id)[0].status == "KILLED"


def test_a_run_that_nobody_ended_was_killed(paths: OutputPaths) -> None:
    run_id = DeferredTracker(_mlflow(paths), paths).start_run("digits", {}).run_id
    _deliver(paths, run_id)
    assert MlflowTracker(paths).find(run_id)[0].status == "KILLED"


def test_a_run_of_before_there_were_outboxes_is_taken_up(paths: OutputPaths) -> None:
    old = MlflowTracker(paths)
    run_id = old.start_run("old", {}).run_id
    old.end_run(EndStatus.FINISHED)
    tracker = DeferredTracker(_mlflow(paths), paths)
    assert tracker.resume_run(run_id).name == "old"
    assert tracker.status_before == "FINISHED"


def test_what_is_changed_while_it_is_delivered_is_delivered_next(paths: OutputPaths) -> None:
    class Slow(MlflowTracker):
        def set_tags(self, tags: Mapping[str, str]) -> None:
            super().set_tags(tags)
            if tags == {"a": "1", "b": "1"}:
                tracker.set_tags({"a": "2"})  # meanwhile, by the training thread
                tracker.log_params({"late": 1})

    tracker = DeferredTracker(Slow(paths), paths)
    run_id = tracker.start_run("digits", {}).run_id
    tracker.set_tags({"a": "1", "b": "1"})
    tracker.deliver()
    assert tracker.is_behind
    tracker.deliver()
    assert not tracker.is_behind
    assert MlflowTracker(paths).find(run_id)[0].tags["a"] == "2"
    assert MlflowTracker(paths)._client.get_run(run_id).data.params == {"late": "1"}


def test_datasets_that_are_noted_while_others_are_delivered_are_delivered_next(paths: OutputPaths) -> None:
    first, second = (DatasetInfo(name, "training", "c0ffee", "somewhere") for name in ("first", "second"))

    class Slow(MlflowTracker):
        def log_inputs(self, datasets: Sequence[DatasetInfo]) -> None:
            super().log_inputs(datasets)
            if list(datasets) == [first]:
                tracker.log_inputs([first, second])  # meanwhile, by the training thread

    tracker = DeferredTracker(Slow(paths), paths)
    run_id = tracker.start_run("digits", {}).run_id
    tracker.log_inputs([first])
    tracker.deliver()
    assert tracker.is_behind
    tracker.deliver()
    assert not tracker.is_behind
    inputs = MlflowTracker(paths)._client.get_run(run_id).inputs.dataset_inputs
    assert sorted(item.dataset.name for item in inputs) == ["first", "second"]


def _recorded(paths: OutputPaths, query: str) -> dict[str, Any]:
    """Return what MLflow has of a run, its ids aside."""
    (info,) = MlflowTracker(paths).find(query)
    run = MlflowTracker(paths)._client.get_run(info.run_id)
    times = (run.info.start_time, run.info.end_time)
    datasets = sorted(item.dataset.name for item in run.inputs.dataset_inputs)
    tags = {key: value for key, value in info.tags.items() if key not in (RUN_ID_TAG, "mlflow.parentRunId")}
    points = [point for key in sorted(run.data.metrics) for point in MlflowTracker(paths).history(key, info.run_id)]
    return {"params": run.data.params, "tags": tags, "datasets": datasets, "points": points} | {
        "status": run.info.status,
        "name": run.info.run_name,
        "times": times,
        "artifacts": run.info.artifact_uri,
    }


def test_a_run_that_the_store_has_lost_is_registered_anew_on_request(paths: OutputPaths) -> None:
    sweep = DeferredTracker(_mlflow(paths), paths).start_run("sweep", {"author": "me"}).run_id
    tracker = DeferredTracker(_mlflow(paths), paths)
    run_id = tracker.start_run("digits", {"author": "me"}, sweep).run_id
    tracker.log_params({"lr": 0.1})
    tracker.log_inputs([DatasetInfo("digits", "training", "c0ffee", "somewhere")])
    tracker.set_tags({"later": "x"})
    run = PathProvider(paths.output_dir, run_id)
    journal = Journal(run.journal)
    journal.append(1, {"a@b": 0.5, "c": math.inf}, timestamp=7)
    tracker.end_run(EndStatus.FINISHED)
    send_all(tracker, run)
    before = _recorded(paths, run_id)
    for lost in (run_id, sweep):
        MlflowTracker(paths)._client.delete_run(lost)
    for take_up in ("resume_run", "attach_run"):
        again = DeferredTracker(_mlflow(paths, require=True), paths)
        with pytest.raises(LostRunError, match=f"{run_id} was deleted .* from .*{run_id}: register_anew=true"):
            getattr(again, take_up)(run_id)
            again.deliver()
    content = run.outbox.read_text()
    for _ in range(2):  # the second time it is there
        again = DeferredTracker(_mlflow(paths, require=True), paths)
        again.forget_lost(run_id)
        again.attach_run(run_id)
        send_all(again, run)
    (found,) = MlflowTracker(paths).find(run_id)
    assert found.run_id != run_id == found.local_id
    assert _recorded(paths, run_id) == before
    (parent,) = MlflowTracker(paths).find(sweep)
    assert [info.run_id for info in MlflowTracker(paths).children(parent.run_id)] == [found.run_id]
    assert content != run.outbox.read_text()


def test_a_run_is_recorded_although_one_that_it_has_to_do_with_is_lost(paths: OutputPaths) -> None:
    origin = DeferredTracker(_mlflow(paths), paths).start_run("origin", {}).run_id
    tracker = DeferredTracker(_mlflow(paths), paths)
    tracker.start_run("fork", {})
    tracker.set_tags({"forked_to": "x"}, origin)
    MlflowTracker(paths)._client.delete_run(origin)
    tracker.deliver()
    assert not tracker.is_behind


def test_a_run_that_is_not_lost_is_not_registered_anew(paths: OutputPaths) -> None:
    tracker = DeferredTracker(_mlflow(paths), paths)
    run_id = tracker.start_run("digits", {}).run_id
    run = PathProvider(paths.output_dir, run_id)
    run.journal_sent.write_text("7")
    with locked(paths.database), pytest.raises(TrackerError, match="locked"):
        DeferredTracker(_mlflow(paths), paths).forget_lost(run_id)
    DeferredTracker(_mlflow(paths), paths).forget_lost(run_id)
    assert run.journal_sent.read_text() == "7"
    box = Outbox.load(run)
    assert box is not None and box.tracker_id == run_id


def test_a_run_does_not_write_into_another_one(paths: OutputPaths) -> None:
    victim, other = (DeferredTracker(_mlflow(paths), paths).start_run(name, {}).run_id for name in ("victim", "other"))
    MlflowTracker(paths).attach_run(victim)
    run = PathProvider(paths.output_dir, other)
    stored = json.loads(run.outbox.read_text())
    run.outbox.write_text(json.dumps({**stored, "tracker_id": victim}))
    with pytest.raises(TrackerError, match=f"run {other} names another run in the store: {victim}"):
        DeferredTracker(_mlflow(paths, require=True), paths).resume_run(other)
    run.outbox.write_text(json.dumps({**stored, "run_id": victim}))
    with pytest.raises(TrackerError, match=f"belongs to run {victim}, not to the run of this folder"):
        DeferredTracker(_mlflow(paths), paths).resume_run(other)
    (found,) = MlflowTracker(paths).find(victim)
    assert found.status == "RUNNING" and found.name == "victim"


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
        ("status", "RUNNING"),
        ("status", []),
        ("is_end_told", 1),
        ("version", -1),
    ],
)
def test_an_outbox_of_wrong_types_is_refused(tmp_path: Path, key: str, value: object) -> None:
    paths = OutputPaths(tmp_path)
    run = PathProvider(tmp_path, DeferredTracker(NoopTracker(), paths).start_run(None, {}).run_id)
    run.outbox.write_text(json.dumps({**json.loads(run.outbox.read_text()), key: value}))
    with pytest.raises(TrackerError, match=rf"tracker\.json is damaged: it does not fit its schema: .*\$\.{key}"):
        DeferredTracker(NoopTracker(), paths).resume_run(run.run_id)


def test_what_an_earlier_version_had_not_delivered_is_delivered(paths: OutputPaths) -> None:
    run_id = DeferredTracker(_mlflow(paths), paths).start_run("digits", {}).run_id
    run = PathProvider(paths.output_dir, run_id)
    stored = json.loads(run.outbox.read_text())
    del stored["version"], stored["told_version"]
    run.outbox.write_text(json.dumps({**stored, "params": {"lr": "0.1"}}))
    _deliver(paths, run_id)
    assert MlflowTracker(paths)._client.get_run(run_id).data.params == {"lr": "0.1"}


def test_nothing_is_written_after_it_was_closed(tmp_path: Path) -> None:
    paths = OutputPaths(tmp_path)
    tracker = DeferredTracker(NoopTracker(), paths)
    run = PathProvider(tmp_path, tracker.start_run(None, {}).run_id)
    tracker.close()
    tracker.end_run(EndStatus.FINISHED)
    box = Outbox.load(run)
    assert box is not None
    assert box.status is None


def test_a_damaged_outbox_is_said(tmp_path: Path) -> None:
    paths = OutputPaths(tmp_path)
    run = PathProvider(tmp_path, DeferredTracker(NoopTracker(), paths).start_run(None, {}).run_id)
    for damage in ("", "[]", '{"inputs": [1]}', '{"inputs": [], "run_id": "a", "what": 1}'):
        run.outbox.write_text(damage)
        with pytest.raises(TrackerError, match=r"tracker\.json is damaged"):
            DeferredTracker(NoopTracker(), paths).resume_run(run.run_id)


def test_files_are_stored_in_the_folder_and_counted(tmp_path: Path) -> None:
    tracker = DeferredTracker(NoopTracker(), OutputPaths(tmp_path / "outputs"))
    run_id = tracker.start_run(None, {}).run_id
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
    assert tracker.file_changes == 4
    with pytest.raises(TrackerError):
        tracker.download("nothing", tmp_path / "there")


def test_a_lock_in_the_middle_is_waited_for_briefly(paths: OutputPaths) -> None:
    tracker = _mlflow(paths)
    tracker.start_run("digits", {})
    tracker.log_points([Point("a", 1, 1, 1)])
    with locked(paths.database):
        begun = time.monotonic()
        with pytest.raises(TrackerError, match="database is locked"):
            tracker.log_points([Point("a", 1, 2, 1)])
        assert time.monotonic() - begun < 15  # MLflow by itself waits for 20 s
    tracker.log_points([Point("a", 1, 2, 1)])
    with closing(sqlite3.connect(paths.database)) as database:
        assert database.execute("select count(*) from metrics").fetchall() == [(2,)]
