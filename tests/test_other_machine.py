"""A run whose machine is gone goes on at another one that has only the tracking server."""

import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from command import checkpoint_bytes, ksuit, run_dir, start, stop_at

ARGUMENTS = ("model=mlp", "model.dropout=0.2", "schedule=constant", "schedule.warmup=5", "trainer.max_epochs=300")


@pytest.fixture
def server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/store"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_for(uri)
        yield uri
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for(uri):
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=1):
                return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def uploaded(store: Path) -> list[Path]:
    return list(store.glob("*/*/artifacts/checkpoints/latest"))


@pytest.mark.slow
def test_run_goes_on_with_nothing_but_the_tracking_uri(tmp_path, server):
    gone, other, undisturbed = tmp_path / "gone", tmp_path / "other", tmp_path / "undisturbed"
    tracker = f"tracker.uri={server}"
    process = start(gone, *ARGUMENTS, tracker)
    while not uploaded(tmp_path / "store"):
        assert process.poll() is None
        time.sleep(0.02)
    stop_at(process, gone, update=400)
    run_id = run_dir(gone).name
    ksuit(other, tracker, f"resume={run_id}", "trainer.max_epochs=320")
    ksuit(undisturbed, *ARGUMENTS, "tracker=noop", "trainer.max_epochs=320")
    last = "E320_U7040_S450560/model.safetensors"
    assert checkpoint_bytes(run_dir(other))[last] == checkpoint_bytes(run_dir(undisturbed))[last]
    connection = sqlite3.connect(tmp_path / "server.db")
    rows = connection.execute("select key, step from metrics").fetchall()
    status = connection.execute("select status from runs").fetchall()
    connection.close()
    assert len(rows) == len(set(rows))
    assert {step for key, step in rows if key == "accuracy/test"} == set(range(22, 7041, 22))
    assert status == [("FINISHED",)]
