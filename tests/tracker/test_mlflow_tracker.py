import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ksuit_runner.delivery.binding import Binding
from ksuit_runner.delivery.metric_sender import MetricSender
from ksuit_runner.errors import ConfigError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import Point
from ksuit_runner.tracker import mlflow_client, mlflow_database
from ksuit_runner.tracker.base import START_TAG, DatasetInfo, EndStatus, ModelVersion
from ksuit_runner.tracker.mlflow import MlflowTracker


def test_importing_it_imports_no_mlflow() -> None:
    code = "import sys, ksuit_runner.tracker.mlflow; print('mlflow' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "False\n"


def test_a_run_from_start_to_end(paths: OutputPaths, tracker: MlflowTracker) -> None:
    run = tracker.run
    assert (run.name, run.status, run.tags["author"], run.parent_run_id) == ("digits", "RUNNING", "me", None)
    assert abs(run.start_time / 1000 - time.time()) < 600
    tracker.end_run(EndStatus.KILLED)
    other = MlflowTracker(paths)
    assert other.find(run.run_id)[0].status == "KILLED"
    assert other.resume_run(run.run_id).status == "RUNNING"
    other.end_run(EndStatus.FINISHED)
    assert other.find("digits")[0].status == "FINISHED"


def test_two_trackers_in_one_process_do_not_mix(paths: OutputPaths, tracker: MlflowTracker, tmp_path: Path) -> None:
    shutil.copytree(paths.output_dir, tmp_path / "other")
    other = MlflowTracker(OutputPaths(tmp_path / "other"))
    other.start_run("other", {})
    tracker.log_points([Point("a", 1, 1, 1)])
    assert other.last_steps() == {}
    assert tracker.last_steps() == {"a": 1}
    assert tracker.find("other") == []


def test_points_come_back_exactly_and_once(tracker: MlflowTracker) -> None:
    points = [Point("a", value, step, 5) for step, value in enumerate([0.1, 1e-300, math.inf, -math.inf, 1 / 3])]
    tracker.log_points(points[:3])
    tracker.log_points(points)  # what was sent before changes nothing
    tracker.log_points(points)
    assert tracker.history("a") == points
    assert tracker.last_steps() == {"a": 4}


def test_nan_is_kept_once(tracker: MlflowTracker) -> None:
    for _ in range(2):
        tracker.log_points([Point("a", math.nan, 1, 5), Point("b", 1, 1, 5)])
    (point,) = tracker.history("a")
    assert math.isnan(point.value)


def test_history_is_ordered_by_step(tracker: MlflowTracker) -> None:
    tracker.log_points([Point("a", step, step, 100 - step) for step in (3, 1, 2)])
    assert [point.step for point in tracker.history("a")] == [1, 2, 3]
    assert tracker.history("unknown") == []


def test_params_are_cut_and_keep_their_first_value(paths: OutputPaths, tracker: MlflowTracker) -> None:
    tracker.log_params({f"p{i}": i for i in range(250)} | {"long": "x" * 7000})
    tracker.log_params({"p0": "another", "new": None})
    params = tracker._client.get_run(tracker.run_id).data.params
    assert (params["p0"], params["p249"], params["new"]) == ("0", "249", "None")
    assert params["long"] == "x" * 6000
    assert len(params) == 252


def test_tags(tracker: MlflowTracker) -> None:
    tracker.set_tags({f"t{i}": str(i) for i in range(150)} | {"long": "x" * 9000, "author": "you"})
    (run,) = tracker.find(tracker.run_id)
    assert (run.tags["t149"], run.tags["author"], len(run.tags["long"])) == ("149", "you", 8000)


def test_datasets_are_inputs_of_the_run_and_logged_again_stay_one(paths: OutputPaths, tracker: MlflowTracker) -> None:
    from sqlalchemy import event

    another, statements = MlflowTracker(paths), list[str]()
    another.attach_run(tracker.run_id)
    info = DatasetInfo("digits", "training", "c0ffee" * 10, "sklearn.datasets.load_digits", '{"samples": 1437}')
    for one in (tracker, another):
        one.log_inputs([info])
    engine = mlflow_database._engine(tracker._client.tracking_uri)

    def note(connection: Any, cursor: Any, statement: str, *given: Any) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        tracker.log_inputs([info])
        assert not statements, "it has logged that, and need not ask"
        tracker.resume_run(tracker.run_id)
        tracker.log_inputs([info])
        assert statements
    finally:
        event.remove(engine, "before_cursor_execute", note)
    (found,) = tracker._client.get_run(tracker.run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.profile) == ("digits", info.profile)
    assert info.digest.startswith(found.dataset.digest)
    assert json.loads(found.dataset.source) == {"uri": info.source}
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]


def test_a_version_of_a_model_is_registered_once_and_gets_the_alias(tracker: MlflowTracker) -> None:
    first, second = (ModelVersion(f"models/{name}", "digits", "champion") for name in "ab")
    for version in (first, first, second, first):
        tracker.register_model(version)
    client = tracker._client
    assert len(client.search_model_versions("name = 'digits'")) == 2
    version = client.get_model_version_by_alias("digits", "champion")
    assert (str(version.version), version.run_id) == ("1", tracker.run_id)
    assert version.source.endswith(f"{tracker.run_id}/artifacts/models/a")


def test_a_checkpoint_is_listed_as_the_model_of_its_run_once_and_a_better_one_takes_its_place(
    tracker: MlflowTracker, paths: OutputPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.log_points([Point("accuracy/test/ema", step / 8, step, 1000 + step) for step in range(4)])
    client, run_id = tracker._client, tracker.run_id
    experiment = client.get_run(run_id).info.experiment_id
    for update in (1, 1, 3):
        version = ModelVersion(
            f"checkpoints/E0_U{update}_S8", "best/of all", chosen_by=("accuracy/test/ema", "missing")
        )
        tracker.register_model(version)
        (model,) = client.search_logged_models([experiment])
        assert (model.name, model.status, model.source_run_id) == ("best_of all", "READY", run_id)
        assert model.artifact_location == str(PathProvider(paths.output_dir, run_id).artifacts_dir / version.path)
        assert model.tags["ksuit.files"] == f"runs:/{run_id}/{version.path}"
        assert f"export={run_id}@best/of all export_as=mlflow" in model.tags["mlflow.note.content"]
        assert [(metric.key, metric.value, metric.step) for metric in model.metrics] == [
            ("accuracy/test ema", update / 8, update)
        ]
    asked, ask = [], client.get_metric_history
    monkeypatch.setattr(client, "get_metric_history", lambda *names: asked.append(names) or ask(*names))
    assert [point.value for point in tracker.history("accuracy/test/ema")] == [step / 8 for step in range(4)]
    assert asked == [(run_id, "accuracy/test ema")], "not by its name of before"
    assert model.model_id in [output.model_id for output in client.get_run(run_id).outputs.model_outputs]


def test_a_run_of_before_the_names_were_changed_keeps_them(tracker: MlflowTracker, paths: OutputPaths) -> None:
    client = tracker._client
    client.log_metric(tracker.run_id, "accuracy/test/ema", 0.5, 1000, 1)
    again = MlflowTracker(paths)
    again.resume_run(tracker.run_id)
    again.log_points([Point("accuracy/test/ema", 0.75, 2, 2000), Point("loss/test/ema", 0.25, 2, 2000)])
    assert sorted(client.get_run(tracker.run_id).data.metrics) == ["accuracy/test/ema", "loss/test ema"]
    assert [(point.key, point.value) for point in again.history("accuracy/test/ema")] == [
        ("accuracy/test/ema", 0.5),
        ("accuracy/test/ema", 0.75),
    ]
    assert again.last_steps() == {"accuracy/test/ema": 2, "loss/test/ema": 2}


def test_an_experiment_of_before_gets_the_kind_of_new_ones_but_keeps_its_own(paths: OutputPaths) -> None:
    client = MlflowTracker(paths)._client
    client.create_experiment("plain")
    client.create_experiment("agents", tags={"mlflow.experimentKind": "genai_development"})
    for name, kind in (("plain", "custom_model_development"), ("agents", "genai_development")):
        MlflowTracker(paths, experiment=name)._experiment_id()
        assert client.get_experiment_by_name(name).tags["mlflow.experimentKind"] == kind


def test_two_runs_may_add_the_same_dataset_at_once(paths: OutputPaths, tracker: MlflowTracker) -> None:
    from sqlalchemy import event

    other, info = MlflowTracker(paths), DatasetInfo("digits", "training", "c0ffee", "somewhere")
    other.start_run("other", {})
    engine, quicker = mlflow_database._engine(tracker._client.tracking_uri), [other]

    def overtake(connection: Any, cursor: Any, statement: str, *given: Any) -> None:
        if statement.startswith("INSERT INTO datasets") and quicker:
            quicker.pop().log_inputs([info])

    event.listen(engine, "before_cursor_execute", overtake)
    try:
        tracker.log_inputs([info])
    finally:
        event.remove(engine, "before_cursor_execute", overtake)
    assert not quicker
    inputs = [tracker._client.get_run(one.run_id).inputs.dataset_inputs for one in (tracker, other)]
    assert [[found.dataset.digest for found in of_run] for of_run in inputs] == [["c0ffee"], ["c0ffee"]]


def test_what_a_tracker_is_given_counts_and_what_the_environment_says_counts_more(
    paths: OutputPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    monkeypatch.setattr(mlflow_client, "_our_settings", {})
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)
    for timeout_s in (3, 60):  # of two runs in one process
        MlflowTracker(paths, timeout_s=timeout_s).find("last")
        assert [os.environ[variable] for variable in variables] == [str(timeout_s), "0"]
    monkeypatch.setenv(variables[0], "7")
    MlflowTracker(paths, timeout_s=3).find("last")
    assert os.environ[variables[0]] == "7"


def test_local_artifacts_lie_where_the_run_writes_them(paths: OutputPaths, tracker: MlflowTracker) -> None:
    run = PathProvider(paths.output_dir, tracker.run_id)
    assert tracker.artifacts_are_local
    run.checkpoints_dir.mkdir(parents=True)
    (run.checkpoints_dir / "weights").write_bytes(b"123")
    before = (run.checkpoints_dir / "weights").stat().st_ino
    tracker.upload(run.checkpoints_dir, "checkpoints")  # is there already
    assert (run.checkpoints_dir / "weights").stat().st_ino == before
    assert tracker.list_artifacts() == ["checkpoints"]
    assert tracker.list_artifacts("checkpoints") == ["checkpoints/weights"]


def test_artifacts_are_stored_read_and_deleted(
    tracker: MlflowTracker, check_artifacts: Callable[[MlflowTracker], None]
) -> None:
    check_artifacts(tracker)


def test_errors_are_one_line(paths: OutputPaths) -> None:
    tracker = MlflowTracker(paths)
    for call in (lambda: tracker.resume_run("0" * 32), lambda: tracker.last_steps("0" * 32)):
        with pytest.raises(TrackerError, match="0000") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "x" * 251, "@" * 63])
def test_refuses_the_keys_whose_length_mlflow_refuses(tracker: MlflowTracker, key: str) -> None:
    with pytest.raises(TrackerError):
        tracker.log_points([Point(key, 1, 1, 1)])
    with pytest.raises(ConfigError, match="a name has 1 to 250 characters in MLflow, not (0|25.)"):
        tracker.check_key(key)


PLAIN = ("accuracy/test", "lr", "a:h", "größe", "x" * 250, "a..b", "a.b-c_d")
KEYS = (
    *PLAIN,
    "accuracy/test/ema",
    "a b/c/d e",
    "recall@5 (macro)",
    "a[0]",
    "50%",
    "a//b",
    "/a",
    "../a",
    ".",
    "a/",
    "..a",
    "a/./b",
    "a\n",
    "\ud800",
    "a:40:",
)


def test_metrics_of_any_name_come_back_under_it(tracker: MlflowTracker) -> None:
    for step, key in enumerate(KEYS):
        tracker.check_key(key)
        tracker.log_points([Point(key, step / 7, step, 1)])
    assert tracker.last_steps() == {key: step for step, key in enumerate(KEYS)}
    assert [tracker.history(key) for key in KEYS] == [[Point(key, i / 7, i, 1)] for i, key in enumerate(KEYS)]
    names = tracker._client.get_run(tracker.run_id).data.metrics.keys()
    assert {*PLAIN, "accuracy/test ema"} <= names, "MLflow's page has one section for both accuracies"


def test_params_and_tags_of_any_name_are_recorded(tracker: MlflowTracker) -> None:
    keys = [*KEYS, "y" * 300, "y" * 301, ""]
    tracker.log_params({key: "z" * 7000 for key in keys})
    tracker.log_params({key: "again" for key in keys})  # MLflow would refuse another value
    tracker.set_tags({key: "tag" for key in keys})
    params = tracker._client.get_run(tracker.run_id).data.params
    assert len(params) == len(keys) and set(params.values()) == {"z" * 6000}
    (found,) = tracker.find(tracker.run_id)
    assert {key for key, value in found.tags.items() if value == "tag"} >= set(KEYS)


def test_where_says_how_to_look(paths: OutputPaths) -> None:
    assert str(paths.database) in MlflowTracker(paths).where()


def test_nothing_is_printed(paths: OutputPaths, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = MlflowTracker(paths)
    tracker.start_run(None, {})
    tracker.log_params({"a": 1})
    tracker.end_run(EndStatus.FINISHED)
    assert capfd.readouterr() == ("", "")


def test_a_start_that_was_not_acknowledged_is_repeated_and_makes_no_second_run(paths: OutputPaths) -> None:
    tags = {START_TAG: "a" * 32}
    first = MlflowTracker(paths).start_run("early", tags)
    again = MlflowTracker(paths).start_run("early", tags, start_time=7)
    assert again.run_id == again.local_id == first.run_id


def test_a_file_store_is_refused(paths: OutputPaths, tmp_path: Path) -> None:
    with pytest.raises(TrackerError):
        MlflowTracker(paths, f"file://{tmp_path}/mlruns").start_run(None, {})


def test_the_position_is_lost_and_all_is_sent_again(paths: OutputPaths, tracker: MlflowTracker) -> None:
    run = PathProvider(paths.output_dir, tracker.run_id)
    journal = Journal(run.journal)
    for step in range(1, 401):
        journal.append(step, {"a": step / 7, "b": math.nan, "c": -step})
    sender = MetricSender(journal, run.journal_sent, Binding(tracker, run, lambda: None))
    assert sender.flush(60) and sender.pending() == 0
    sender.close()
    run.journal_sent.unlink()
    journal.append(401, {"a": 0.0})
    again = MlflowTracker(paths)
    again.resume_run(tracker.run_id)
    sender = MetricSender(journal, run.journal_sent, Binding(again, run, lambda: None))
    assert sender.flush(60) and sender.pending() == 0
    sender.close()
    expected = [point for points, _ in journal.read() for point in points]
    for key in "ac":
        assert again.history(key) == [point for point in expected if point.key == key]
    assert [point.step for point in again.history("b")] == list(range(1, 401))
