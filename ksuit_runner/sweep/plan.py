"""The plan of a sweep, stored before its first job starts; a resume follows the plan, whatever the YAML says by then.

What is stored contains no passwords, and is signed.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ksuit_runner.errors import ConfigError, ResumeError
from ksuit_runner.paths import SweepPaths
from ksuit_runner.security.authorship import sign
from ksuit_runner.security.masking import mask_config, mask_text
from ksuit_runner.sweep.parameters import Combination
from ksuit_runner.sweep.sweep_settings import SweepSettings, read_settings
from ksuit_runner.system.atomic_files import append_line, make_folder, write_text
from ksuit_runner.system.untrusted_files import UnsafeFileError, conform, parse_json, read_text

_LARGEST = 100_000_000  # bytes that a plan or the list of its jobs may have


@dataclass(frozen=True)
class Job:
    """A job of a sweep: one run.

    Attributes:
        index: Its number in the sweep, from 0.
        combination: What varies -> the value that this job has.
        config: Its resolved config, as plain values.
        choices: What was chosen of the groups by which runs are compared.
    """

    index: int
    combination: Combination
    config: dict[str, Any]
    choices: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep runs, and how.

    Attributes:
        name: Its name.
        command: The command line that started it.
        fixed: Overrides that all jobs have.
        settings: How the jobs follow from the parameters.
        launcher: Config of the launcher, as plain values.
        base: The resolved config that all jobs share.
        objective: Metric that the jobs are ranked by.
        yaml: Content of the sweep's YAML file; None for a sweep from the command line.
        created: When it was planned, in seconds since 1970.
        tracker: Values of the tracker that a resume has changed, such as its address on another machine.
        job_count: How many jobs there are; None for a search.
    """

    name: str
    command: str
    fixed: list[str]
    settings: SweepSettings
    launcher: dict[str, Any]
    base: dict[str, Any]
    objective: str | None = None
    yaml: dict[str, Any] | None = None
    created: float = field(default_factory=time.time)
    tracker: dict[str, Any] = field(default_factory=dict)
    job_count: int | None = None

    def with_tracker(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config of this sweep with the values of the tracker that a resume has changed."""
        before = config.get("tracker", {})
        changed = {
            key: {**before.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in self.tracker.items()
        }
        return {**config, "tracker": {**before, **changed}}


def store_plan(paths: SweepPaths, plan: SweepPlan, jobs: Sequence[Job]) -> None:
    """Store all jobs that are known, and last the plan: with it the sweep exists."""
    make_folder(paths.sweep_dir)
    text, lines = _plan_json(plan), [_job_json(job) for job in jobs]
    sign(paths.signature, text, *lines)
    write_text(paths.jobs, "".join(f"{line}\n" for line in lines))
    write_text(paths.plan, text)


def update_plan(paths: SweepPaths, plan: SweepPlan) -> None:
    """Store a plan whose settings or launcher a resume has changed."""
    text = _plan_json(plan)
    sign(paths.signature, text)
    write_text(paths.plan, text)


def add_job(paths: SweepPaths, job: Job) -> None:
    """Store a job that a search has suggested, durably, before it starts."""
    line = _job_json(job)
    sign(paths.signature, line)
    append_line(paths.jobs, line)


def stored_texts(paths: SweepPaths) -> list[str]:
    """Return the signed texts of a sweep: its plan and every job, as stored.

    Raises:
        ResumeError: One of the files cannot be read.
    """
    plan, jobs = _read_file(paths, paths.plan), _read_file(paths, paths.jobs)
    return [plan, *(line for line in jobs.split("\n") if _read_job(line) is not None)]


def read_plan(paths: SweepPaths) -> SweepPlan:
    """Return the plan of a sweep.

    Raises:
        ResumeError: It is damaged, or holds what the runner would not have stored.
    """
    try:
        plan = conform(SweepPlan, parse_json(_read_file(paths, paths.plan)))
        read_settings(asdict(plan.settings), plan.objective)
        return plan
    except (UnsafeFileError, ConfigError) as error:
        raise _damaged(paths, f"{paths.plan} {error}") from None


def read_jobs(paths: SweepPaths, count: int | None = None) -> list[Job]:
    """Return the jobs of a sweep in their order; a line that a crash has torn is a job that never started.

    Args:
        paths: Files of the sweep.
        count: Number of jobs; None for a search, which suggests one after the other.

    Raises:
        ResumeError: A job is missing or damaged.
    """
    lines = _read_file(paths, paths.jobs).split("\n")
    jobs = sorted((job for line in lines if (job := _read_job(line)) is not None), key=lambda job: job.index)
    expected = range(len(jobs) if count is None else count)
    if [job.index for job in jobs] != [*expected]:
        missing = sorted({*expected} - {job.index for job in jobs})
        raise _damaged(
            paths, f"{paths.jobs} is damaged, " + (f"it lacks job {missing[0]}" if missing else "jobs repeat")
        )
    return jobs


def _read_file(paths: SweepPaths, file: Path) -> str:
    try:
        return read_text(file, paths.sweeps_dir, _LARGEST)
    except UnsafeFileError as error:
        raise _damaged(paths, f"{file} {error}") from None


def _read_job(line: str) -> Job | None:
    try:
        return conform(Job, parse_json(line))
    except UnsafeFileError:
        return None


def _damaged(paths: SweepPaths, what: str) -> ResumeError:
    return ResumeError(f"sweep {paths.sweep_id[:8]} cannot be used: {what}")


def varied(jobs: Sequence[Job]) -> list[str]:
    """Return the keys in which jobs differ, in the order of the parameters."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for key, value in job.combination.items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def _plan_json(plan: SweepPlan) -> str:
    shown = mask_config(asdict(plan)) | {"fixed": list(map(mask_text, plan.fixed))}
    return json.dumps(shown, indent=2) + "\n"


def _job_json(job: Job) -> str:
    return json.dumps(mask_config(asdict(job)), separators=(",", ":"))
