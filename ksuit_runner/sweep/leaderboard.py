"""The leaderboard of a sweep: its jobs ranked by the objective, and the means over seeds or folds."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite, isnan, nan
from statistics import fmean, stdev

from ksuit_runner.config.overrides import bare_name, to_text
from ksuit_runner.metric_property import Direction, MetricPropertyProvider, Summary
from ksuit_runner.paths import SweepPaths
from ksuit_runner.sweep.job_runs import find_records
from ksuit_runner.sweep.job_status import read_ends, read_metrics, status_of
from ksuit_runner.sweep.parameters import SEED
from ksuit_runner.sweep.plan import Job, SweepPlan, varied
from ksuit_runner.sweep.sweep_settings import RankedValue
from ksuit_runner.tracker.base import BaseTracker


@dataclass(frozen=True)
class Row:
    """A job of the leaderboard.

    Attributes:
        index: Number of the job.
        values: What varies -> its value.
        status: finished, failed, killed, running, pruned, or missing for a job that has not started.
        run_id: Its run, if it has one.
        seconds: How long it took, in seconds.
        metrics: Values by metric: only the objective if there is one, else all metrics with a better direction.
    """

    index: int
    values: dict[str, str]
    status: str
    run_id: str | None
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Group:
    """Jobs that differ only in what the mean is over, such as their seed.

    Attributes:
        values: What varies besides -> its value.
        mean: Mean of the objective over the finished jobs that have one.
        deviation: Sample standard deviation, None for one job.
        count: Number of these jobs.
        published: Published figure to compare with, if there is one.
    """

    values: dict[str, str]
    mean: float
    deviation: float | None
    count: int
    published: float | None = None


@dataclass(frozen=True)
class Leaderboard:
    """A ranked sweep.

    Attributes:
        name: Name of the sweep.
        objective: Metric that it is ranked by; None keeps the order of the jobs.
        direction: Which direction of it is better.
        keys: What varies.
        rows: The jobs, finished ones first; within both parts, the best first and those without a value last.
        groups: The means over seeds or folds, best first; empty if no such parameter varies.
        mean_over: The parameters that the means are over.
    """

    name: str
    objective: str | None
    direction: Direction
    keys: list[str]
    rows: list[Row]
    groups: list[Group] = field(default_factory=list)
    mean_over: Sequence[str] = (SEED,)

    @property
    def compared(self) -> list[str]:
        """What varies and is not averaged out."""
        return [key for key in self.keys if bare_name(key) not in self.mean_over]

    @property
    def metric_keys(self) -> list[str]:
        """The metrics that are shown."""
        return list(dict.fromkeys(key for row in self.rows for key in row.metrics))


def make_leaderboard(
    paths: SweepPaths,
    plan: SweepPlan,
    jobs: Sequence[Job],
    tracker: BaseTracker,
    properties: MetricPropertyProvider,
    pruned: frozenset[int] = frozenset(),
) -> Leaderboard:
    """Rank the jobs of a sweep by the metrics of their runs.

    Args:
        paths: Files of the sweep.
        plan: Its plan.
        jobs: Its jobs.
        tracker: Where they are recorded.
        properties: Knows which direction of a metric is better.
        pruned: Numbers of the jobs that a search stopped early.
    """
    records, ends = find_records(paths, tracker, [job.index for job in jobs]), read_ends(paths)
    rows = []
    for job in jobs:
        record, end = records.get(job.index), ends.get(job.index)
        metrics: dict[str, Summary] = {}
        if record is not None:
            metrics = read_metrics(paths, record.run_id, properties, tracker, plan.objective, record.tracker_id)
        status = "pruned" if job.index in pruned else status_of(record, end).lower()
        run_id, seconds = record.run_id if record else None, end.seconds if end else 0.0
        shown = shown_metrics(metrics, plan.objective, plan.settings.value)
        rows.append(Row(job.index, job.combination, status, run_id, seconds, shown))
    direction = properties.direction(plan.objective) if plan.objective else "neutral"
    rows = _ranked(rows, plan.objective, direction)
    board = Leaderboard(plan.name, plan.objective, direction, varied(jobs), rows, mean_over=plan.settings.mean_over)
    return replace(board, groups=[_with_published(group, plan) for group in _groups(board)])


def shown_metrics(metrics: dict[str, Summary], objective: str | None, value: RankedValue) -> dict[str, float]:
    """Return what a job is ranked by: last or best value of the objective, or else all metrics with a direction."""
    if objective is None:
        return {key: metric.last for key, metric in metrics.items() if metric.direction != "neutral"}
    metric = metrics.get(objective)
    if metric is None:
        return {}
    best = metric.best if value is RankedValue.BEST else metric.last
    return {objective: metric.last if best is None else best}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation, None for one value; NaN if a value is non-finite."""
    if not all(map(isfinite, values)):
        return nan, nan if len(values) > 1 else None
    return fmean(values), stdev(values) if len(values) > 1 else None


def _order(value: float | None, direction: Direction) -> tuple[bool, float]:
    """Return the sort key of a value: no value and NaN come last."""
    if value is None or isnan(value):
        return True, inf
    return False, -value if direction == "higher" else value


def _ranked(rows: list[Row], objective: str | None, direction: Direction) -> list[Row]:
    if objective is None or direction == "neutral":
        return rows
    return sorted(rows, key=lambda row: (row.status != "finished", _order(row.metrics.get(objective), direction)))


def _with_published(group: Group, plan: SweepPlan) -> Group:
    published = {to_text(value): figure for value, figure in plan.settings.published.items()} | plan.settings.published
    figures = [published[value] for value in group.values.values() if value in published]
    return replace(group, published=figures[0]) if figures else group


def _groups(board: Leaderboard) -> list[Group]:
    if board.objective is None or board.compared == board.keys:
        return []
    values: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for row in board.rows:
        others = tuple((key, row.values[key]) for key in board.compared)
        if board.objective in row.metrics and row.status == "finished":
            values.setdefault(others, []).append(row.metrics[board.objective])
    groups = [Group(dict(others), *mean_and_deviation(found), len(found)) for others, found in values.items()]
    if board.direction == "neutral":
        return groups
    return sorted(groups, key=lambda group: _order(group.mean, board.direction))
