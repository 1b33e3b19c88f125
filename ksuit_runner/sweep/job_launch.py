"""How a job's run is started: its overrides, and the tags that say what it is."""

from ksuit_runner.override_text import bare_name
from ksuit_runner.paths import SweepPaths
from ksuit_runner.stored_run import Launch
from ksuit_runner.sweep.job_config import overrides_of
from ksuit_runner.sweep.plan import Job, Plan
from ksuit_runner.sweep.records import JOB_TAG, SWEEP_TAG, JobRecord

OVERRIDES_TAG = "ksuit.overrides"
"""Tag with the overrides that vary in the sweep."""


def launch_of(job: Job, plan: Plan, paths: SweepPaths, record: JobRecord | None) -> Launch:
    """Return how the run of a job is started, or gone on with.

    Args:
        job: The job.
        plan: Its sweep.
        paths: Files of the sweep.
        record: Its run, if it has one. A run that was killed before it stored its config is started anew under its id.
    """
    overrides = [*plan.fixed, *overrides_of(job.combination)]
    if record is not None and record.is_stored:
        return Launch(plan.command, overrides, "resume", record.run_id)
    return Launch(plan.command, overrides, tags=tags_of(job, paths))


def tags_of(job: Job, paths: SweepPaths) -> dict[str, str]:
    """Return the tags of a job's run: the sweep, its number, and all that varies, together and one by one."""
    varied = {f"sweep.{bare_name(key)}": value for key, value in job.combination.items()}
    return varied | {
        SWEEP_TAG: paths.sweep_id,
        JOB_TAG: str(job.index),
        OVERRIDES_TAG: " ".join(overrides_of(job.combination)),
    }
