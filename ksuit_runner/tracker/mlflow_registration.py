"""Registers runs in MLflow some time after they started: once, and with their files where they are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ksuit_runner.tracker.base import RUN_ID_TAG, START_TAG
from ksuit_runner.tracker.mlflow_database import move_run
from ksuit_runner.tracker.mlflow_search import search

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_LOGGER = logging.getLogger(__name__)


def register(
    client: MlflowClient, experiment_id: str, name: str | None, tags: Mapping[str, str], start_time: int
) -> Run:
    """Return the run with a START_TAG; create it if there is none.

    A process that was killed before it got the answer finds the run that it had created. A request that a server
    handled late, after it had timed out here, has left a second one; only the first stays.

    Args:
        client: MLflow's client.
        experiment_id: Id of the experiment.
        name: Name of the run.
        tags: Its tags, START_TAG among them, and RUN_ID_TAG if the output folder has it under another id.
        start_time: When it was started, in ms since 1970.
    """
    start = f"tags.`{START_TAG}` = '{tags[START_TAG]}'"
    found = list(search(client, [experiment_id], start, "ASC"))
    if not found:
        client.create_run(experiment_id, start_time, dict(tags), name)
        found = list(search(client, [experiment_id], start, "ASC"))
    first, *others = sorted(found, key=lambda run: str(run.info.run_id))
    for other in others:
        client.delete_run(other.info.run_id)
    if RUN_ID_TAG in tags and RUN_ID_TAG not in first.data.tags:
        client.set_tag(first.info.run_id, RUN_ID_TAG, tags[RUN_ID_TAG])
    return client.get_run(first.info.run_id)


def move_artifacts(client: MlflowClient, run: Run, folder: Path) -> Run:
    """Have MLflow find the files of a run in another folder than the one that it chose.

    Where that is not possible, MLflow does not show them; they are in the output folder all the same.

    Args:
        client: MLflow's client of a database that is used without a server.
        run: The run.
        folder: Where its files are.
    """
    is_known = move_run(client.tracking_uri, run.info.run_id, folder)
    run = client.get_run(run.info.run_id)
    if not is_known or run.info.artifact_uri != str(folder):
        _LOGGER.warning("this version of MLflow has other tables than known: it does not show the files in %s", folder)
    return run
