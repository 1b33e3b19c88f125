"""Versions of models in MLflow's registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ksuit_runner.tracker.base import ModelVersion

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PATH_TAG = "ksuit.path"
"""Tag of a version with its path in its run: one whose creation was not acknowledged is not created twice."""


def register_model(client: MlflowClient, run: Run, version: ModelVersion) -> None:
    """Add a version to a registered model, which is created if there is none; one that is there gets the alias.

    Args:
        client: MLflow's client.
        run: The run that the model is of.
        version: The version.
    """
    run_id = run.info.run_id
    if not client.search_registered_models(f"name = {_quoted(version.name)}"):
        client.create_registered_model(version.name)
    found = client.search_model_versions(f"name = {_quoted(version.name)} and run_id = '{run_id}'")
    there = next((item for item in found if item.tags.get(PATH_TAG) == version.path), None)
    if there is None:
        source = f"{run.info.artifact_uri.rstrip('/')}/{version.path}"
        there = client.create_model_version(version.name, source, run_id, tags={PATH_TAG: version.path})
    if version.alias is not None:
        client.set_registered_model_alias(version.name, version.alias, there.version)


def _quoted(name: str) -> str:
    quote = "'" if '"' in name else '"'
    return f"{quote}{name}{quote}"
