"""A job that its scheduler puts back into the queue resumes the run that it has begun."""

import json
import os
import signal
from importlib.util import find_spec

import pytest
from command import journal, mlflow_points, query, run_dirs, wait_until
from pausing import make_project
from preloaded import start

from ksuit_runner.sweep.commands import start_sweep

PREEMPTS = """
import os
import signal
from pathlib import Path

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.launchers.in_process import InProcessLauncher


class Preempts(CallbackBase):
    def _after_update(self, update_counter):
        if update_counter.update == 5 and Path("armed").exists():
            Path("armed").unlink()
            os.kill(os.getpid(), signal.SIGUSR1)


class Requeues(InProcessLauncher):
    def submit(self, function, task):
        first = function(task)
        with open("ended", "a") as file:
            print(first.status, first.signal, file=file)
        return super().submit(function, task)
"""


def test_a_job_that_its_scheduler_starts_again_resumes_its_run(tmp_path, monkeypatch):
    (tmp_path / "preempts.py").write_text(PREEMPTS)
    (tmp_path / "armed").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    callback = ("callbacks=[]", "+callbacks.preempts._target_=preempts.Preempts")
    launcher = "launcher._target_=preempts.Requeues"
    run = ("tracker=noop", "model=linear", "seed=0,1", "trainer.max_epochs=1")
    assert start_sweep([f"output_dir={tmp_path}", *run, *callback, launcher], "command").exit_status == 0
    (sweep,) = tmp_path.glob("sweeps/*/begun")
    assert (tmp_path / "ended").read_text().splitlines() == [f"KILLED {int(signal.SIGUSR1)}", "FINISHED None"]
    found = run_dirs(tmp_path)
    assert len(found) == len(list(sweep.iterdir())) == 2
    for folder in found:
        assert ("loss/train", 10) in journal(folder) and ("loss/train", 20) in journal(folder)
        assert json.loads((folder / "tracker.json").read_text())["status"] == "FINISHED"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")
def test_a_job_that_is_preempted_leaves_a_checkpoint_and_resumes_its_run(tmp_path):
    make_project(tmp_path)
    (tmp_path / "armed").touch()
    outputs = tmp_path / "outputs"
    run = ("model=pauses", "trainer.max_epochs=2", "checkpoint=at_end", "callbacks=[accuracy]")
    launcher = ("launcher=submitit", "launcher.executor=local", "launcher.max_jobs=1")
    process = start(outputs, "-m", "model.pauses_at=30", *run, *launcher, cwd=tmp_path)
    wait_until(lambda: any("paused" in path.read_text() for path in outputs.glob("sweeps/*/submitit/*.out")), process)
    (lock,) = outputs.glob("runs/*/lock.json")
    os.kill(json.loads(lock.read_text())["pid"], signal.SIGUSR1)  # which is not the one that submitit listens to
    (tmp_path / "armed").unlink()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert set(query(outputs, "select status from runs")) == {("FINISHED",)}
    (directory,) = run_dirs(outputs)
    assert "starts from checkpoint E1_" in (directory / "run.log").read_text()
    points = journal(directory)
    assert (
        points == mlflow_points(outputs) and {("accuracy/validation", 20), ("accuracy/validation", 40)} <= points.keys()
    )
