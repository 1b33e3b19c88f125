"""The runs of a sweep's jobs: the tags that they are launched with, and finding them by these tags."""

from collections.abc import Collection
from dataclasses import dataclass

from ksuit_runner.config.overrides import bare_name
from ksuit_runner.delivery.binding import is_delivered
from ksuit_runner.delivery.delivered import read_state
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider, SweepPaths
from ksuit_runner.record.stored_run import Launch, tags_of_runs
from ksuit_runner.sweep.job_config import overrides_of
from ksuit_runner.sweep.plan import Job, SweepPlan
from ksuit_runner.tracker.base import BaseTracker

SWEEP_TAG = "ksuit.sweep"
"""Tag with the id of the sweep that a run is a job of."""
JOB_TAG = "ksuit.job"
"""Tag with the number of the job."""
OVERRIDES_TAG = "ksuit.overrides"
"""Tag with the overrides that vary in the sweep."""


@dataclass(frozen=True)
class JobRecord:
    """The run that belongs to a job.

    Attributes:
        run_id: Its id.
        status: FINISHED, FAILED, KILLED, or RUNNING, which a killed process leaves behind; empty if no tracker knows.
        name: Its name.
        tracker_id: Id that the tracker knows it by.
        is_delivered: Whether the tracker has everything, up to how it ended.
    """

    run_id: str
    status: str
    name: str
    tracker_id: str
    is_delivered: bool = True


def runs_of_jobs(paths: SweepPaths) -> dict[int, str]:
    """Return the id of the run of each job that has one in the output folder, by the job's number."""
    found = {}
    for run_id, tags in tags_of_runs(paths).items():
        if tags.get(SWEEP_TAG) == paths.sweep_id and tags.get(JOB_TAG, "").isdecimal():
            found[int(tags[JOB_TAG])] = run_id
    return found


def local_record(paths: OutputPaths, run_id: str) -> JobRecord:
    """Return what the output folder knows of a run; of one whose outbox is damaged, only that it exists."""
    run = PathProvider(paths.output_dir, run_id)
    try:
        state = read_state(run)
    except TrackerError:
        state = None
    if state is None:
        return JobRecord(run_id, "", run_id[:8], run_id)
    status, name, tracker_id = state.box.status or "", state.box.name, state.tracker_id or run_id
    return JobRecord(run_id, status, name, tracker_id, is_delivered(run, state))


def find_records(paths: SweepPaths, tracker: BaseTracker, jobs: Collection[int] | None = None) -> dict[int, JobRecord]:
    """Return the run of each job that has one, by the job's number: from the output folder and from the tracker.

    The tracker knows runs that were killed before they stored anything, the output folder those that the tracker
    has lost or never got.

    Args:
        paths: Files of the sweep.
        tracker: Where its jobs are recorded.
        jobs: Numbers of its jobs: the tracker is asked only if the output folder has no run of one of them.
    """
    found = {index: local_record(paths, run_id) for index, run_id in runs_of_jobs(paths).items()}
    if jobs is not None and found.keys() >= set(jobs):
        return found
    for info in tracker.children(paths.sweep_id):
        index = info.tags.get(JOB_TAG, "")
        if info.tags.get(SWEEP_TAG) == paths.sweep_id and index.isdecimal() and int(index) not in found:
            found[int(index)] = JobRecord(info.local_id, info.status, info.name, info.run_id)
    return found


def launch_of(job: Job, plan: SweepPlan, paths: SweepPaths) -> Launch:
    """Return how the run of a job is started: its overrides and its tags."""
    overrides = [*plan.fixed, *overrides_of(job.combination)]
    return Launch(plan.command, overrides, tags=tags_of(job, paths), choices=job.choices)


def tags_of(job: Job, paths: SweepPaths) -> dict[str, str]:
    """Return the tags of a job's run: the sweep, its number, and all that varies, together and one by one."""
    varied = {f"sweep.{bare_name(key)}": value for key, value in job.combination.items()}
    return varied | {
        SWEEP_TAG: paths.sweep_id,
        JOB_TAG: str(job.index),
        OVERRIDES_TAG: " ".join(overrides_of(job.combination)),
    }
