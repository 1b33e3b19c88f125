import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from ksuit_runner.errors import TrackerError
from ksuit_runner.journal import Journal
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.sender import MetricSender
from ksuit_runner.tracker import embedded
from ksuit_runner.tracker.mlflow import MlflowTracker


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_that_is_not_there(paths: OutputPaths, caplog: pytest.LogCaptureFixture) -> None:
    uri = f"http://127.0.0.1:{_free_port()}"
    with pytest.raises(TrackerError, match=f"cannot be reached: {uri}") as caught:
        MlflowTracker(paths, uri).start_run(None, {})
    assert "\n" not in str(caught.value)
    with pytest.raises(TrackerError, match="cannot be reached"):
        MlflowTracker(paths, uri).find("last")

    optional = MlflowTracker(paths, uri, require=False)
    run_id = optional.start_run("offline", {}).run_id
    assert "the output folder's own store is used instead" in caplog.text
    assert optional.artifacts_are_local
    later = MlflowTracker(paths, uri, require=False)
    assert [run.run_id for run in later.find("offline")] == [run_id]
    assert later.resume_run(run_id).name == "offline"


class Server:
    """A real ``mlflow server`` over an SQLite database, which can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        embedded.open_store(OutputPaths(folder))
        self.folder = folder
        self.port = _free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(600):
            try:
                with urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (URLError, ConnectionError, TimeoutError):
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.1)
        raise AssertionError((self.folder / "server.log").read_text())

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own process group: the server and its worker
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "server")
    server.start()
    yield server
    server.stop()


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back(
    server: Server,
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
    sender = MetricSender(journal, run.journal_sent, tracker, interval_s=0.01)
    for step in range(1, 101):
        journal.append(step, {"a": step / 3, "b": math.inf})
        if step == 30:
            assert sender.flush(60)
            server.stop()
        if step == 60:
            assert not sender.flush(1)
            server.start()
    assert sender.close(60) == 0
    tracker.end_run("FINISHED")

    assert tracker.history("a") == [p for points, _ in journal.read() for p in points if p.key == "a"]
    assert [point.step for point in tracker.history("b")] == list(range(1, 101))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    other = MlflowTracker(OutputPaths(tmp_path / "empty"), server.uri, experiment="remote")
    assert [found.run_id for found in other.find("last")] == [run.run_id]
    assert [found.status for found in other.find(run.run_id[:8])] == ["FINISHED"]
    assert not (tmp_path / "empty").exists()
