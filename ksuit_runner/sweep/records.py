"""What became of each job, told by the records of the runs themselves."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ksuit_runner.durable_files import append_line
from ksuit_runner.journal import Point, read_points
from ksuit_runner.metric_property import Direction, MetricPropertyProvider
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.stored_run import read_launch, runs_since
from ksuit_runner.sweep.plan import Plan
from ksuit_runner.sweep.task import JobResult
from ksuit_runner.tracker.base import BaseTracker
from ksuit_runner.tracker.outbox import Outbox

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
        is_stored: Whether its config is in the output folder; a run that was killed before has nothing to go on from.
        tracker_id: Id that the tracker knows it by.
    """

    run_id: str
    status: str
    name: str
    is_stored: bool
    tracker_id: str


def find_records(paths: SweepPaths, plan: Plan, tracker: BaseTracker) -> dict[int, JobRecord]:
    """Return the run of each job that has one, by the job's number.

    The tracker knows of runs that were killed before they stored anything, the output folder of those that were
    recorded nowhere else.
    """
    found = {}
    for run_id, name in runs_since(paths, plan.created).items():
        run = PathProvider(paths.output_dir, run_id)
        tags = read_launch(run).tags if run.launch.is_file() else {}
        if tags.get(SWEEP_TAG) == paths.sweep_id:
            box = Outbox.load(run)
            status, tracker_id = (box.status if box else None) or "", (box.tracker_id if box else None) or run_id
            found[int(tags[JOB_TAG])] = JobRecord(run_id, status, name, True, tracker_id)
    for info in tracker.children(paths.sweep_id):
        if info.tags.get(SWEEP_TAG) == paths.sweep_id and int(info.tags.get(JOB_TAG, -1)) not in {-1, *found}:
            is_stored = PathProvider(paths.output_dir, info.local_id).launch.is_file()
            found[int(info.tags[JOB_TAG])] = JobRecord(info.local_id, info.status, info.name, is_stored, info.run_id)
    return found


@dataclass
class Metric:
    """Last and best value of a metric, and which direction is the better one."""

    direction: Direction
    last: float
    best: float | None = None


def read_metrics(
    paths: SweepPaths,
    run_id: str,
    properties: MetricPropertyProvider,
    tracker: BaseTracker,
    objective: str | None,
    tracker_id: str | None = None,
) -> dict[str, Metric]:
    """Return the metrics of a run from its journal; of a run on another machine, the objective from the tracker."""
    path = PathProvider(paths.output_dir, run_id).journal
    if path.is_file():
        return _summarize(read_points(path), properties)
    return _summarize(tracker.history(objective, tracker_id or run_id) if objective else (), properties)


def _summarize(points: Iterable[Point], properties: MetricPropertyProvider) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    for point in points:
        metric = found.setdefault(point.key, Metric(properties.direction(point.key), point.value))
        metric.last = point.value
        if metric.direction != "neutral" and properties.is_better(point.key, point.value, metric.best):
            metric.best = point.value
    return found


def note_end(paths: SweepPaths, result: JobResult) -> None:
    """Keep what only the one who waits for a job knows: how long it took, and an error before there was a run."""
    known = {"index": result.index, "status": result.status, "seconds": result.seconds, "error": result.error}
    append_line(paths.ended, json.dumps(known))


@dataclass(frozen=True)
class Ended:
    """What was noted about the ends of a job.

    Attributes:
        seconds: How long it took, all times together.
        status: How it ended the last time.
        error: What it failed with the last time.
    """

    seconds: float
    status: str
    error: str


def read_ends(paths: SweepPaths) -> Mapping[int, Ended]:
    """Return what was noted about the ends of jobs, by their number."""
    found: dict[int, Ended] = {}
    for line in paths.ended.read_text().splitlines() if paths.ended.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # torn by a crash
            continue
        before = found[entry["index"]].seconds if entry["index"] in found else 0.0
        found[entry["index"]] = Ended(before + entry["seconds"], entry["status"], entry["error"])
    return found


def status_of(record: JobRecord | None, end: Ended | None) -> str:
    """Return the status of a job: its run's record knows best, and what was noted at its end otherwise; or MISSING."""
    noted = end.status if end else ""
    if record is None:
        return noted or "MISSING"
    return record.status or noted or "RUNNING"
