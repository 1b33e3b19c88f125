"""Whole runs with the recorder in a process, and in place where none can be started."""

import errno
import logging
import shutil
import subprocess
import sys

import pytest
from command import journal, mlflow_points, query, run_dir

from ksuit_runner.api import run
from ksuit_runner.errors import KsuitError
from ksuit_runner.recorder import client, life, tracker

RUN = ["model=linear", "trainer.max_epochs=1", "callbacks=[accuracy]"]
DYING = """
import os
from ksuit_runner.tracker.noop import NoopTracker

class Dying(NoopTracker):
    def end_run(self, status, end_time=None):
        os._exit(1)
"""
RENAMING = """
from ksuit_runner.tracker.noop import NoopTracker

class Renaming(NoopTracker):
    def start_run(self, title, labels, parent=None, begun=None):
        return super().start_run(title, labels, parent, begun)

    def log_params(self, values): ...
    def set_tags(self, labels, run=None): ...
    def log_inputs(self, data): ...
    def end_run(self, how, when=None):
        with open("ended", "w") as file:
            file.write(how)
"""
SLOW = """
import time
from pathlib import Path
from ksuit_runner.errors import ConfigError
from ksuit_runner.tracker.noop import NoopTracker

class Slow(NoopTracker):
    def warm_up(self):
        time.sleep(20)
        Path("imported").touch()

class Unfit(NoopTracker):
    def __init__(self):
        raise ConfigError("it is not installed")

class Missing:
    def __init__(self, **kwargs):
        raise FileNotFoundError(2, "No such file", "/missing")
    def __len__(self):
        return 0
    def __getitem__(self, index):
        return 0
"""
IMPORTS = """
import sys
from ksuit_runner.api import run
result = run([*sys.argv[1:]])
assert result.status == "FINISHED", result
print(sorted({"mlflow", "sqlalchemy"} & sys.modules.keys()))
"""


def test_the_process_that_trains_imports_no_mlflow(template, tmp_path):
    shutil.copytree(template, tmp_path / "outputs")
    command = [sys.executable, "-c", IMPORTS, *RUN, f"output_dir={tmp_path / 'outputs'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert mlflow_points(tmp_path / "outputs")


def test_where_no_process_can_be_started_it_runs_in_threads(template, tmp_path, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    outputs = shutil.copytree(template, tmp_path / "outputs")
    monkeypatch.setattr(life, "start_detached", refuse)
    monkeypatch.setattr(tracker, "_recorders", {})
    with caplog.at_level(logging.WARNING):
        result = run([*RUN, f"output_dir={outputs}"])
    assert result.status == "FINISHED"
    assert "no process can be started for the recorder" in caplog.text
    assert query(outputs, "select status from runs") == [("FINISHED",)]
    assert journal(run_dir(outputs)) == mlflow_points(outputs)


def test_a_second_run_of_a_process_has_the_same_recorder(template, tmp_path):
    outputs = shutil.copytree(template, tmp_path / "outputs")
    run([*RUN, f"output_dir={outputs}"])
    first = tracker.recorder()
    assert run([*RUN, f"output_dir={outputs}"]).status == "FINISHED"
    assert tracker.recorder() is first


def test_a_run_has_ended_even_if_no_recorder_can_deliver_that(tmp_path, monkeypatch, capsys):
    (tmp_path / "dying.py").write_text(DYING)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(client, "_MOST_STARTS", 1)
    result = run([*RUN, f"output_dir={tmp_path}", "tracker=noop", "tracker._target_=dying.Dying"])
    assert result.status == "FINISHED"
    assert "the record could not be delivered to the tracker, sync= will do it" in capsys.readouterr().out
    assert not (run_dir(tmp_path) / "lock.json").exists()


def test_a_tracker_may_name_its_arguments_otherwise(tmp_path, monkeypatch, caplog):
    (tmp_path / "renaming.py").write_text(RENAMING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        result = run([*RUN, f"output_dir={tmp_path}", "tracker=noop", "tracker._target_=renaming.Renaming"])
    assert result.status == "FINISHED" == (tmp_path / "ended").read_text()
    assert not caplog.records


@pytest.mark.parametrize(("tracker_class", "error"), [("Slow", "/missing"), ("Unfit", "it is not installed")])
def test_mistakes_are_found_in_their_order_while_the_recorder_still_imports(
    tmp_path, monkeypatch, tracker_class, error
):
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    targets = [f"tracker._target_=slow.{tracker_class}", "data.datasets.train._target_=slow.Missing"]
    with pytest.raises(KsuitError, match=error):
        run([*RUN, "tracker=noop", *targets])
    assert not (tmp_path / "imported").exists()
