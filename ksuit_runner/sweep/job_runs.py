"""The runs of a sweep's jobs in the output folder, found by the tags that they were launched with."""

from dataclasses import dataclass

from ksuit_runner.delivery.outbox import Outbox
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider, SweepPaths
from ksuit_runner.record.stored_run import tags_of_runs

SWEEP_TAG = "ksuit.sweep"
"""Tag with the id of the sweep that a run is a job of."""
JOB_TAG = "ksuit.job"
"""Tag with the number of the job."""


@dataclass(frozen=True)
class JobRecord:
    """The run that belongs to a job.

    Attributes:
        run_id: Its id.
        status: FINISHED, FAILED, KILLED, or RUNNING, which a killed process leaves behind; empty if no tracker knows.
        name: Its name.
        tracker_id: Id that the tracker knows it by.
        is_delivered: Whether the tracker knows how it ended, and with that everything that came before.
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
    """Return what is known of a run in the output folder; of one whose notes are damaged, only that it is there."""
    try:
        box = Outbox.load(PathProvider(paths.output_dir, run_id))
    except TrackerError:
        box = None
    if box is None:
        return JobRecord(run_id, "", run_id[:8], run_id)
    is_delivered = not (box.has_messages or box.has_end)
    return JobRecord(run_id, box.status or "", box.name, box.tracker_id or run_id, is_delivered)
