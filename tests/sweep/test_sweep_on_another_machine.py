"""A sweep whose machine is gone is resumed on another one that has only the code and the tracking server."""

import shutil

import pytest
from command import checkpoint_bytes, is_measured, journal, lose_machine, run_dirs, wait_until
from pausing import make_project
from preloaded import ksuit, start
from servers import MlflowServer, Proxy

from ksuit_runner.tracker.mlflow_names import metric_key

pytestmark = pytest.mark.slow

LAST = "E6_U120_S7680"
SWEEP = (
    *("-m", "model=pauses", "model.pauses_at=10000,110,20000", "trainer.max_epochs=6"),
    *("callbacks=[accuracy]", "objective=accuracy/validation", "name=mine"),
)


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "project")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def proxy(server):
    """The same server under another address, as another machine may see it."""
    proxy = Proxy(server.uri)
    yield proxy
    proxy.close()


def jobs_on(server):
    """Return the runs of the only sweep on the server by the number of their job: id, status and points."""
    rows = server.query(
        "select cast(value as int), t.run_uuid, status from tags t join runs r on t.run_uuid = r.run_uuid "
        "where key = 'ksuit.job' and lifecycle_stage = 'active'"
    )
    assert len({job for job, *_ in rows}) == len(rows)
    found = {}
    for job, run_id, status in rows:
        points = server.query(f"select key, step, value from metrics where run_uuid = '{run_id}'")
        by_key = {(metric_key(key), step): None if is_measured(key) else value for key, step, value in points}
        assert len(by_key) == len(points)
        found[job] = run_id, status, by_key
    return found


def latest(server, run_id):
    found = list(server.store.glob(f"*/{run_id}/artifacts/checkpoints/latest"))
    return found[0].read_text().strip() if found else ""


def test_a_killed_sweep_is_resumed_with_nothing_but_the_tracking_uri(project, server, proxy, tmp_path):
    gone, other, whole = tmp_path / "gone", tmp_path / "other", tmp_path / "whole"
    (project / "armed").touch()
    tracker = (f"tracker.uri={server.uri}", "tracker.close_timeout_s=120")
    process = start(gone, *SWEEP, *tracker, cwd=project)
    wait_until(
        lambda: len(jobs_on(server)) == 2 and latest(server, jobs_on(server)[1][0]).startswith("E5_U100"), process
    )
    lose_machine(process)
    before = jobs_on(server)
    assert [before[job][1] for job in (0, 1)] == ["FINISHED", "RUNNING"]
    (sweep_id,) = (path.name for path in (gone / "sweeps").iterdir())
    shutil.rmtree(gone)
    (project / "armed").unlink()

    shown = ksuit(other, f"leaderboard={sweep_id}", f"tracker.uri={proxy.uri}", cwd=project)
    statuses = [{"finished", "running", "missing"} & {*line.split()} for line in shown.splitlines()[1:]]
    assert statuses == [{"finished"}, {"running"}, {"missing"}]
    output = ksuit(other, f"resume={sweep_id[:8]}", f"tracker.uri={proxy.uri}", cwd=project)
    assert "job 1/3" not in output
    logs = {
        job: (other / "runs" / run_id / "run.log").read_text() for job, (run_id, *_) in jobs_on(server).items() if job
    }
    assert "starts from checkpoint E5_U100" in logs[1] and "from checkpoint" not in logs[2]
    assert ksuit(other, f"resume={sweep_id}", cwd=project).count("starts") == 0  # the new address is kept

    ksuit(whole, *SWEEP, "tracker=noop", cwd=project)
    expected = [path for path in run_dirs(whole) if (path / "metrics.jsonl").exists()]
    after = jobs_on(server)
    assert [(run_id, status) for run_id, status, _ in (after[0], after[1])] == [
        (before[0][0], "FINISHED"),
        (before[1][0], "FINISHED"),
    ]
    for job, directory in enumerate(expected):
        run_id, status, points = after[job]
        assert (status, points) == ("FINISHED", journal(directory))
        assert latest(server, run_id) == LAST
        if job > 0:
            here = other / "runs" / run_id
            assert journal(here) == journal(directory)
            name = f"{LAST}/model.safetensors"
            assert checkpoint_bytes(here)[name] == checkpoint_bytes(directory)[name]
    assert not (other / "runs" / after[0][0]).exists()
    assert server.query(f"select status from runs where run_uuid = '{sweep_id}'") == [("FINISHED",)]
