"""How a job's run is started: its overrides, and the tags that say what it is."""

from ksuit_runner.config.overrides import bare_name
from ksuit_runner.paths import SweepPaths
from ksuit_runner.record.stored_run import Launch
from ksuit_runner.sweep.job_config import overrides_of
from ksuit_runner.sweep.job_runs import JOB_TAG, SWEEP_TAG
from ksuit_runner.sweep.plan import Job, Plan

OVERRIDES_TAG = "ksuit.overrides"
"""Tag with the overrides that vary in the sweep."""


def launch_of(job: Job, plan: Plan, paths: SweepPaths) -> Launch:
    """Return how the run of a job is started."""
    return Launch(plan.command, [*plan.fixed, *overrides_of(job.combination)], tags=tags_of(job, paths))


def tags_of(job: Job, paths: SweepPaths) -> dict[str, str]:
    """Return the tags of a job's run: the sweep, its number, and all that varies, together and one by one."""
    varied = {f"sweep.{bare_name(key)}": value for key, value in job.combination.items()}
    return varied | {
        SWEEP_TAG: paths.sweep_id,
        JOB_TAG: str(job.index),
        OVERRIDES_TAG: " ".join(overrides_of(job.combination)),
    }
