"""A job whose process is not the first one that does it: a scheduler has put it back into its queue."""

import os
from dataclasses import replace

from ksuit_runner.config.factory import Factory
from ksuit_runner.delivery.deferred import DeferredTracker
from ksuit_runner.paths import OutputPaths, SweepPaths
from ksuit_runner.sweep.job_status import find_records
from ksuit_runner.sweep.task import JobResult, Task, do_job
from ksuit_runner.tracker.build import build_tracker


def begin_or_resume(task: Task) -> JobResult:
    """Do a job; if another process has begun it, after a preemption or on a machine that was lost, its run is resumed.

    Only the sweep's resume knows the runs of all jobs; a job that its scheduler starts again comes with the task that
    was made before it had a run.
    """
    if task.run_id is None and not _is_first(task):
        return do_job(task, _with_its_run)
    return do_job(task)


def _is_first(task: Task) -> bool:
    """Note that the job is begun; return whether it had not been before."""
    note = SweepPaths(task.output_dir, task.sweep_id).begun(task.index)
    note.parent.mkdir(exist_ok=True)
    try:
        os.close(os.open(note, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        return False
    return True


def _with_its_run(task: Task) -> Task:
    """Return the task with the run that it has by now, if it has one."""
    paths = SweepPaths(task.output_dir, task.sweep_id)
    tracker = DeferredTracker(build_tracker(Factory(task.config), paths), OutputPaths(task.output_dir))
    record = find_records(paths, tracker).get(task.index)
    return task if record is None else replace(task, run_id=record.run_id)
