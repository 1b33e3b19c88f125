"""How the jobs of a sweep ended, and the metrics that their runs logged."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from ksuit_runner.metric_property import MetricPropertyProvider, Summary
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.record.journal import read_points
from ksuit_runner.record.point import Point
from ksuit_runner.sweep.job_runs import JobRecord
from ksuit_runner.sweep.run_job import JobResult
from ksuit_runner.system.atomic_files import append_line
from ksuit_runner.system.untrusted_files import UnsafeFileError, conform, parse_json
from ksuit_runner.tracker.base import BaseTracker, EndStatus


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


def record_end(paths: SweepPaths, result: JobResult) -> None:
    """Store what only the sweep knows: how long a job took, and an error before it had a run."""
    end = JobEnd(result.index, result.seconds, result.status, result.error)
    append_line(paths.ended, json.dumps(asdict(end)))


@dataclass(frozen=True)
class JobEnd:
    """How a job ended, as stored by the sweep.

    Attributes:
        index: The job's number.
        seconds: How long it took, all attempts together.
        status: How its last attempt ended.
        error: What its last attempt failed with.
    """

    index: int
    seconds: float
    status: EndStatus
    error: str


def read_ends(paths: SweepPaths) -> Mapping[int, JobEnd]:
    """Return how jobs ended, by their number; a line that a crash has torn is skipped."""
    found: dict[int, JobEnd] = {}
    for line in paths.ended.read_bytes().splitlines() if paths.ended.is_file() else ():
        with suppress(UnsafeFileError, UnicodeDecodeError):
            end = conform(JobEnd, parse_json(line.decode()))
            before = found[end.index].seconds if end.index in found else 0.0
            found[end.index] = replace(end, seconds=before + end.seconds)
    return found


def status_of(record: JobRecord | None, end: JobEnd | None) -> str:
    """Return the status of a job: that of its run, else the one stored by the sweep, else MISSING."""
    stored = end.status if end else ""
    if record is None:
        return stored or "MISSING"
    return record.status or stored or "RUNNING"
