"""What a metric costs the training thread, and how fast the points reach MLflow: SQLite and a server."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from ksuit_runner.config.factory import Factory
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.delivery.metric_sender import read_offset
from ksuit_runner.engine.run_record import RunRecord
from ksuit_runner.log_writer import LogWriter
from ksuit_runner.metric_property import MetricPropertyProvider
from ksuit_runner.paths import OutputPaths
from ksuit_runner.record.provenance import Provenance
from ksuit_runner.record.stored_run import Launch
from ksuit_runner.recorder.remote import RemoteRecording
from ksuit_runner.recorder.tracker import open_tracker
from ksuit_runner.tracker.base import EndStatus

from .measure import Scale, Spread
from .result import Result, Value

MLFLOW = "ksuit_runner.tracker.mlflow.MlflowTracker"
KEYS = [f"group_{i}/metric" for i in range(10)]
"""Metrics per update."""


def measure(scale: Scale, folder: Path) -> Result:
    points = scale.pick(1_000_000, 2_000)
    result = Result(f"Metric logging: {points:,} scalars, {len(KEYS)} per update")
    _log_all(result, "SQLite", {}, folder / "sqlite", points)
    with _server(folder) as uri:
        settings = {"uri": uri, "timeout_s": 30, "artifact_root": str(folder / "artifacts")}
        _log_all(result, "mlflow server", settings, folder / "server", points)
    return result


def _log_all(result: Result, store: str, settings: Mapping[str, Any], folder: Path, points: int) -> None:
    config = {"name": None, "parent_run_id": None, "tracker": {"_target_": MLFLOW, "close_timeout_s": 3600, **settings}}
    outputs = OutputPaths(folder)
    tracker = open_tracker(Factory(config), outputs)
    record = RunRecord.begin(tracker, outputs, config, Launch("benchmark", []), Provenance(), RemoteRecording)
    counter = UpdateCounter(1, 1, max_updates=points)
    writer = LogWriter(
        record.journal,
        counter,
        MetricPropertyProvider(),
        record.tracker.check_key,
        lambda *point: False,
        record.paths.artifacts_dir,
    )
    process = psutil.Process()
    before, costs, start = process.memory_info().rss, [], perf_counter()
    for _ in range(20):
        costs.append(_log(writer, counter, points // 20))
    logged = perf_counter() - start
    growth = (process.memory_info().rss - before) / 1e6
    sent = read_offset(record.paths.journal_sent) / record.journal.size
    record.close(EndStatus.FINISHED)
    seconds = perf_counter() - start
    assert read_offset(record.paths.journal_sent) == record.journal.size
    result.add(f"{store}: cost per scalar in the training thread", Spread.of(costs), "us")
    result.values.append(Value(f"{store}: rows per second at the store", _one(points / seconds), "rows/s"))
    result.aim(f"{store}: cost per scalar", Spread.of(costs).scaled(1e6), 3.0, "us")
    result.notes.append(
        f"{store}: all logged after {logged:.1f} s, {100 * sent:.0f}% of them sent by then; all sent after "
        f"{seconds:.1f} s; memory of the training process grew by {growth:.0f} MB"
    )


def _log(writer: LogWriter, counter: UpdateCounter, points: int) -> float:
    start = perf_counter()
    for _ in range(points // len(KEYS)):
        counter.update += 1
        for number, key in enumerate(KEYS):
            writer.add_scalar(key, 0.1 * number + counter.update)
        writer.flush()
    return (perf_counter() - start) / points


def _one(value: float) -> Spread:
    return Spread(value, value, value)


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = f"sqlite:///{folder / 'server.db'}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--default-artifact-root", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.terminate()
        process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "mlflow server ended at its start"
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise TimeoutError(url)
