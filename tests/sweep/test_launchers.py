"""Jobs in other processes: joblib, submitit's local executor, and a Ray on 127.0.0.1."""

import json
import os
import signal
import time
from importlib.util import find_spec

import pytest
from command import checkpoint_bytes, journal, query, run_dirs
from preloaded import ksuit, start

pytestmark = pytest.mark.slow
LAUNCHERS = {
    "joblib": ["launcher=joblib", "launcher.max_jobs=2", "data.num_workers=1"],
    "submitit": ["launcher=submitit", "launcher.executor=local", "launcher.max_jobs=2"],
    "ray": ["launcher=ray", "launcher.max_jobs=2", "launcher.num_cpus=0.5"],
}
EXPERIMENTS = {"breaks": (5, 1), "short": (-1, 1), "long": (-1, 100_000), "longer": (-1, 100_000)}


@pytest.fixture
def experiments(project):
    for name, (fails_at, epochs) in EXPERIMENTS.items():
        (project / "conf" / "experiment" / f"{name}.yaml").write_text(
            "# @package _global_\ndefaults:\n  - override /model: fragile\n"
            f"model:\n  fails_at: {fails_at}\ntrainer:\n  max_epochs: {epochs}\n"
        )
    return project


def runs(output_dir):
    if not (output_dir / "mlflow.db").exists():
        return {}
    rows = query(output_dir, "select value, run_uuid from tags where key = 'sweep.experiment'")
    return {name: output_dir / "runs" / run_id for name, run_id in rows}


def wait_for(output_dir, process, *names):
    """Wait until these jobs have logged some updates."""
    deadline = time.monotonic() + 200
    while True:
        files = [runs(output_dir).get(name, output_dir) / "metrics.jsonl" for name in names]
        if all(file.exists() and '"s":20,' in file.read_text() for file in files):
            return
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_does_what_a_single_process_does(name, experiments, tmp_path):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install 'ksuit_runner[{name}]'")
    quick = ("callbacks=[accuracy]", "objective=accuracy/validation", "checkpoint=at_end")
    sweep = (f"experiment={','.join(EXPERIMENTS)}", *LAUNCHERS[name], *quick)
    process = start(tmp_path, "-m", *sweep, cwd=experiments)
    wait_for(tmp_path, process, "long", "longer")  # two at the same time; the others have ended
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output

    assert "error: job 1 failed: RuntimeError: this one breaks" in output
    assert "Traceback (most recent call last)" in output[output.index("error: job 1") :]
    log = next(line for line in output.splitlines() if line.startswith("log: ")).split()[1]
    assert "this one breaks" in (experiments / log).read_text()
    found = runs(tmp_path)
    statuses = dict(query(tmp_path, "select run_uuid, status from runs"))
    assert {job: statuses[path.name] for job, path in found.items()} == {
        "breaks": "FAILED",
        "short": "FINISHED",
        "long": "KILLED",
        "longer": "KILLED",
    }
    assert all((found[job] / "artifacts" / "checkpoints" / "latest").exists() for job in ("long", "longer"))

    ksuit(tmp_path / "alone", "experiment=short", *quick, cwd=experiments)
    (alone,) = run_dirs(tmp_path / "alone")
    assert checkpoint_bytes(found["short"]) == checkpoint_bytes(alone)
    assert journal(found["short"]) == journal(alone)


def test_a_process_that_is_lost_is_one_failed_job_and_the_sweep_resumes(experiments, tmp_path):
    sweep = ("experiment=long,short", "launcher=joblib", "launcher.max_jobs=1", "callbacks=[accuracy]")
    process = start(tmp_path, "-m", *sweep, "objective=accuracy/validation", cwd=experiments)
    wait_for(tmp_path, process, "long")
    lock = runs(tmp_path)["long"] / "lock.json"
    deadline = time.monotonic() + 100
    while not (lock.parent / "artifacts" / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "error: job 1 failed: the process of this job died" in output
    assert "job 2/2  finished" in output
    again = start(tmp_path, "resume=sweep", "launcher=in_process", cwd=experiments)
    deadline = time.monotonic() + 100
    while not lock.exists() or f'"pid": {again.pid},' not in lock.read_text():  # the dead process's was removed
        assert time.monotonic() < deadline and again.poll() is None
        time.sleep(0.05)
    again.send_signal(signal.SIGINT)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 130, output
    assert "starts from checkpoint" in (lock.parent / "run.log").read_text() and "job 2/2" not in output
    assert "SIGINT: jobs that run finish this update and save, and the sweep ends; Ctrl-C once more" in output
