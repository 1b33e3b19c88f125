"""SIGTERM and SIGINT: an interrupted run ends soon, at any point, and resumes exactly."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
from command import (
    REPOSITORY,
    interrupt_again,
    journal,
    ksuit,
    mlflow_points,
    query,
    read_until,
    run_dir,
    start,
    stop_at,
)
from crashes import Kill, assert_gone, children

# Points in the middle of the run; the signal comes when they are reached for the n-th time.
POINTS = {
    **{"fetching data": 30, "after the forward pass": 61, "in the optimizer's step": 31, "in an evaluation": 5},
    **{"taking a snapshot": 3, "writing a file of a checkpoint": 8, "between commit and latest": 5},
    **{"after a line of the journal": 12},
}
HANGS = '''
"""Data that hang at a sample, and a model that hangs."""

import time

import torch
from ksuit_runner.data.digits import Digits


class Hangs(Digits):
    def __init__(self, at, **kwargs):
        super().__init__(**kwargs)
        self.at = at

    def __getitems__(self, indices):
        if self.at in indices.tolist():
            print("hanging", flush=True)
            time.sleep(3600)
        return super().__getitems__(indices)


class Slow(torch.nn.Linear):
    def forward(self, inputs):
        if self.training:
            print("hanging", flush=True)
            time.sleep(3600)
        return super().forward(inputs.flatten(1))
'''


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_at_a_point(project, reference, template, point, workers):
    project.clear(template)
    command = project.start(kill=Kill(point, POINTS[point], 0.0, workers, signal.SIGTERM))
    assert command.wait() == 128 + signal.SIGTERM, command.output()
    directory = project.run_dirs()[0]
    last = command.output().splitlines()[-1]
    assert "killed" in command.output() and last.endswith(f"python -m ksuit_runner resume={directory.name}")
    assert query(project.outputs, "select status from runs") == [("KILLED",)]
    assert not (directory / "lock.json").exists()
    project.run("resume=last")
    assert project.result().differences(reference) == []


def hanging(tmp_path, *arguments):
    """Start a run in a project whose data or model hangs, and wait until it does."""
    (tmp_path / "hangs.py").write_text(HANGS)
    process = start(tmp_path / "outputs", "tracker=noop", *arguments, cwd=tmp_path)
    read_until(process, "hanging")
    return process, children(process.pid)


def ends(process, workers, status, interrupt):
    started = time.monotonic()
    interrupt()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert_gone(workers)
    print(f"ended {time.monotonic() - started:.2f} s after the signal")
    return output


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("split", "at"), [("train", 3), ("test", 200)])  # after what is rehearsed
def test_sigterm_while_it_waits_for_data(tmp_path, workers, split, at):
    data = (
        f"data.datasets.{split}._target_=hangs.Hangs",
        f"+data.datasets.{split}.at={at}",
        "data.eval_batch_size=100",
    )
    process, children = hanging(tmp_path, "model=linear", *data, f"data.num_workers={workers}")
    assert "killed" in ends(process, children, 143, process.terminate)
    assert list(run_dir(tmp_path / "outputs").glob("artifacts/checkpoints/E*/manifest.json"))


def test_a_second_interrupt_ends_at_once(tmp_path):
    model = ("model._target_=hangs.Slow", "+model.in_features=64", "+model.out_features=10")
    process, children = hanging(tmp_path, "model=linear", *model)
    process.send_signal(signal.SIGINT)
    output = ends(process, children, 130, partial(interrupt_again, process))
    assert "resume=" in output.splitlines()[-1]


def test_workers_ignore_a_ctrl_c_that_reaches_the_whole_group(tmp_path):
    arguments = ("model=linear", "data.num_workers=2", "trainer.max_epochs=500")
    command = [sys.executable, "-m", "ksuit_runner", f"output_dir={tmp_path}", *arguments]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/artifacts/checkpoints/latest")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers = children(process.pid)
    assert [worker for worker in workers if worker.status() != psutil.STATUS_ZOMBIE]
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130, (tmp_path / "log").read_text()
    assert_gone(workers)
    assert "Traceback" not in (tmp_path / "log").read_text()
    ksuit(tmp_path, "resume=last", "trainer.max_epochs=1")
    assert journal(run_dir(tmp_path)) == mlflow_points(tmp_path)


def test_under_timeout(tmp_path):
    process = start(tmp_path, "trainer.max_epochs=100000", under=("timeout", "600"))
    output = stop_at(process, tmp_path, 1, signal.SIGALRM)  # what its own clock sends it
    assert process.returncode == 124, output  # timeout's own way to say that the time was up
    assert "killed" in output and query(tmp_path, "select status from runs") == [("KILLED",)]


def test_sigterm_on_the_command_line(tmp_path):
    process = start(tmp_path, "model=linear", "trainer.max_epochs=3000")
    output = stop_at(process, tmp_path, 60, signal.SIGTERM)
    assert process.returncode == 143, output
