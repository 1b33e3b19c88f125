"""A job of Slurm whose time is up goes back into the queue, and its command then resumes the run."""

import json
import signal

import pytest
from command import checkpoint_bytes, journal, run_dir
from hydra.core.global_hydra import GlobalHydra

from ksuit_runner.cli.dispatch import _main
from ksuit_runner.start.slurm_job import requeue_after

RUN = ("model=linear", "trainer.max_epochs=2", "tracker=noop", "default_callbacks=none", "callbacks=[accuracy]")
TIME_IS_UP = """
import os
from pathlib import Path

from ksuit_runner.callback_base import CallbackBase


class Signals(CallbackBase):
    def __init__(self, number, **kwargs):
        super().__init__(**kwargs)
        self.number = number

    def _after_update(self, update_counter):
        if update_counter.update == 30 and Path("armed").exists():
            Path("armed").unlink()
            os.kill(os.getpid(), self.number)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job of Slurm, whose scontrol notes what it is asked for."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    (tmp_path / "signals.py").write_text(TIME_IS_UP)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def ksuit(folder, *overrides):
    GlobalHydra.instance().clear()
    return _main([f"output_dir={folder}", *overrides])


def asked(tmp_path):
    path = tmp_path / "asked"
    return path.read_text().splitlines() if path.exists() else []


def final(folder):
    return {name: digest for name, digest in checkpoint_bytes(folder).items() if name.startswith("E2_U40")}


def signals(number):
    return "+callbacks.signals._target_=signals.Signals", f"+callbacks.signals.number={int(number)}"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_requeued_job_resumes_its_run_to_the_same_end(job, tmp_path, number, capsys):
    outputs, given = tmp_path / "outputs", (*RUN, *signals(number))
    (tmp_path / "armed").touch()
    assert ksuit(outputs, *given) == 128 + number
    assert asked(tmp_path) == (["requeue 77"] if number == signal.SIGUSR1 else [])  # Slurm requeues what it preempts
    assert ("job 77 waits in the queue again" in capsys.readouterr().out) == (number == signal.SIGUSR1)
    job.setenv("SLURM_RESTART_COUNT", "1")
    assert ksuit(outputs, *given) == 0
    only = run_dir(outputs)  # there is one run
    assert json.loads((only / "tracker.json").read_text())["status"] == "FINISHED"
    assert not (outputs / ".begun").exists()
    assert ksuit(tmp_path / "whole", *given) == 0
    assert journal(only) == journal(run_dir(tmp_path / "whole"))
    assert final(only) == final(run_dir(tmp_path / "whole"))


def test_a_command_that_resumes_is_repeated_as_it_is_if_that_is_wanted(job, tmp_path):
    outputs = tmp_path / "outputs"
    short = ("+callbacks.stop_at._target_=callbacks.stop_at.StopAt", "+callbacks.stop_at.max_time=0.001s")
    assert ksuit(outputs, *RUN, *short, "requeue=false") == 128 + signal.SIGXCPU
    assert asked(tmp_path) == []
    job.setenv("SLURM_ARRAY_JOB_ID", "76")
    job.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert ksuit(outputs, "resume=last", "requeue=true") == 128 + signal.SIGXCPU
    assert asked(tmp_path) == ["requeue 76_3"]


def test_why_a_job_stays_out_of_the_queue_is_said(job, tmp_path, capsys):
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho Requeue not allowed >&2\nexit 1\n")
    requeue_after(signal.SIGHUP, True)
    assert "job 77 could not be put back into the queue: Requeue not allowed" in capsys.readouterr().err
    (tmp_path / "bin" / "scontrol").unlink()
    job.setenv("PATH", str(tmp_path))
    requeue_after(signal.SIGUSR2, True)
    assert "No such file or directory: 'scontrol'" in capsys.readouterr().err


def test_one_of_several_ranks_asks_and_nothing_else_does(job, tmp_path):
    requeue_after(None, True)
    requeue_after(signal.SIGINT, True)
    job.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        job.setenv("RANK", rank)
        requeue_after(signal.SIGUSR1, True)
    job.delenv("SLURM_JOB_ID")
    requeue_after(signal.SIGUSR1, True)
    assert asked(tmp_path) == ["requeue 77"]
