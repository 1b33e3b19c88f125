"""What a sweep is going to do, on disk before its first job starts; a resume goes by it and not by today's YAML.

What is stored has no passwords, and is signed.
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
    """A run of a sweep.

    Attributes:
        index: Its number in the sweep, from 0.
        combination: What varies -> the value that this job has.
        config: Its resolved config, as plain values.
    """

    index: int
    combination: Combination
    config: dict[str, Any]


@dataclass(frozen=True)
class SweepPlan:
    """A sweep.

    Attributes:
        name: Its name.
        command: The command line that started it.
        fixed: Overrides that all jobs have.
        settings: How the jobs follow from the parameters.
        launcher: Where the jobs run: the node `launcher` of the config, as plain values.
        base: The resolved config without anything that varies.
        objective: Metric that the jobs are ranked by.
        yaml: Content of the sweep's YAML file; None for a sweep from the command line.
        created: When it was planned, in seconds since 1970.
        tracker: What a resume has said about the tracker, such as the address that another machine knows it by.
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
        """Return a config of this sweep with what a resume has said about the tracker."""
        return {**config, "tracker": {**config.get("tracker", {}), **self.tracker}}


def store_plan(paths: SweepPaths, plan: SweepPlan, jobs: Sequence[Job]) -> None:
    """Store a plan and all jobs that are known; the plan itself comes last, with it the sweep exists."""
    make_folder(paths.sweep_dir)
    text, lines = _text(plan), [_line(job) for job in jobs]
    sign(paths.signature, text, *lines)
    write_text(paths.jobs, "".join(f"{line}\n" for line in lines))
    write_text(paths.plan, text)


def update_plan(paths: SweepPaths, plan: SweepPlan) -> None:
    """Store a plan whose settings or launcher a resume has changed."""
    text = _text(plan)
    sign(paths.signature, text)
    write_text(paths.plan, text)


def add_job(paths: SweepPaths, job: Job) -> None:
    """Add a job that a search has come up with, durably, before it starts."""
    line = _line(job)
    sign(paths.signature, line)
    append_line(paths.jobs, line)


def stored_texts(paths: SweepPaths) -> list[str]:
    """Return what is signed of a sweep: its plan and every job, as they are stored.

    Raises:
        ResumeError: One of the files cannot be read.
    """
    plan, jobs = _read(paths, paths.plan), _read(paths, paths.jobs)
    return [plan, *(line for line in jobs.split("\n") if _read_job(line) is not None)]


def read_plan(paths: SweepPaths) -> SweepPlan:
    """Return the plan of a sweep.

    Raises:
        ResumeError: It is damaged, or something that the runner would not have stored.
    """
    try:
        plan = conform(SweepPlan, parse_json(_read(paths, paths.plan)))
        read_settings(asdict(plan.settings), plan.objective)
        return plan
    except (UnsafeFileError, ConfigError) as error:
        raise _damaged(paths, f"{paths.plan} {error}") from None


def read_jobs(paths: SweepPaths, count: int | None = None) -> list[Job]:
    """Return the jobs of a sweep in their order; a line that a crash has torn is a job that never started.

    Args:
        paths: Files of the sweep.
        count: How many there have to be; None for a search, which comes up with one after the other.

    Raises:
        ResumeError: A job is missing or damaged.
    """
    lines = _read(paths, paths.jobs).split("\n")
    jobs = sorted((job for line in lines if (job := _read_job(line)) is not None), key=lambda job: job.index)
    expected = range(len(jobs) if count is None else count)
    if [job.index for job in jobs] != [*expected]:
        missing = sorted({*expected} - {job.index for job in jobs})
        raise _damaged(
            paths, f"{paths.jobs} is damaged, " + (f"it lacks job {missing[0]}" if missing else "jobs repeat")
        )
    return jobs


def _read(paths: SweepPaths, file: Path) -> str:
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


def _text(plan: SweepPlan) -> str:
    shown = mask_config(asdict(plan)) | {"fixed": list(map(mask_text, plan.fixed))}
    return json.dumps(shown, indent=2) + "\n"


def _line(job: Job) -> str:
    return json.dumps(mask_config(asdict(job)), separators=(",", ":"))
