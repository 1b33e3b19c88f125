import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from servers import MlflowServer, answering_500, free_port, never_answering

from ksuit_runner.delivery.binding import Binding
from ksuit_runner.delivery.metric_sender import MetricSender
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.tracker.base import EndStatus, ModelVersion
from ksuit_runner.tracker.mlflow import MlflowTracker
from ksuit_runner.tracker.mlflow_client import connect, log_datasets


def test_servers_that_do_not_answer_are_named_in_one_line(paths: OutputPaths) -> None:
    with answering_500() as broken, never_answering() as silent:
        down = f"http://127.0.0.1:{free_port()}"
        for uri, said in ((down, "cannot be reached"), (broken, "answers with errors"), (silent, "did not answer")):
            tracker = MlflowTracker(paths, uri, timeout_s=1)
            for call in (lambda: tracker.start_run(None, {}), lambda: tracker.find("last")):  # noqa: B023
                with pytest.raises(TrackerError, match=f"^MLflow {said}.*: {uri}/[^?]*$") as caught:
                    call()
                assert "\n" not in str(caught.value)


def test_a_server_that_fails_once_at_a_dataset_is_asked_again() -> None:
    client = MagicMock()
    with answering_500() as broken, pytest.raises(Exception, match="500") as failed:
        connect(broken, 5).log_inputs("id", [])
    client.log_inputs.side_effect = [failed.value, None]
    log_datasets(client, "id", [])
    assert client.log_inputs.call_count == 2
    client.log_inputs.side_effect = [failed.value, failed.value]
    with pytest.raises(Exception, match="500"):
        log_datasets(client, "id", [])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "server")
    server.start()
    yield server
    server.stop()


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back(
    server: MlflowServer,
    paths: OutputPaths,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    check_artifacts: Callable[[MlflowTracker], None],
) -> None:
    tracker = MlflowTracker(paths, server.uri, experiment="remote")
    run = PathProvider(paths.output_dir, tracker.start_run("remote", {"a": "b"}).run_id)
    tracker.log_params({"lr": 0.1})
    assert not tracker.artifacts_are_local
    assert run.run_id in tracker.where()
    check_artifacts(tracker)

    journal = Journal(run.journal)
    is_back = threading.Event()
    binding = Binding(tracker, run, lambda: None)
    sender = MetricSender(journal, run.journal_sent, binding, is_back.set, interval_s=0.01)
    for step in range(1, 101):
        journal.append(step, {"a": step / 3, "b": math.inf})
        if step == 30:
            assert sender.flush(60)
            server.stop()
        if step == 60:
            assert not sender.flush(1)
            server.start()
    assert is_back.wait(60) and sender.flush(60) and sender.pending() == 0
    sender.close()
    tracker.end_run(EndStatus.FINISHED)

    assert tracker.history("a") == [p for points, _ in journal.read() for p in points if p.key == "a"]
    assert [point.step for point in tracker.history("b")] == list(range(1, 101))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    (run.artifacts_dir / "models" / "a").mkdir(parents=True)
    (run.artifacts_dir / "models" / "a" / "MLmodel").write_text("flavors: {}")
    for name, export, files in (("E1_U30_S60", "models/a", ["MLmodel"]), ("E1_U90_S180", None, [])):
        tracker.register_model(ModelVersion(f"checkpoints/{name}", "best", chosen_by=("a",), export=export))
        (model,) = tracker._client.search_logged_models([tracker._experiment_id()])
        assert [file.path for file in tracker._client.list_logged_model_artifacts(model.model_id)] == files
        assert model.tags["ksuit.files"] == f"runs:/{run.run_id}/{export or f'checkpoints/{name}'}"

    other = MlflowTracker(OutputPaths(tmp_path / "empty"), server.uri, experiment="remote")
    assert [found.run_id for found in other.find("last")] == [run.run_id]
    assert [found.status for found in other.find(run.run_id[:8])] == ["FINISHED"]
    assert not (tmp_path / "empty").exists()
