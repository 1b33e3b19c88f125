"""What a sweep shows while it runs, of jobs whose runs are written by the test."""

import io
import re
import threading
import time

import pytest
from rich.console import Console

from ksuit_runner.metric_property import MetricPropertyProvider
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.stored_run import add_to_index, store_length
from ksuit_runner.sweep.job_runs import tags_of
from ksuit_runner.sweep.job_watch import JobWatch
from ksuit_runner.sweep.plan import Job, SweepPlan
from ksuit_runner.sweep.progress import SweepProgress
from ksuit_runner.sweep.run_job import JobResult
from ksuit_runner.sweep.sweep_settings import SweepSettings
from ksuit_runner.tracker.base import EndStatus

ACCURACY = "accuracy/validation"
LINE = "1 of 3 jobs ended  job 1 40/80, job 2  best: job 3, accuracy/validation 0.9"


class Sweep:
    """Three jobs; what their runs log is up to the test."""

    def __init__(self, folder, is_terminal, width=80):
        environment = {"TERM": "xterm-256color"}
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=is_terminal, width=width, height=50, _environ=environment)
        self.paths = SweepPaths(folder, "sweep")
        self.plan = SweepPlan("mine", "command", [], SweepSettings(params={}), {}, {}, ACCURACY)
        self.jobs = [Job(index, {"seed": str(index), "model": "a_long_name"}, {}) for index in range(3)]

    def log(self, index, accuracy, length=80):
        paths = PathProvider(self.paths.output_dir, f"run{index}")
        journal = Journal(paths.journal)
        journal.append(40, {ACCURACY: accuracy, "loss/train": 1.0})
        journal.close()
        store_length(paths, length)
        add_to_index(self.paths, f"run{index}", "name", "train", tags=tags_of(self.jobs[index], self.paths))

    def progress(self, **arguments):
        properties = MetricPropertyProvider(higher=["accuracy/*"])
        return SweepProgress(self.console, self.paths, self.plan, properties, 3, **arguments)

    def wait_for(self, pattern):
        deadline = time.monotonic() + 10
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)

    @property
    def text(self):
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue())


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def is_terminal(request):
    return request.param


def test_jobs_best_value_and_time_left_are_shown(tmp_path, is_terminal):
    sweep = Sweep(tmp_path, is_terminal)
    sweep.log(2, 0.9)
    PathProvider(tmp_path, "run0").log.parent.mkdir(parents=True)
    PathProvider(tmp_path, "run0").log.touch()
    with sweep.progress(every_n_seconds=0.05) as progress:
        progress.had_ended(sweep.jobs[2], "FINISHED", "run2")
        progress.starts(sweep.jobs[0], None)
        progress.starts(sweep.jobs[1], None)
        sweep.log(0, 0.8)
        if is_terminal:
            sweep.wait_for(r"jobs ━.* 1/3 .*left\s+job 1  seed=0 model=a_\S* +40/80  accuracy/validation 0.8\s+job 2 ")
            sweep.wait_for(r"best   job 3  seed=2 model=\S* +accuracy/validation 0.9")
        else:
            sweep.wait_for(rf"{LINE}  \d\S* left")
        sweep.log(1, 0.95)
        progress.ends(sweep.jobs[1], JobResult(1, EndStatus.FINISHED, "run1", 75.0))
        progress.ends(sweep.jobs[0], JobResult(0, EndStatus.FAILED, "run0", 1.0, None, "it breaks", "Traceback"))
        sweep.wait_for(r"best:? +job 2")
    assert "job 2/3  finished  1m 15s  accuracy/validation 0.95  seed=1 model=a_long_name\n" in sweep.text
    assert re.search(
        r"job 1/3  failed .*\n(?s:.*)error: job 1 failed: it breaks\nlog: \S*run.log\nTraceback", sweep.text
    )
    assert ("starts" in sweep.text) is not is_terminal
    assert "sweep-progress" not in [thread.name for thread in threading.enumerate()]


def test_what_was_done_before_takes_no_time(tmp_path):
    sweep = Sweep(tmp_path, is_terminal=False)
    sweep.log(0, 0.5)
    sweep.log(1, 0.5)
    with sweep.progress() as progress:
        progress.had_ended(sweep.jobs[0], "FINISHED", "run0")
        progress.starts(sweep.jobs[1], "run1")
        assert progress._bar._bar.tasks[0].completed == 1.5 and progress._bar.left == ""
        progress.ends(sweep.jobs[1], JobResult(1, EndStatus.KILLED, "run1", 1.0))
        assert progress._ended == 1


def test_what_a_search_has_pruned_is_not_the_best_and_the_end_has_read_all(tmp_path):
    sweep = Sweep(tmp_path, is_terminal=True)
    for index, accuracy in enumerate((0.7, 0.8, 0.9)):
        sweep.log(index, accuracy)
    with sweep.progress() as progress:
        progress.had_ended(sweep.jobs[0], "FINISHED", "run0")
        progress.had_ended(sweep.jobs[1], "FINISHED", "run1", is_pruned=True)
        progress.starts(sweep.jobs[2], "run2")
        progress.ends(sweep.jobs[2], JobResult(2, EndStatus.FINISHED, "run2", 1.0), is_pruned=True)
    assert re.findall(r"best +(job \d)", sweep.text)[-1] == "job 1"
    assert "job 3/3  pruned" in sweep.text and not re.search("best +job [23]", sweep.text)


def test_jobs_start_and_end_while_a_file_is_read_and_the_best_is_named_once_all_are(tmp_path, monkeypatch):
    sweep = Sweep(tmp_path, is_terminal=False)
    for index, accuracy in enumerate((0.9, 0.8)):
        sweep.log(index, accuracy)
    look, is_reading, may_go_on, has_gone_on = JobWatch.look, *(threading.Event() for _ in range(3))

    def look_slowly(self):
        if threading.current_thread() is not threading.main_thread():
            is_reading.set()
            may_go_on.wait(10)
            has_gone_on.set()
        look(self)

    monkeypatch.setattr(JobWatch, "look", look_slowly)
    with sweep.progress(every_n_seconds=0.2) as progress:
        progress.had_ended(sweep.jobs[0], "FINISHED", "run0")
        progress.had_ended(sweep.jobs[1], "FINISHED", "run1")
        assert is_reading.wait(10)
        progress.starts(sweep.jobs[2], None)
        progress.ends(sweep.jobs[2], JobResult(2, EndStatus.FAILED, "refused", 1.0, None, "it is refused"))
        assert not has_gone_on.is_set()
        may_go_on.set()
        sweep.wait_for("best: ")
    assert set(re.findall(r"best: (job \d)", sweep.text)) == {"job 1"}
    assert "it is refused" in sweep.text and "log:" not in sweep.text, "its folder is gone"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_folds(tmp_path, width):
    sweep = Sweep(tmp_path, is_terminal=True, width=width)
    sweep.log(0, 0.123456)
    with sweep.progress() as progress:
        progress.starts(sweep.jobs[0], "run0")
        bar, job = sweep.text.splitlines()[-2:]
    assert len(bar) <= width and len(job) <= width and bar.startswith("jobs ━") and job.startswith("job 1  seed")
