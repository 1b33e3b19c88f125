"""Reads runs from MLflow, by id, name or parent, and their metrics."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal

from ksuit_runner.errors import LostRunError
from ksuit_runner.record.point import Point
from ksuit_runner.tracker.base import KIND_TAG, RUN_ID_TAG, RunInfo
from ksuit_runner.tracker.mlflow_names import escape, metric_key, metric_name, unescape

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

PARENT_TAG = "mlflow.parentRunId"
"""Tag by which MLflow's page groups runs under another one."""


def run_info(run: Run) -> RunInfo:
    """Convert a run of MLflow."""
    info, tags = run.info, {unescape(key): value for key, value in run.data.tags.items()}
    return RunInfo(info.run_id, info.run_name, info.status, tags, tags.get(PARENT_TAG), info.start_time)


def find(client: MlflowClient, experiment: str | None, query: str) -> list[RunInfo]:
    """Return the run with this id, or else all runs whose id begins with it or that have this name, newest first.

    The id that a run has in its output folder, if it differs from MLflow's, works as well.

    Args:
        client: MLflow's client.
        experiment: Name of the experiment that is searched, None for all; an exact id is found anywhere.
        query: Run id, 6 or more characters of it, name, or ``last``.
    """
    experiments = [found.experiment_id for found in client.search_experiments() if experiment in (None, found.name)]
    if query == "last":
        runs = search(client, experiments, "", "DESC", page_size=5)
        newest = (run for run in runs if run.data.tags.get(KIND_TAG) != "sweep")
        return [run_info(run) for run in islice(newest, 1)]
    if re.fullmatch("[0-9a-f]{32}", query):
        local = f"tags.`{RUN_ID_TAG}` = '{query}'"
        return _exact(client, query) or [run_info(run) for run in search(client, experiments, local, "DESC")]
    quote = '"' if "'" in query else "'"
    filters = [f"attributes.run_name = {quote}{query}{quote}"]
    if re.fullmatch("[0-9a-f]{6,31}", query):
        filters += [f"attributes.run_id LIKE '{query}%'", f"tags.`{RUN_ID_TAG}` LIKE '{query}%'"]
    found = {run.info.run_id: run_info(run) for text in filters for run in search(client, experiments, text, "DESC")}
    return sorted(found.values(), key=lambda run: run.start_time, reverse=True)


def children(client: MlflowClient, run_id: str) -> list[RunInfo]:
    """Return the runs that are grouped under a run, oldest first."""
    experiment = client.get_run(run_id).info.experiment_id
    return [run_info(run) for run in search(client, [experiment], f"tags.`{PARENT_TAG}` = '{run_id}'", "ASC")]


def search(
    client: MlflowClient, experiments: Sequence[str], filters: str, order: Literal["ASC", "DESC"], page_size: int = 100
) -> Iterator[Run]:
    """Yield the runs that match a filter string of MLflow, in the order of their start, page by page."""
    token = None
    while experiments:  # none to search is not an error
        page = client.search_runs(
            list(experiments),
            filters,
            max_results=page_size,
            order_by=[f"attributes.start_time {order}"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def active_run(client: MlflowClient, run_id: str) -> Run:
    """Return the run with this id.

    Raises:
        LostRunError: There is no such run, or it was deleted.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise LostRunError(f"there is no run {run_id} in MLflow") from None
        raise
    if run.info.lifecycle_stage != "active":
        raise LostRunError(f"run {run_id} was deleted in MLflow, where it may be restored")
    return run


def _exact(client: MlflowClient, run_id: str) -> list[RunInfo]:
    try:
        return [run_info(active_run(client, run_id))]
    except LostRunError:
        return []


def last_points(client: MlflowClient, run_id: str) -> dict[str, Point]:
    """Return the point with the last step of every metric, in one request."""
    metrics = client.get_run(run_id).data.to_proto().metrics  # the only public way to the steps
    return {point.key: point for point in map(_point, metrics)}


def name_in(run: Run, key: str) -> str:
    """Return the name under which a run gets a metric; one of before names were changed keeps those that it has."""
    name, known = metric_name(key), run.data.metrics
    return escape(key) if name not in known and escape(key) in known else name


def history(client: MlflowClient, run_id: str, key: str) -> list[Point]:
    """Return all points of a metric in the order of their steps; a run has them under one name, see ``name_in``."""
    found = client.get_metric_history(run_id, metric_name(key))
    if not found and escape(key) != metric_name(key):
        found = client.get_metric_history(run_id, escape(key))
    return sorted(map(_point, found), key=lambda point: (point.step, point.timestamp))


def _point(metric: Metric) -> Point:
    value = metric.value
    if abs(value) == sys.float_info.max:  # as MLflow stores an infinity
        value = math.copysign(math.inf, value)
    return Point(metric_key(metric.key), value, metric.step, metric.timestamp)
