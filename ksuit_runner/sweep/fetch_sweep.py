"""Fetch a sweep that was started on another machine: its plan and its runs, from the tracking server."""

import shutil
from collections.abc import Mapping

from ksuit_runner.config.targets import check_values
from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.errors import ConfigError, ResumeError
from ksuit_runner.paths import OutputPaths, PathProvider, SweepPaths
from ksuit_runner.resume.fetch_run import fetch
from ksuit_runner.sweep.job_runs import JobRecord
from ksuit_runner.sweep.plan import read_jobs, read_plan
from ksuit_runner.sweep.sweep_settings import Method
from ksuit_runner.system.atomic_files import commit_folder, make_folder
from ksuit_runner.system.untrusted_files import check_folder, remove
from ksuit_runner.tracker.base import KIND_TAG, BaseTracker, EndStatus


def fetch_plan(tracker: BaseTracker, outputs: OutputPaths, query: str) -> SweepPaths | None:
    """Fetch the plan of a sweep and its jobs: all of it, or nothing.

    Args:
        tracker: The tracker, bound to no run.
        outputs: The output folder.
        query: The sweep's id, the first 6 or more characters of it, or its name.

    Returns:
        Files of the sweep, or None if there is no such sweep.

    Raises:
        ResumeError: Several sweeps match, or this one cannot be resumed here.
        TrackerError: Something could not be read.
    """
    found = [info for info in tracker.find(query) if info.tags.get(KIND_TAG) == "sweep"]
    if not found:
        return None
    if len(found) > 1:
        raise ResumeError(f"'{query}' matches {len(found)} sweeps; give an id. The newest is {found[0].run_id}")
    info = found[0]
    sweep_id = PathProvider(outputs.output_dir, info.local_id).run_id  # checked: it can be the name of a folder
    paths, fetched = SweepPaths(outputs.output_dir, sweep_id), SweepPaths(outputs.fetching_dir, sweep_id)
    names = [fetched.plan.name, fetched.jobs.name]
    stored = {*tracker.list_artifacts("", info.run_id)}
    if not {*names} <= stored:
        raise ResumeError(
            f"sweep {sweep_id}: its plan is not in the tracker; it can be resumed only where it was started"
        )
    remove(outputs.fetching_dir)
    for name in [*names, *({fetched.signature.name} & stored)]:
        tracker.download(name, fetched.sweep_dir, info.run_id)
    check_folder(fetched.sweep_dir)
    _check_fetched(fetched)
    make_folder(paths.sweeps_dir)
    commit_folder(fetched.sweep_dir, paths.sweep_dir)
    shutil.rmtree(outputs.fetching_dir, ignore_errors=True)
    return paths


def fetch_runs(tracker: RecordedTracker, paths: SweepPaths, records: Mapping[int, JobRecord]) -> None:
    """Fetch the unfinished runs that are not in the output folder; one that stored no config has nothing to fetch.

    Args:
        tracker: Tracker that is bound to the parent run.
        paths: Files of the sweep.
        records: The runs of the jobs, by the number of the job.
    """
    if tracker.artifacts_are_local:
        return
    for record in records.values():
        run = PathProvider(paths.output_dir, record.run_id)
        if record.status == EndStatus.FINISHED or run.run_dir.exists():
            continue
        if {run.config.name, run.launch.name} <= {*tracker.store.list_artifacts("", record.tracker_id)}:
            fetch(tracker.store, paths, record.tracker_id)


def _check_fetched(paths: SweepPaths) -> None:
    """Read what was fetched as untrusted data: anybody may have changed it."""
    try:
        plan = read_plan(paths)
        jobs = read_jobs(paths, plan.job_count)
        for values in (plan.base, {"launcher": plan.launcher}, *(job.config for job in jobs)):
            check_values(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as error:
        raise ResumeError(f"sweep {paths.sweep_id}: its plan, from the tracker, cannot be used: {error}") from None
    if plan.settings.method is Method.TPE:
        raise ResumeError(f"sweep {paths.sweep_id}: a search can be resumed only where it was started, with its study")
