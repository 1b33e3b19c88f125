"""Sixteen jobs at once against one store: the embedded SQLite database, and a server on PostgreSQL."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from command import is_measured, journal, run_dirs
from preloaded import ksuit
from servers import MlflowServer, free_port

pytestmark = pytest.mark.slow

# A launcher of the project's own: its processes and their recorders share what was imported before they were forked, so
# that 16 of them start on a small machine as if at once.
FORKING = """
from concurrent.futures import ProcessPoolExecutor

from forked_recorder import fork_recorders
from ksuit_runner.launchers.base import Launcher
from preloaded import context


def nothing(number, training):
    pass


class ForkLauncher(Launcher):
    max_jobs = 16

    def open(self, sweep_paths):
        self._pool = ProcessPoolExecutor(self.max_jobs, context(), fork_recorders, (nothing,))

    def submit(self, function, task):
        return self._pool.submit(function, task)

    def close(self):
        self._pool.shutdown()
"""
SWEEP = (
    *("launcher=fork", "model=linear", "callbacks=[accuracy]", "trainer.max_epochs=1", "checkpoint=at_end"),
    *("objective=accuracy/validation", "optimizer.lr=1e-3,3e-3,1e-2,3e-2", "seed=range(0,4)"),
    *("tracker.timeout_s=60", "tracker.close_timeout_s=120"),  # it is about what is recorded, not about how soon
)
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    (folder / "conf" / "launcher").mkdir(parents=True)
    (folder / "conf" / "launcher" / "fork.yaml").write_text("_target_: forking.ForkLauncher\n")
    (folder / "forking.py").write_text(FORKING)
    return folder


def check(output: str, output_dir: Path, uri: str) -> None:
    """Compare what every run has in its journal with what the store has."""
    from ksuit_runner.paths import OutputPaths
    from ksuit_runner.tracker.mlflow import MlflowTracker

    assert "error" not in output.lower() and "traceback" not in output.lower()
    tracker = MlflowTracker(OutputPaths(output_dir), uri)
    (parent,) = tracker.find("sweep")
    children = tracker.children(parent.run_id)
    assert [info.status for info in [parent, *children]] == ["FINISHED"] * 17
    assert len({info.tags["ksuit.job"] for info in children}) == 16
    for info in children:
        written = journal(output_dir / "runs" / info.run_id)
        stored = {}
        for key in {key for key, _ in written}:
            points = tracker.history(key, info.run_id)
            stored |= {(key, point.step): None if is_measured(key) else point.value for point in points}
            assert len({point.step for point in points}) == len(points)
        assert stored == written
        assert len(written) == 7


def test_sixteen_jobs_at_once_on_sqlite(project, tmp_path):
    output_dir = tmp_path / "outputs"
    output = ksuit(output_dir, "-m", *SWEEP, cwd=project)
    assert len([path for path in run_dirs(output_dir) if (path / "metrics.jsonl").exists()]) == 16
    check(output, output_dir, f"sqlite:///{output_dir / 'mlflow.db'}")


@pytest.fixture
def postgres() -> Iterator[str]:
    """Start PostgreSQL in a folder of its own, as a user that is not root, and yield its URI."""
    if not BINARIES:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    if find_spec("psycopg2") is None:
        pytest.skip("psycopg2 is not installed: pip install psycopg2-binary")
    user = "postgres" if os.geteuid() == 0 else None
    # Outside of pytest's folder, which only the user who runs the tests may enter.
    folder = Path(tempfile.mkdtemp(prefix="ksuit-postgres-"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        binaries, data, port = BINARIES[-1].parent, folder / "data", free_port()
        options = {"user": user, "cwd": folder, "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}}
        initdb = (
            binaries / "initdb",
            "--pgdata",
            data,
            "--username",
            "ksuit",
            "--auth",
            "trust",
            "--no-sync",
            "--encoding",
            "UTF8",
        )
        subprocess.run(initdb, check=True, capture_output=True, **options)
        settings = (f"unix_socket_directories={folder}", "listen_addresses=127.0.0.1", "fsync=off")
        command = [binaries / "postgres", "-D", data, "-p", str(port), *(f"--{item}" for item in settings)]
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, **options)
        try:
            wait_for_port(port, server)
            yield f"postgresql+psycopg2://ksuit@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # its fast shutdown
            server.wait(timeout=60)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def server(postgres: str, tmp_path: Path) -> Iterator[str]:
    """Start ``mlflow server`` on PostgreSQL and yield its URI."""
    server = MlflowServer(tmp_path / "server", postgres, workers=2)
    try:
        server.start()
        yield server.uri
    finally:
        server.stop()


def wait_for_port(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


@pytest.mark.soak
def test_sixteen_jobs_at_once_on_a_server_with_postgresql(project, server, tmp_path):
    output_dir = tmp_path / "outputs"
    output = ksuit(output_dir, "-m", *SWEEP, f"tracker.uri={server}", cwd=project)
    check(output, output_dir, server)
