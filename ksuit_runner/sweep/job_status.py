"""What became of each job, told by the records of the runs themselves."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from ksuit_runner.metric_property import MetricPropertyProvider, Summary
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.record.journal import read_points
from ksuit_runner.record.point import Point
from ksuit_runner.sweep.job_runs import JOB_TAG, SWEEP_TAG, JobRecord, local_record, runs_of_jobs
from ksuit_runner.sweep.task import JobResult
from ksuit_runner.system.atomic_files import append_line
from ksuit_runner.system.untrusted_files import UnsafeFileError, conform, parse_json
from ksuit_runner.tracker.base import BaseTracker


def find_records(paths: SweepPaths, tracker: BaseTracker) -> dict[int, JobRecord]:
    """Return the run of each job that has one, by the job's number.

    The tracker knows of runs that were killed before they stored anything, the output folder of those that were
    recorded nowhere else.
    """
    found = {index: local_record(paths, run_id) for index, run_id in runs_of_jobs(paths).items()}
    for info in tracker.children(paths.sweep_id):
        index = info.tags.get(JOB_TAG, "")
        if info.tags.get(SWEEP_TAG) == paths.sweep_id and index.isdecimal() and int(index) not in found:
            found[int(index)] = JobRecord(info.local_id, info.status, info.name, info.run_id)
    return found


def read_metrics(
    paths: SweepPaths,
    run_id: str,
    properties: MetricPropertyProvider,
    tracker: BaseTracker,
    objective: str | None,
    tracker_id: str | None = None,
) -> dict[str, Summary]:
    """Return the metrics of a run from its journal; of a run on another machine, the objective from the tracker."""
    path = PathProvider(paths.output_dir, run_id).journal
    if path.is_file():
        return _summarize(read_points(path), properties)
    return _summarize(tracker.history(objective, tracker_id or run_id) if objective else (), properties)


def _summarize(points: Iterable[Point], properties: MetricPropertyProvider) -> dict[str, Summary]:
    found: dict[str, Summary] = {}
    for point in points:
        if point.key not in found:
            found[point.key] = Summary(properties.direction(point.key), point.value, point.step)
        found[point.key].add(point.value, point.step)
    return found


def note_end(paths: SweepPaths, result: JobResult) -> None:
    """Keep what only the one who waits for a job knows: how long it took, and an error before there was a run."""
    end = Ended(result.index, result.seconds, result.status, result.error)
    append_line(paths.ended, json.dumps(asdict(end)))


@dataclass(frozen=True)
class Ended:
    """What was noted about the ends of a job.

    Attributes:
        index: The job's number.
        seconds: How long it took, all times together.
        status: How it ended the last time.
        error: What it failed with the last time.
    """

    index: int
    seconds: float
    status: str
    error: str


def read_ends(paths: SweepPaths) -> Mapping[int, Ended]:
    """Return what was noted about the ends of jobs, by their number; a line that a crash has torn is left out."""
    found: dict[int, Ended] = {}
    for line in paths.ended.read_bytes().splitlines() if paths.ended.is_file() else ():
        with suppress(UnsafeFileError, UnicodeDecodeError):
            end = conform(Ended, parse_json(line.decode()))
            before = found[end.index].seconds if end.index in found else 0.0
            found[end.index] = replace(end, seconds=before + end.seconds)
    return found


def status_of(record: JobRecord | None, end: Ended | None) -> str:
    """Return the status of a job: its run's record knows best, and what was noted at its end otherwise; or MISSING."""
    noted = end.status if end else ""
    if record is None:
        return noted or "MISSING"
    return record.status or noted or "RUNNING"
