"""Models of runs in MLflow: versions in its registry, and the list of an experiment's models."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ksuit_runner.counter import Progress
from ksuit_runner.tracker.base import ModelVersion
from ksuit_runner.tracker.mlflow_database import move_model
from ksuit_runner.tracker.mlflow_search import history, name_in, run_info
from ksuit_runner.tracker.mlflow_tags import NOTE_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PATH_TAG = "ksuit.path"
"""Tag of a version with its path in its run: one whose creation was not acknowledged is not created twice."""
FILES_TAG = "ksuit.files"
"""Tag of a listed model with the address of its files, as ``mlflow.artifacts.download_artifacts`` takes it."""

_REFUSED = re.compile(r"""[/:.%"']""")  # in the name of a logged model
_NOTE = """The checkpoint of update {step} that is best by `{key}`. To load it where the run's output folder is:

```
from ksuit_runner import load_model

model = load_model("{run}@{name}")
```
"""
_WITH_EXPORT = """
To load it as `export_model` has written it, without its code:

```
model = mlflow.pytorch.load_model("models:/{model}")
```
"""
_WITHOUT_EXPORT = """
`mlflow.pytorch.load_model` does not load a checkpoint. `ksuit-runner export={run}@{name} export_as=mlflow` makes
a model for it, and so does the callback `export_model` with `weights_of: {tag}`.
"""


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


def list_model(client: MlflowClient, run: Run, version: ModelVersion, folder: Path, is_here: bool) -> None:
    """List a checkpoint among the models of an experiment, with the metrics that it was chosen by.

    Its files are those that MLflow loads, if they were exported, and otherwise those of the checkpoint.

    Args:
        client: MLflow's client.
        run: The run that the checkpoint is of; it has one of each name.
        version: The checkpoint.
        folder: The run's artifacts on this machine.
        is_here: Whether MLflow can be told that the files are there: a database that is used without a server. A server
            gets a second copy of an export. A checkpoint stays where it is, and a tag says so.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    run_id, experiment = run.info.run_id, run.info.experiment_id
    name = _REFUSED.sub("_", version.name)
    path = version.export or version.path
    tags = {PATH_TAG: version.path, FILES_TAG: f"runs:/{run_id}/{path}"}
    its_own = f"source_run_id = '{run_id}' AND name = '{name}'"
    for other in client.search_logged_models([experiment], its_own):
        if tags.items() <= other.tags.items() and other.status == "READY":
            return
        client.delete_logged_model(other.model_id)
    model = client.create_logged_model(experiment, name, run_id, tags)
    if not (is_here and move_model(client.tracking_uri, model.model_id, folder / path)) and version.export:
        client.log_model_artifacts(model.model_id, str(folder / version.export))
    checkpoint = Progress.parse(posixpath.basename(version.path))
    step = 0 if checkpoint is None else checkpoint.update
    client.set_logged_model_tags(model.model_id, {NOTE_TAG: _note(run, version, step, model.model_id)})
    points = [point for key in version.chosen_by for point in history(client, run_id, key) if point.step == step]
    # The points of the run itself: those with the same timestamp are stored once.
    metrics = [Metric(name_in(run, key), value, stamp, at, model.model_id) for key, value, at, stamp in points]
    client.log_batch(run_id, metrics, synchronous=True)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    client.finalize_logged_model(model.model_id, "READY")


def _note(run: Run, version: ModelVersion, step: int, model_id: str) -> str:
    weights = "" if version.weights == "model" else f"/{version.weights}"
    text = _NOTE + (_WITHOUT_EXPORT if version.export is None else _WITH_EXPORT)
    names = {"run": run_info(run).local_id, "name": version.name + weights, "tag": version.name, "model": model_id}
    return text.format(step=step, key=version.chosen_by[0], **names)


def _quoted(name: str) -> str:
    quote = "'" if '"' in name else '"'
    return f"{quote}{name}{quote}"
