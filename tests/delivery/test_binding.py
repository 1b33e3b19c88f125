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

from ksuit_runner.delivery.binding import Binding
from ksuit_runner.delivery.delivered import read_state
from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.delivery.recording import Recording
from ksuit_runner.errors import LostRunError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import Point
from ksuit_runner.record.stored_run import find_local
from ksuit_runner.tracker.base import RUN_ID_TAG, START_TAG, DatasetInfo, EndStatus, ModelVersion, RunInfo
from ksuit_runner.tracker.mlflow import MlflowTracker


def _mlflow(paths: OutputPaths, require: bool = False) -> MlflowTracker:
    return MlflowTracker(paths, timeout_s=0.1, require=require)


def _begun_in_an_outage(paths: OutputPaths, name: str = "early", parent: str | None = None) -> str:
    """Begin a run while the store is locked, and end it; return its id."""
    with locked(paths.database):
        tracker = RecordedTracker(_mlflow(paths), paths)
        run_id = tracker.start_run(name, {"author": "me"}, parent).run_id
        assert not tracker.is_reached
        tracker.log_params({"lr": 0.1})
        tracker.set_tags({"command": "x"})
        tracker.log_inputs([DatasetInfo("digits", "training", "c0ffee", "somewhere")])
        tracker.end_run(EndStatus.FAILED)
        with pytest.raises(TrackerError, match="database is locked"):
            _binding(tracker).deliver()
    return run_id


def _binding(tracker: RecordedTracker) -> Binding:
    """Return what delivers the run of a tracker from the run's folder."""
    return Binding(tracker.store, tracker._paths(tracker.run_id), tracker.check_owner)


def _deliver(paths: OutputPaths, run_id: str, store: MlflowTracker | None = None) -> Binding:
    store, run = store or _mlflow(paths), PathProvider(paths.output_dir, run_id)
    binding = Binding(store, run, lambda: None)
    binding.mark_if_killed()
    binding.deliver()
    binding.deliver_end()
    return binding


@pytest.mark.parametrize("is_evaluated", [False, True])
def test_a_killed_run_ended_in_the_store_when_it_last_logged_something(paths: OutputPaths, is_evaluated: bool) -> None:
    tracker = RecordedTracker(_mlflow(paths), paths)
    run_id = tracker.start_run("killed", {}).run_id
    run, logged_at = PathProvider(paths.output_dir, run_id), tracker.run.start_time + 1
    Journal(run.journal).append(1, {"loss": 1.0}, logged_at)
    time.sleep(0.05)
    if is_evaluated:  # by another process, before anybody has said that it was killed
        RecordedTracker(_mlflow(paths), paths).attach_run(run_id)
        Journal(run.journal).append(2, {"accuracy": 1.0})
    _deliver(paths, run_id)
    info = MlflowTracker(paths)._client.get_run(run_id).info
    assert (info.status, info.end_time) == ("KILLED", logged_at)


def test_without_an_outage_a_run_has_the_id_of_the_store(paths: OutputPaths) -> None:
    tracker = RecordedTracker(_mlflow(paths), paths)
    info = tracker.start_run("digits", {"author": "me"})
    tracker.log_params({"lr": 0.1})
    (found,) = MlflowTracker(paths).find(info.run_id)
    assert (found.name, found.status, found.local_id) == ("digits", "RUNNING", info.run_id)
    assert MlflowTracker(paths)._client.get_run(info.run_id).data.params == {}  # kept, for a thread that may wait
    binding = _binding(tracker)
    assert binding.is_behind
    binding.deliver()
    assert not binding.is_behind
    assert MlflowTracker(paths)._client.get_run(info.run_id).data.params == {"lr": "0.1"}


def test_a_run_that_requires_the_store_leaves_nothing_without_it(paths: OutputPaths) -> None:
    with locked(paths.database), pytest.raises(TrackerError, match="locked"):
        RecordedTracker(_mlflow(paths, require=True), paths).start_run("digits", {})
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


def test_a_model_is_registered_once_after_the_end_whatever_outages_there_are(paths: OutputPaths) -> None:
    model = ModelVersion("models/a", "digits", "champion")
    tracker = RecordedTracker(_mlflow(paths), paths)
    run_id = tracker.start_run("digits", {}).run_id
    tracker.register_model(model)
    binding = _binding(tracker)
    binding.deliver()
    binding.deliver_end()
    assert MlflowTracker(paths)._client.search_model_versions() == []  # its files may not be there yet
    tracker.end_run(EndStatus.FINISHED)
    with locked(paths.database), pytest.raises(TrackerError, match="locked"):
        _binding(tracker).deliver_end()
    assert binding.is_behind
    for _ in range(2):
        assert not _deliver(paths, run_id).is_behind
    version = MlflowTracker(paths)._client.get_model_version_by_alias("digits", "champion")
    assert (version.run_id, str(version.version)) == (run_id, "1")
    PathProvider(paths.output_dir, run_id).delivered.unlink()  # it was registered, and then the process was killed
    _deliver(paths, run_id)
    assert len(MlflowTracker(paths)._client.search_model_versions()) == 1


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
    run_id = RecordedTracker(Late(paths, require=False), paths).start_run("early", {}).run_id
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
    tracker = RecordedTracker(_mlflow(moved), moved)
    tracker.resume_run(run_id)
    binding = _binding(tracker)
    binding.bind()
    assert binding.artifacts_are_local and tracker.is_reached and tracker.artifacts_are_local


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
    tracker = RecordedTracker(_mlflow(paths), paths)
    run_id = tracker.start_run("digits", {}).run_id
    tracker.end_run(EndStatus.FINISHED)
    _binding(tracker).deliver_end()
    again = RecordedTracker(_mlflow(paths), paths)
    run = PathProvider(paths.output_dir, run_id)
    with locked(paths.database):
        with pytest.raises(TrackerError):
            Recording(_mlflow(paths, require=True), run).reach()
        Recording(again.store, run).reach()  # which need not be reached
        again.resume_run(run_id)
        assert again.status_before == "FINISHED" and not again.is_reached
        with pytest.raises(TrackerError, match="not been reached"):
            again.log_points([Point("a", 1, 1, 1)])
    binding = _binding(again)
    assert binding.is_behind
    binding.deliver()
    assert MlflowTracker(paths).find(run_id)[0].status == "RUNNING"
    again.log_points([Point("a", 1, 1, 1)])
    binding.log_points([Point("a", 2, 2, 2)])
    assert again.last_steps() == {"a": 2}
    again.end_run(EndStatus.KILLED)
    binding.deliver_end()
    assert MlflowTracker(paths).find(run_id)[0].status == "KILLED"


def test_the_end_of_a_run_that_was_resumed_out_of_reach_is_delivered_although_it_is_the_same(
    paths: OutputPaths,
) -> None:
    tracker = RecordedTracker(_mlflow(paths), paths)
    run_id = tracker.start_run("digits", {}).run_id
    tracker.end_run(EndStatus.FINISHED, 1)
    _binding(tracker).deliver_end()
    again = RecordedTracker(_mlflow(paths), paths)
    again.resume_run(run_id)
    again.end_run(EndStatus.FINISHED, 2)
    _deliver(paths, run_id)
    assert MlflowTracker(paths)._client.get_run(run_id).info.end_time == 2
    for _ in range(2):  # it is RUNNING after each resume, and KILLED without a time after each kill
        again = RecordedTracker(_mlflow(paths), paths)
        again.resume_run(run_id)
        _binding(again).deliver()
        assert MlflowTracker(paths).find(run_id)[0].status == "RUNNING"
        _deliver(paths, run_id)
        assert MlflowTracker(paths).find(run_id)[0].status == "KILLED"


def test_a_run_that_nobody_ended_was_killed(paths: OutputPaths) -> None:
    run_id = RecordedTracker(_mlflow(paths), paths).start_run("digits", {}).run_id
    _deliver(paths, run_id)
    assert MlflowTracker(paths).find(run_id)[0].status == "KILLED"


def test_a_run_of_before_there_were_outboxes_is_taken_up(paths: OutputPaths) -> None:
    old = MlflowTracker(paths)
    run_id = old.start_run("old", {}).run_id
    old.end_run(EndStatus.FINISHED)
    tracker = RecordedTracker(_mlflow(paths), paths)
    assert tracker.resume_run(run_id).name == "old"
    assert tracker.status_before == "FINISHED"


def test_a_run_is_withdrawn_once_although_that_could_not_be_noted(paths: OutputPaths) -> None:
    tracker = RecordedTracker(_mlflow(paths), paths)
    run_id = tracker.start_run("refused", {}).run_id
    tracker.delete_run()
    tracker.end_run(EndStatus.FAILED)
    folder = tracker._paths(run_id)
    binding = _binding(tracker)
    assert binding.is_behind
    for _ in range(2):  # the second time the tracker has deleted it, and this process does not know
        binding.deliver_end()
        folder.delivered.unlink()
        binding._delivery = None
    again = _deliver(paths, run_id)  # nor does another one
    assert not again.is_behind
    run = MlflowTracker(paths)._client.get_run(run_id)
    assert (run.info.status, run.info.lifecycle_stage) == ("FAILED", "deleted")
    assert run.data.tags["ksuit.exit"] == "refused before its first update"  # for a tracker that keeps it


def test_what_is_changed_while_it_is_delivered_is_delivered_next(paths: OutputPaths) -> None:
    class Slow(MlflowTracker):
        def set_tags(self, tags: Mapping[str, str], run_id: str | None = None) -> None:
            super().set_tags(tags, run_id)
            if tags == {"a": "1", "b": "1"}:
                tracker.set_tags({"a": "2"})  # meanwhile, by the training thread
                tracker.log_params({"late": 1})

    tracker = RecordedTracker(Slow(paths), paths)
    run_id = tracker.start_run("digits", {}).run_id
    tracker.set_tags({"a": "1", "b": "1"})
    binding = _binding(tracker)
    binding.deliver()
    assert binding.is_behind
    binding.deliver()
    assert not binding.is_behind
    assert MlflowTracker(paths).find(run_id)[0].tags["a"] == "2"
    assert MlflowTracker(paths)._client.get_run(run_id).data.params == {"late": "1"}


def test_datasets_that_are_noted_while_others_are_delivered_are_delivered_next(paths: OutputPaths) -> None:
    first, second = (DatasetInfo(name, "training", "c0ffee", "somewhere") for name in ("first", "second"))

    class Slow(MlflowTracker):
        def log_inputs(self, datasets: Sequence[DatasetInfo]) -> None:
            super().log_inputs(datasets)
            if list(datasets) == [first]:
                tracker.log_inputs([first, second])  # meanwhile, by the training thread

    tracker = RecordedTracker(Slow(paths), paths)
    run_id = tracker.start_run("digits", {}).run_id
    tracker.log_inputs([first])
    binding = _binding(tracker)
    binding.deliver()
    assert binding.is_behind
    binding.deliver()
    assert not binding.is_behind
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
    sweep = RecordedTracker(_mlflow(paths), paths).start_run("sweep", {"author": "me"}).run_id
    tracker = RecordedTracker(_mlflow(paths), paths)
    run_id = tracker.start_run("digits", {"author": "me"}, sweep).run_id
    tracker.log_params({"lr": 0.1})
    tracker.log_inputs([DatasetInfo("digits", "training", "c0ffee", "somewhere")])
    tracker.set_tags({"later": "x"})
    run = PathProvider(paths.output_dir, run_id)
    journal = Journal(run.journal)
    journal.append(1, {"a@b": 0.5, "c": math.inf}, timestamp=7)
    tracker.end_run(EndStatus.FINISHED)
    Recording(tracker.store, run).deliver_all()
    before = _recorded(paths, run_id)
    for lost in (run_id, sweep):
        MlflowTracker(paths)._client.delete_run(lost)
    for ask in (Recording.reach, Recording.deliver_all):
        with pytest.raises(LostRunError, match=f"{run_id} was deleted .* from .*{run_id}: register_anew=true"):
            ask(Recording(_mlflow(paths, require=True), run))
    content = run.outbox.read_text()
    for is_lost in (True, False):  # the second time it is there
        recording = Recording(_mlflow(paths, require=True), run)
        assert recording.forget_lost() is is_lost
        recording.deliver_all()
    (found,) = MlflowTracker(paths).find(run_id)
    assert found.run_id != run_id == found.local_id
    assert _recorded(paths, run_id) == before
    (parent,) = MlflowTracker(paths).find(sweep)
    assert [info.run_id for info in MlflowTracker(paths).children(parent.run_id)] == [found.run_id]
    assert content == run.outbox.read_text()


def test_a_run_is_recorded_although_one_that_it_has_to_do_with_is_lost(paths: OutputPaths) -> None:
    origin = RecordedTracker(_mlflow(paths), paths).start_run("origin", {}).run_id
    tracker = RecordedTracker(_mlflow(paths), paths)
    tracker.start_run("fork", {})
    tracker.set_tags({"forked_to": "x"}, origin)
    MlflowTracker(paths)._client.delete_run(origin)
    binding = _binding(tracker)
    binding.deliver()
    assert not binding.is_behind


def test_a_run_that_is_not_lost_is_not_registered_anew(paths: OutputPaths) -> None:
    tracker = RecordedTracker(_mlflow(paths), paths)
    run_id = tracker.start_run("digits", {}).run_id
    run = PathProvider(paths.output_dir, run_id)
    run.journal_sent.write_text("7")
    with locked(paths.database), pytest.raises(TrackerError, match="locked"):
        Recording(_mlflow(paths), run).forget_lost()
    assert not Recording(_mlflow(paths), run).forget_lost()
    assert run.journal_sent.read_text() == "7"
    state = read_state(run)
    assert state is not None and state.tracker_id == run_id


@pytest.mark.parametrize("file", ["outbox", "delivered"])
def test_a_run_does_not_write_into_another_one(paths: OutputPaths, file: str) -> None:
    victim, other = (RecordedTracker(_mlflow(paths), paths).start_run(name, {}).run_id for name in ("victim", "other"))
    run = PathProvider(paths.output_dir, other)
    _deliver(paths, other)
    run.delivered.rename(run.run_dir / "moved") if file == "outbox" else None
    path = getattr(run, file)
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "tracker_id": victim}))
    for is_anew in (False, True):
        recording = Recording(_mlflow(paths, require=True), run)
        assert not (is_anew and recording.forget_lost())  # which binds the tracker to it
        with pytest.raises(TrackerError, match=f"run {other} names another run in the store: {victim}"):
            recording.reach()
    (found,) = MlflowTracker(paths).find(victim)
    assert found.status == "RUNNING" and found.name == "victim"


def test_what_another_run_left_is_refused(paths: OutputPaths) -> None:
    victim, other = (RecordedTracker(_mlflow(paths), paths).start_run(name, {}).run_id for name in ("victim", "other"))
    run = PathProvider(paths.output_dir, other)
    run.outbox.write_text(json.dumps({**json.loads(run.outbox.read_text()), "run_id": victim}))
    for refused in (Recording(_mlflow(paths, require=True), run).reach, lambda: _resume(paths, other)):
        with pytest.raises(TrackerError, match=f"belongs to run {victim}, not to the run of this folder"):
            refused()


def _resume(paths: OutputPaths, run_id: str) -> None:
    RecordedTracker(_mlflow(paths), paths).resume_run(run_id)


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
