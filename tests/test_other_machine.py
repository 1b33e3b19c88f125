"""A run whose machine is gone is resumed on another one that has only the code and the tracking server."""

import signal
import time

import pytest
from command import (
    checkpoint_bytes,
    is_measured,
    journal,
    last_step,
    lose_machine,
    read_until,
    run_dir,
    stop_at,
    wait_until,
)
from pausing import make_project
from preloaded import ksuit, start
from servers import MlflowServer

from ksuit_runner.counter import Progress
from ksuit_runner.record.journal import Journal
from ksuit_runner.tracker.mlflow_names import metric_key

ARGUMENTS = (
    *("model=pauses", "model.pauses_at=470", "model.hidden_dims=[128]", "model.dropout=0.2", "schedule=constant"),
    *("schedule.warmup=5", "checkpoint.every_n_epochs=7", "tracker.timeout_s=5"),
)
END = "trainer.max_epochs=130"
LAST = "E130_U2600_S166400"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def server(tmp_path):
    server = MlflowServer(tmp_path / "server")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, project):
    """The same run in one piece, recorded nowhere but in its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ksuit(folder, *ARGUMENTS[:-1], END, "tracker=noop", cwd=project)
    return run_dir(folder)


def uploaded(server):
    return [path.read_text() for path in server.store.glob("*/*/artifacts/checkpoints/latest")]


def lose(process, server, project):
    """Lose the machine of a run that stands still, once the server knows more of it than its last checkpoint."""
    read_until(process, "paused")
    wait_until(
        lambda: any(recorded(server) > Progress.parse(name.strip()).update for name in uploaded(server)), process
    )
    lose_machine(process)
    (project / "armed").unlink()


def recorded(server):
    ((step,),) = server.query("select max(step) from metrics")
    return step or 0


def points(directory):
    file = Journal(directory / "metrics.jsonl")
    found = [point for points, _ in file.read() for point in points]
    file.close()
    return found


def check(server, elsewhere, undisturbed):
    assert (
        checkpoint_bytes(elsewhere)[f"{LAST}/model.safetensors"]
        == (checkpoint_bytes(undisturbed)[f"{LAST}/model.safetensors"])
    )
    rows = server.query("select key, step, value from metrics")
    points = {(metric_key(key), step): None if is_measured(key) else value for key, step, value in rows}
    assert len(points) == len(rows)
    assert points == journal(undisturbed) == journal(elsewhere)
    assert server.query("select status from runs") == [("FINISHED",)]
    assert set(uploaded(server)) == {f"{LAST}\n"}


@pytest.mark.slow
def test_a_run_is_resumed_twice_with_nothing_but_the_tracking_uri(tmp_path, project, server, undisturbed):
    server.start()
    (project / "armed").touch()
    gone, other = tmp_path / "gone", tmp_path / "other"
    process = start(gone, *ARGUMENTS, "trainer.max_epochs=120", f"tracker.uri={server.uri}", cwd=project)
    lose(process, server, project)
    run_id = run_dir(gone).name
    # What was sent before the first machine was lost is computed again here, twice, and recorded once.
    known, began = recorded(server), time.time() * 1000
    process = start(other, f"tracker.uri={server.uri}", f"resume={run_id}", END, cwd=project)
    stop_at(process, other, known + 1)
    assert max(point.step for point in points(run_dir(other)) if point.timestamp < began) == known
    ksuit(other, f"tracker.uri={server.uri}", f"resume={run_id}", END, cwd=project)
    check(server, run_dir(other), undisturbed)


@pytest.mark.slow
def test_a_run_that_began_without_the_server_is_resumed_elsewhere(tmp_path, project, server, undisturbed):
    (project / "armed").touch()
    gone, other = tmp_path / "gone", tmp_path / "other"
    arguments = (*ARGUMENTS, "trainer.max_epochs=120", f"tracker.uri={server.uri}", "tracker.require=false")
    process = start(gone, *arguments, cwd=project)
    wait_until(lambda: last_step(gone) > 0, process)
    process.send_signal(signal.SIGSTOP)  # the server takes some seconds to start
    server.start()
    process.send_signal(signal.SIGCONT)
    lose(process, server, project)
    run_id = run_dir(gone).name
    ((tracker_id,),) = server.query("select run_uuid from runs")
    assert tracker_id != run_id
    ksuit(other, f"tracker.uri={server.uri}", f"resume={run_id[:8]}", END, cwd=project)
    assert run_dir(other).name == run_id
    check(server, run_dir(other), undisturbed)
    assert server.query("select run_uuid from runs") == [(tracker_id,)]
