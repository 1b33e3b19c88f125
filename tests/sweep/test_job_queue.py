"""A job of several ranks that has lost one starts again; what has failed by itself does not."""

from pathlib import Path

import pytest

from ksuit_runner.errors import ConfigError, LostRankError
from ksuit_runner.launchers.base import Launcher
from ksuit_runner.record.stored_run import Launch
from ksuit_runner.sweep.job_queue import run_jobs
from ksuit_runner.sweep.run_job import JobResult, JobTask, run_job
from ksuit_runner.system.signals import Interruption
from ksuit_runner.tracker.base import EndStatus

LOST = LostRankError("rank 1 is lost (its machine is gone)")


class Ends:
    """A job that has ended."""

    def __init__(self, how):
        self.how = how

    def done(self):
        return True

    def result(self):
        if isinstance(self.how, BaseException):
            raise self.how
        return self.how


class Scripted(Launcher):
    """Ends each start of its job as planned."""

    def __init__(self, *ends, at_submit=lambda: None):
        self.ends, self.at_submit = list(ends), at_submit

    def submit(self, function, task):
        self.at_submit()
        return Ends(self.ends.pop(0))


def run(launcher, interruption=None, **config):
    task = JobTask(0, Path(), "sweep", Path(), {"ranks": 2, "max_restarts": 2, **config}, Launch("", []))
    results, said = [], []
    run_jobs(
        iter([task]),
        launcher,
        interruption or Interruption(),
        lambda task: None,
        lambda task, result: results.append(result),
        lambda task, reason: said.append(reason),
    )
    assert not launcher.ends
    (result,) = results
    return result, said


def test_it_resumes_as_often_as_its_config_says():
    done = JobResult(0, EndStatus.FINISHED, "run")
    again = f"{LOST}: all ranks start again"
    assert run(Scripted(LOST, done)) == (done, [f"{again} (1 of at most 2 times)"])
    result, said = run(Scripted(LOST, LOST, LOST))
    assert (result.status, result.error) == (EndStatus.FAILED, str(LOST))
    assert said[1:] == [f"{again} (2 of at most 2 times)"]


@pytest.mark.parametrize("how", [ConfigError("no"), RuntimeError("no"), JobResult(0, EndStatus.FAILED, error="no")])
def test_what_fails_by_itself_fails_once(how):
    result, said = run(Scripted(how))
    assert result.status == EndStatus.FAILED and result.error.endswith("no") and not said


def test_a_single_process_and_a_sweep_that_ends_start_nothing_again():
    assert run(Scripted(LOST), ranks=1)[1] == []
    interruption = Interruption()
    stopped = Scripted(LOST, at_submit=lambda: interruption.handle(15, None))
    assert run(stopped, interruption)[1] == []


def test_a_folder_that_another_machine_does_not_share_is_the_error_of_any_rank(tmp_path, monkeypatch):
    task = JobTask(0, tmp_path / "elsewhere", "sweep", tmp_path, {"ranks": 2}, Launch("", []))
    monkeypatch.setenv("KSUIT_ATTEMPT", "first")
    assert "has to be on a file system that all machines share" in run_job(task).error
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="output_dir: .*elsewhere is another folder on"):
        run_job(task)
