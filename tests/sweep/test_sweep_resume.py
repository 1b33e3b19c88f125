"""A sweep that is killed again and again, and one that never was, end with the same."""

import json
import signal
import time

import pytest
from command import checkpoint_bytes, end_by, journal, query
from preloaded import ksuit, start

from ksuit_runner.counter import Progress

# All is killed right after MLflow has created a run: nothing is known of it but its id and its tags.
TRACKER = """
import os
import signal
import sys
from pathlib import Path

from ksuit_runner.tracker.mlflow import MlflowTracker


class Killed(MlflowTracker):
    def start_run(self, name, tags, parent_run_id=None, start_time=None):
        info = super().start_run(name, tags, parent_run_id, start_time)
        armed = Path("armed")
        if tags.get("ksuit.job") == "0" and armed.exists():
            armed.unlink()
            for pid in int(sys.argv[-1]), os.getpid():  # the sweep, and its recorder
                os.kill(pid, signal.SIGKILL)
        return info
"""
SWEEP = """# @package _global_
defaults:
  - override /model: mlp
  - override /callbacks: [ema, accuracy]
objective: accuracy/validation/ema
model:
  dropout: 0.1
trainer:
  max_epochs: 20
tracker:
  _target_: trackers.Killed
sweep:
  params:
    optimizer.lr: [1e-3, 1e-2]
    seed: [0, 1]
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "conf" / "sweep").mkdir(parents=True)
    (folder / "conf" / "sweep" / "mine.yaml").write_text(SWEEP)
    (folder / "trackers.py").write_text(TRACKER)
    return folder


def jobs_of(output_dir):
    rows = query(output_dir, "select value, run_uuid from tags where key = 'ksuit.job' order by cast(value as int)")
    assert len({job for job, _ in rows}) == len(rows)
    return {int(job): output_dir / "runs" / run_id for job, run_id in rows}


def checkpoints(directory):
    found = (Progress.parse(path.name) for path in (directory / "artifacts" / "checkpoints").iterdir())
    return [progress for progress in found if progress is not None]


def killed_in(job, update, output_dir, project, *arguments):
    """Start or resume the sweep, and kill it once the job has logged this update."""
    process = start(output_dir, *arguments, cwd=project)
    deadline = time.monotonic() + 200
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        path = jobs_of(output_dir).get(job) if (output_dir / "mlflow.db").exists() else None
        file = path / "metrics.jsonl" if path else None
        if file and file.exists() and f'"s":{update},' in file.read_text():
            break
        time.sleep(0.01)
    return end_by(process, signal.SIGKILL)


@pytest.mark.slow
def test_a_sweep_that_is_killed_anywhere_ends_like_one_that_never_was(project, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = ksuit(whole, "sweep=mine", cwd=project)
    (project / "armed").touch()
    # job 0 has a run id and nothing else
    assert start(killed, "sweep=mine", cwd=project).wait(240) == -signal.SIGKILL
    (sweep_dir,) = (killed / "sweeps").iterdir()
    resume = f"resume={sweep_dir.name[:8]}"
    before_checkpoint = killed_in(1, 10, killed, project, resume)
    assert "job 1/4  starts" in before_checkpoint
    in_the_middle = killed_in(2, 60, killed, project, resume)
    assert "job 1/4" not in in_the_middle and "job 2/4  starts" in in_the_middle
    newest = max((checkpoints(jobs_of(killed)[2])), key=lambda progress: progress.update)
    output = ksuit(killed, resume, cwd=project)
    assert "job 2/4" not in output
    logs = [(directory / "run.log").read_text() for directory in jobs_of(killed).values()]
    assert newest.update >= 40 and f"starts from checkpoint {newest}\n" in logs[2]
    assert "from checkpoint" not in logs[0]

    one, other = jobs_of(whole), jobs_of(killed)
    assert list(one) == list(other) == [0, 1, 2, 3]
    for job, directory in one.items():
        assert checkpoint_bytes(directory) == checkpoint_bytes(other[job])
        assert journal(directory) == journal(other[job])
    for folder in (whole, killed):
        statuses = query(folder, "select status, count(*) from runs group by status")
        assert statuses == [("FINISHED", 5)]
        assert len(query(folder, "select distinct key, step, run_uuid from metrics")) == len(
            query(folder, "select key from metrics")
        )
    names = [[line.split()[:4] for line in text.splitlines()[-7:]] for text in (expected, output)]
    assert names[0] == names[1]


def test_a_changed_yaml_is_noticed_and_explained(project, tmp_path):
    quick = ("trainer.max_epochs=1", "callbacks=[accuracy]", "objective=accuracy/validation", "default_callbacks=none")
    ksuit(tmp_path, "sweep=mine", "seed=0", "name=changing", *quick, cwd=project)
    yaml = project / "conf" / "sweep" / "mine.yaml"
    yaml.write_text(SWEEP.replace("[1e-3, 1e-2]", "[1e-3, 1e-2, 1e-1]") + "  fail_fast: true\n")
    try:
        output = ksuit(tmp_path, "resume=changing", status=2, cwd=project)
        assert (
            "the YAML has changed since this sweep was planned: sweep.params.optimizer.lr: was [0.001, 0.01]" in output
        )
        assert "sweep.on_change=keep" in output
        kept = ksuit(tmp_path, "resume=changing", "sweep.on_change=keep", cwd=project)
        assert len(jobs_of(tmp_path)) == 2 and "starts" not in kept
    finally:
        yaml.write_text(SWEEP)
    refused = ksuit(tmp_path, "resume=changing", "optimizer.lr=1", status=2, cwd=project)
    assert "optimizer.lr=1: a sweep is resumed with the jobs that were planned" in refused


def test_a_sweep_that_is_alive_is_not_resumed(project, tmp_path):
    process = start(tmp_path, "sweep=mine", "trainer.max_epochs=5000", "checkpoint=at_end", cwd=project)
    try:
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("sweeps/*/lock.json")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        output = ksuit(tmp_path, "resume=mine", status=2, cwd=project)
        assert "is still running: pid" in output
    finally:
        process.kill()
        process.communicate()
    plan = next(tmp_path.glob("sweeps/*/plan.json"))
    assert json.loads(plan.read_text())["name"] == "mine"
