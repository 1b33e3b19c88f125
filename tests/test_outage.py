"""A tracker that is away: training does not notice, nothing is lost, and what is missing is said."""

import os
import re
import signal
import time

import pytest
from command import is_measured, journal, last_step, mlflow_points, query, run_dir, wait_until
from pausing import make_project
from preloaded import ksuit, start
from servers import MlflowServer, Proxy, locked, never_answering

from ksuit_runner.paths import OutputPaths
from ksuit_runner.tracker import mlflow_store as embedded
from ksuit_runner.tracker.mlflow_names import metric_key

SMALL = ("model=linear", "trainer.max_epochs=4", "tracker.timeout_s=1", "tracker.require=false")
# Some thousand updates, so that there is time for things to happen in their middle.
LONG = ("model=linear", "trainer.max_epochs=150", "checkpoint.every_n_epochs=10", "tracker.timeout_s=5")


@pytest.fixture
def server(tmp_path):
    server = MlflowServer(tmp_path / "server")
    server.start()
    yield server
    server.stop()


def progress(process, output_dir, updates=100):
    """Wait until a run has gone on by some updates."""
    goal = last_step(output_dir) + updates
    wait_until(lambda: last_step(output_dir) >= goal, process)


def points_of(server, name):
    sql = f"select key, step, value from metrics join runs using (run_uuid) where name = '{name}'"
    rows = server.query(sql)
    found = {(metric_key(key), step): None if is_measured(key) else value for key, step, value in rows}
    assert len(found) == len(rows)
    return found


def status_of(server, name):
    return server.query(f"select status from runs where name = '{name}'")


def test_a_run_does_not_start_without_the_tracker_that_it_requires(tmp_path):
    embedded.open_store(OutputPaths(tmp_path / "locked"))
    with never_answering() as silent, locked(tmp_path / "locked" / "mlflow.db"):
        begun = time.monotonic()
        given = {
            # a split that the dataset refuses: it is not even built
            "silent": (f"tracker.uri={silent}", "data.datasets.train.split=none"),
            "locked": ("tracker.uri=null",),
        }
        processes = {name: start(tmp_path / name, *more, "tracker.timeout_s=1") for name, more in given.items()}
        output = {name: process.communicate(timeout=120)[0] for name, process in processes.items()}
        assert time.monotonic() - begun < 90  # MLflow by itself would try for minutes
    assert [process.returncode for process in processes.values()] == [2, 2]
    assert re.fullmatch(f"error: MLflow did not answer in time: {silent}.*\n", output["silent"])
    assert re.fullmatch("error: .*mlflow.db: database is locked\n", output["locked"])
    assert not any((tmp_path / name / "runs").exists() for name in given)


@pytest.mark.slow
def test_a_run_that_starts_without_its_tracker_is_registered_later(tmp_path):
    embedded.open_store(OutputPaths(tmp_path))
    with locked(tmp_path / "mlflow.db"):
        printed = ksuit(tmp_path, *SMALL)
        run_id = run_dir(tmp_path).name
        command = f"python -m ksuit_runner output_dir={tmp_path} sync={run_id}"
        count = len(journal(run_dir(tmp_path)))
        assert f"{count} metric points" in printed
        assert f"To send them: {command}\n" in printed
        failed = ksuit(tmp_path, "sync=last", "tracker.timeout_s=1", status=2)
        assert "database is locked" in failed
        assert command in failed
    begun = (run_dir(tmp_path) / "metrics.jsonl").stat().st_ctime * 1000
    sent = ksuit(tmp_path, f"sync={run_id[:8]}")
    assert f"sent {count} metric points, 0 files and checkpoints, status FINISHED" in sent
    assert mlflow_points(tmp_path) == journal(run_dir(tmp_path))
    ((tracker_id, status, uri, start_time, end_time),) = query(
        tmp_path, "select run_uuid, status, artifact_uri, start_time, end_time from runs"
    )
    assert (status, uri) == ("FINISHED", str(run_dir(tmp_path) / "artifacts"))
    assert start_time <= end_time <= begun + 60_000
    assert dict(query(tmp_path, "select key, value from params"))["trainer.max_epochs"] == "4"
    assert len(query(tmp_path, "select * from inputs where source_type = 'DATASET'")) == 3
    assert dict(query(tmp_path, "select key, value from tags"))["ksuit.run_id"] == run_id
    # The tracker's id is as good as the run's own from now on.
    assert "status finished" in re.sub(" +", " ", ksuit(tmp_path, f"resume={tracker_id}", "trainer.max_epochs=5"))
    assert mlflow_points(tmp_path) == journal(run_dir(tmp_path))
    assert query(tmp_path, "select run_uuid, status from runs") == [(tracker_id, "FINISHED")]


def test_a_run_is_registered_as_soon_as_its_tracker_answers(tmp_path):
    embedded.open_store(OutputPaths(tmp_path))
    (make_project(tmp_path / "project") / "armed").touch()
    pausing = ("model=pauses", "model.pauses_at=450", "tracker.require=false")
    with locked(tmp_path / "mlflow.db"):
        process = start(tmp_path, *LONG, *pausing, cwd=tmp_path / "project")
        progress(process, tmp_path)
    wait_until(lambda: query(tmp_path, "select count(*) from metrics") != [(0,)], process)
    (tmp_path / "project" / "armed").unlink()
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert "To send them" not in output
    assert mlflow_points(tmp_path) == journal(run_dir(tmp_path))
    assert query(tmp_path, "select status from runs") == [("FINISHED",)]


@pytest.mark.slow
def test_a_server_that_stops_hangs_and_fails_in_the_middle(tmp_path, server):
    proxy = Proxy(server.uri)
    process = start(tmp_path, *LONG, "trainer.max_epochs=100000", "name=unlucky", f"tracker.uri={proxy.uri}")
    try:
        progress(process, tmp_path)
        proxy.is_broken = True
        progress(process, tmp_path, 200)
        proxy.is_broken = False
        server.stop()
        progress(process, tmp_path, 200)
        server.start()
        before = len(points_of(server, "unlucky"))
        wait_until(lambda: len(points_of(server, "unlucky")) > before, process)
        server.hang()
        progress(process, tmp_path, 200)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 143, output
        assert "status  killed" in output
        assert re.search(r"\d+ metric points, [1-9]\d* files and checkpoints, and the status KILLED", output)
        server.resume()
        assert status_of(server, "unlucky") == [("RUNNING",)]
        sent = ksuit(tmp_path, "sync=unlucky")
        assert "status KILLED" in sent
    finally:
        proxy.close()
    run = run_dir(tmp_path)
    assert points_of(server, "unlucky") == journal(run)
    assert status_of(server, "unlucky") == [("KILLED",)]
    (there,) = server.store.glob(f"*/{run.name}/artifacts")
    files = {path.relative_to(there): path.read_bytes() for path in there.rglob("*") if path.is_file()}
    here = {path.relative_to(run / "artifacts"): path for path in (run / "artifacts").rglob("*") if path.is_file()}
    assert {path: here[path].read_bytes() for path in here} == {
        path: content for path, content in files.items() if str(path) != "run.log"
    }
    assert b"To send them" in next(content for path, content in files.items() if str(path) == "run.log")


@pytest.mark.slow
def test_a_run_that_is_killed_in_an_outage_sends_everything_when_it_is_resumed(tmp_path, server):
    arguments = (*LONG, "name=killed", f"tracker.uri={server.uri}")
    process = start(tmp_path, *arguments)
    progress(process, tmp_path)
    server.hang()
    progress(process, tmp_path, 600)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    server.resume()
    ksuit(tmp_path, "resume=killed")
    assert points_of(server, "killed") == journal(run_dir(tmp_path))
    assert status_of(server, "killed") == [("FINISHED",)]


@pytest.mark.slow
def test_a_run_whose_database_is_lost_is_recorded_anew(tmp_path):
    ksuit(tmp_path, "model=linear", "trainer.max_epochs=1", "callbacks=[accuracy]", "name=lost")
    tables = {table: query(tmp_path, f"select key, value from {table}") for table in ("params", "tags")}
    before, points = {key: sorted(rows) for key, rows in tables.items()}, mlflow_points(tmp_path)
    (tmp_path / "mlflow.db").unlink()
    ksuit(tmp_path, "sync=lost", "register_anew=true")
    assert mlflow_points(tmp_path) == points
    assert sorted(query(tmp_path, "select key, value from params")) == before["params"]
    assert set(query(tmp_path, "select key, value from tags")) >= set(before["tags"])
    assert query(tmp_path, "select status, name from runs") == [("FINISHED", "lost")]
    (tmp_path / "mlflow.db").unlink()
    ksuit(tmp_path, "resume=lost", "trainer.max_epochs=2", "register_anew=true")
    assert mlflow_points(tmp_path) == journal(run_dir(tmp_path))
    assert points.items() <= mlflow_points(tmp_path).items()
    stored = (run_dir(tmp_path) / "artifacts" / "config.yaml").read_text()
    assert "register_anew: false" in stored  # what was asked for once is not asked for ever


def test_what_cannot_be_synced_is_refused(tmp_path):
    assert "sync=last: there is no run in" in ksuit(tmp_path, "sync=last", status=2)
    assert "only output_dir, tracker, trust, register_anew can be given" in ksuit(
        tmp_path, "sync=last", "optimizer.lr=1", status=2
    )


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_long_outage(tmp_path, server):
    """Two runs side by side, one of which loses its tracker: both continue equally fast, and nothing is lost."""
    seconds = float(os.environ.get("KSUIT_OUTAGE_S", "600"))
    arguments = ("trainer.max_epochs=1000000", "checkpoint.every_n_epochs=20", "name=patient")
    folders = (tmp_path / "patient", tmp_path / "twin")
    uri = f"tracker.uri={server.uri}"
    processes = [start(folders[0], *arguments, uri), start(folders[1], *arguments, "tracker=noop")]

    def updates_in(seconds):
        """Let both runs train for a while and return how many updates each of them did."""
        before = [last_step(folder) for folder in folders]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.5)
        return [last_step(folder) - first for folder, first in zip(folders, before, strict=True)]

    def latest():
        (path,) = server.store.glob(f"*/{run_dir(folders[0]).name}/artifacts/checkpoints/latest")
        return path.read_text()

    for process, folder in zip(processes, folders, strict=True):
        progress(process, folder, 600)
    usual, usual_twin = updates_in(min(60, seconds))
    server.stop()
    before = latest()
    during, during_twin = updates_in(seconds)
    server.start()
    goal = last_step(folders[0])
    wait_until(lambda: max(step for _, step in points_of(server, "patient")) >= goal, processes[0], 300)
    wait_until(lambda: latest() != before, processes[0], 300)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    print(f"\noutage of {seconds:.0f} s: {during} updates, {during_twin} by the twin; before {usual}, {usual_twin}")
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert "To send them" not in outputs[0]
    assert points_of(server, "patient") == journal(run_dir(folders[0]))
    assert status_of(server, "patient") == [("KILLED",)]
    assert during > during_twin / 2
