"""The training process dies, the recorder dies, or both: what is recorded of the run then."""

import os
import resource
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from command import journal, mlflow_points, query, read_until, recorders_of, run_dir, wait_until
from pausing import make_project
from preloaded import ksuit, start

from ksuit_runner.checkpoint.folders import read_tags
from ksuit_runner.counter import Progress
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.recorder import life
from ksuit_runner.system.run_lock import is_held
from ksuit_runner.tracker.mlflow import MlflowTracker

RUN = ("model=pauses", "model.pauses_at=50", "trainer.max_epochs=3", "callbacks=[accuracy]")


@pytest.fixture
def project(tmp_path):
    make_project(tmp_path)
    (tmp_path / "armed").touch()
    return tmp_path


@pytest.fixture
def outputs(project, template):
    return shutil.copytree(template, project / "outputs")


def paused(project, outputs, *arguments):
    """Start a run that pauses in the middle, and return its process and that of its recorder."""
    process = start(outputs, *RUN, *arguments, cwd=project)
    read_until(process, "paused")
    return process, recorder_of(process.pid)


def recorder_of(pid):
    (found,) = recorders_of(pid)
    return found


def is_gone(process):
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def statuses(outputs):
    return [status for (status,) in query(outputs, "select status from runs")]


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def exits(outputs):
    return query(outputs, "select value from tags where key = 'ksuit.exit'")


def test_a_killed_run_is_recorded_as_killed_with_all_of_its_metrics(project, outputs):
    process, recorder = paused(project, outputs)
    process.kill()
    wait_for(lambda: statuses(outputs) == ["KILLED"], 5)
    recorder.wait(5)
    process.communicate()
    assert exits(outputs) == [("SIGKILL",)]
    directory = run_dir(outputs)
    assert journal(directory) == mlflow_points(outputs)
    paths = PathProvider(outputs, directory.name)
    assert not paths.lock.exists() and not paths.recorder_lock.exists()
    assert "the process of this run has died: SIGKILL" in paths.log.read_text()


def test_a_run_whose_checkpoints_cannot_be_committed_is_killed_nevertheless(project, outputs):
    process, recorder = paused(project, outputs)
    paths = PathProvider(outputs, run_dir(outputs).name)
    (paths.checkpoints_dir / ".E9_U180_S180.old").mkdir()  # cannot be moved back
    (paths.checkpoints_dir / "E9_U180_S180").symlink_to("nothing")
    process.kill()
    process.communicate()
    recorder.wait(10)
    assert statuses(outputs) == ["KILLED"]
    assert journal(paths.run_dir) == mlflow_points(outputs)
    assert "its last checkpoints are not committed" in paths.log.read_text()


def listed(outputs):
    """Return the models that MLflow lists of the run: name, checkpoint and the values that it was chosen by."""
    client = MlflowTracker(OutputPaths(outputs))._client
    models = client.search_logged_models(["1"])
    return [(model.name, Path(model.artifact_location), [value.value for value in model.metrics]) for model in models]


def best(outputs):
    """Return what is to be listed of the run as it stands."""
    paths = PathProvider(outputs, run_dir(outputs).name)
    name = read_tags(paths)["best"]
    value = journal(paths.run_dir)["accuracy/validation", Progress.parse(name).update]
    return [("best", paths.checkpoints_dir / name, [value])]


def test_a_run_lists_its_best_model_once_whatever_ends_it(project, outputs):
    given = ("callbacks=[accuracy,best_checkpoint]", "model.pauses_at=35")
    process, recorder = paused(project, outputs, *given)
    assert listed(outputs) == []
    process.kill()
    process.communicate()
    recorder.wait(10)
    first = best(outputs)
    assert listed(outputs) == first

    resumed = start(outputs, "resume=last", cwd=project)
    read_until(resumed, "paused")
    (recorder,) = recorders_of(resumed.pid)
    recorder.send_signal(signal.SIGSTOP)
    resumed.kill()
    recorder.kill()
    resumed.communicate()
    assert listed(outputs) == first
    assert "killed" in ksuit(outputs, "list=1", cwd=project)
    ksuit(outputs, "sync=last", cwd=project)
    assert listed(outputs) == best(outputs)

    (project / "armed").unlink()
    ksuit(outputs, "resume=last", cwd=project)
    assert listed(outputs) == best(outputs) != first
    ksuit(outputs, "resume=last", cwd=project)
    assert listed(outputs) == best(outputs)


def test_a_killed_run_that_is_resumed_at_once_is_not_touched_by_its_first_recorder(project, outputs):
    process, recorder = paused(project, outputs)
    recorder.send_signal(signal.SIGSTOP)
    process.kill()
    process.communicate()
    (project / "armed").unlink()
    resumed = start(outputs, "resume=last", cwd=project)
    wait_for(lambda: is_gone(recorder), 60)  # it was killed
    assert resumed.wait(120) == 0, resumed.stdout.read()
    assert statuses(outputs) == ["FINISHED"]
    assert journal(run_dir(outputs)) == mlflow_points(outputs)
    assert exits(outputs) == []


def test_training_continues_when_the_recorder_dies(project, outputs):
    process, recorder = paused(project, outputs)
    recorder.kill()
    wait_until(lambda: recorder not in (found := recorders_of(process.pid)) and found, process)
    (project / "armed").unlink()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "the recorder process has died and is started again" in output
    assert statuses(outputs) == ["FINISHED"]
    assert journal(run_dir(outputs)) == mlflow_points(outputs)


def test_a_recorder_that_dies_again_and_again_is_reported_and_tried_once_more_at_the_end(project, outputs):
    process, recorder = paused(project, outputs)
    for _ in range(2):
        recorder.kill()
        wait_until(lambda: recorder not in (found := recorders_of(process.pid)) and found, process)  # noqa: B023
        recorder = recorder_of(process.pid)
    recorder.kill()
    wait_until(lambda: "has died 3 times" in log_of(outputs), process)
    assert not recorders_of(process.pid)
    (project / "armed").unlink()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "the recorder process has died 3 times" in output
    assert "Training continues" in output
    assert statuses(outputs) == ["FINISHED"]
    assert journal(run_dir(outputs)) == mlflow_points(outputs)


def log_of(outputs):
    return PathProvider(outputs, run_dir(outputs).name).log.read_text()


def test_when_both_die_a_resume_finds_everything(project, outputs):
    process, recorder = paused(project, outputs)
    recorder.send_signal(signal.SIGSTOP)
    process.kill()
    recorder.kill()
    process.communicate()
    assert statuses(outputs) == ["RUNNING"]
    (project / "armed").unlink()
    ksuit(outputs, "resume=last", cwd=project)
    assert statuses(outputs) == ["FINISHED"]
    assert journal(run_dir(outputs)) == mlflow_points(outputs)


def test_signals_to_the_whole_group_end_the_run_and_not_its_record(project, outputs):
    process, recorder = paused(project, outputs)
    (project / "armed").unlink()
    for number in (signal.SIGTERM,):
        process.send_signal(number)
        os.kill(recorder.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert statuses(outputs) == ["KILLED"]
    assert exits(outputs) == []
    assert is_gone(recorder)
    assert not is_held(PathProvider(outputs, run_dir(outputs).name).recorder_lock)


def test_a_run_ends_though_its_recorder_cannot_look_for_checkpoints(project, outputs):
    process, recorder = paused(project, outputs, "tracker.close_timeout_s=1")
    _, hard = resource.prlimit(recorder.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(recorder.pid, resource.RLIMIT_NOFILE, (8, hard))
    (project / "armed").unlink()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "error: the checkpoint could not be written" in output and "Too many open files" in output
    ksuit(outputs, "resume=last", cwd=project)
    assert statuses(outputs) == ["FINISHED"]
    assert journal(run_dir(outputs)) == mlflow_points(outputs)


def hangs_soon():
    life._PING_S, life._HANGS_S = 0.2, 1.0


def test_a_recorder_that_hangs_is_killed_and_started_again(project, outputs):
    process = start(outputs, *RUN, cwd=project, prepare=hangs_soon)
    read_until(process, "paused")
    recorder_of(process.pid).send_signal(signal.SIGSTOP)
    (project / "armed").unlink()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "has not answered for 1 s and is killed" in output
    assert statuses(outputs) == ["FINISHED"]
    assert journal(run_dir(outputs)) == mlflow_points(outputs)
