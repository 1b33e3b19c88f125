"""Connects to MLflow: with short timeouts, without its log, and with errors of one line.

MLflow takes more than a second to import, so that happens in ``connect`` and not before.
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ksuit_runner.errors import ConfigError, KsuitError, TrackerError
from ksuit_runner.security.masking import mask_text
from ksuit_runner.system.lean_import import import_without
from ksuit_runner.tracker.base import DatasetInfo
from ksuit_runner.tracker.mlflow_database import limit_lock_wait
from ksuit_runner.tracker.mlflow_names import LONGEST, metric_name
from ksuit_runner.tracker.mlflow_tags import EXPERIMENT_TAGS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DATABASES = ("sqlite:", "postgresql", "mysql", "mssql")
"""How the tracking URI of a database begins, which is used without a server."""

_OPTIONAL = ("pandas", "pyarrow")  # 80 MB and 0.3 s; mlflow-skinny does without them, too
_MAX_DIGEST_LENGTH = 36
_HINTS = ("(raised as a result of ", "[SQL: ", "[parameters: ", "(Background on this error at: ")
_our_settings: dict[str, str] = {}  # variables of the environment that this process has set


def connect(uri: str, timeout_s: float) -> MlflowClient:
    """Import MLflow and return a client of its own, without touching MLflow's global state.

    Timeouts and retries of the user's environment take precedence over the arguments.

    Args:
        uri: Tracking URI.
        timeout_s: How long a server may take for an answer, in seconds.
    """
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(math.ceil(timeout_s)),  # by default 120 s and 7 retries
        "MLFLOW_DOWNLOAD_CHUNK_TIMEOUT": str(math.ceil(timeout_s)),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the background threads retry
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    for name, value in settings.items():
        if os.environ.get(name) == _our_settings.get(name):  # neither the user's nor changed since
            os.environ[name] = _our_settings[name] = value
    import_client(uri)
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    if uri.startswith("sqlite:"):
        limit_lock_wait(uri, timeout_s)
    return client


def import_client(uri: str | None) -> None:
    """Import what a client needs for a tracking URI; None is that of the embedded store."""
    import_quietly("mlflow.store.tracking.sqlalchemy_store" if uri is None or uri.startswith(DATABASES) else "mlflow")


def import_quietly(module: str) -> Any:
    """Import a module of MLflow without its warnings, and silence its log, which repeats what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        imported = import_without(_OPTIONAL, module)
    for name in ("mlflow.store.db.utils", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return imported


def explained(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turn everything that MLflow, its database and its requests raise into a TrackerError of one line."""

    @wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return method(*args, **kwargs)
        except (KsuitError, AssertionError):
            raise
        except Exception as error:  # SQLAlchemy, requests, urllib3 and MLflow share no base class
            raise TrackerError(reason(error)) from error

    return call


def reason(error: BaseException) -> str:
    """Say in one line why a call failed, without passwords."""
    from requests.exceptions import ConnectionError, RetryError, Timeout
    from urllib3.exceptions import ReadTimeoutError

    if isinstance(cause := error.__context__, (ConnectionError, RetryError, Timeout)):
        url = str(cause.request.url if cause.request is not None else cause).partition("?")[0]
        late = isinstance(cause, Timeout) or isinstance(
            getattr((cause.args or (None,))[0], "reason", None), ReadTimeoutError
        )
        answer = "answers with errors" if isinstance(cause, RetryError) else "cannot be reached"
        return mask_text(f"MLflow {'did not answer in time' if late else answer}: {url}")
    return f"MLflow: {mask_text(_useful_line(error))[:300]}"


def _useful_line(error: BaseException) -> str:
    """Return the line of a message that says what is wrong, which is not always its first.

    SQLAlchemy puts hints for programmers before it, and the statement and a link after it; where it wraps an error of
    the database, that one counts.
    """
    cause: BaseException | None = error
    while cause is not None:
        said = getattr(cause, "orig", None)
        if isinstance(said, BaseException) and str(said).strip():
            return f"({type(said).__module__}.{type(said).__name__}) {_first_line(str(said))}"
        cause = cause.__cause__ or cause.__context__
    return _first_line(str(error).rpartition("Original exception was: ")[2]) or repr(error)


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(_HINTS)), lines[0] if lines else "")


def check_key(key: str) -> None:
    """Check that a metric's name has a length that MLflow accepts.

    Raises:
        ConfigError: It is too long, or empty.
    """
    length = len(metric_name(key))
    if not 0 < length <= LONGEST:
        raise ConfigError(f"metric '{key[:50]}': a name has 1 to {LONGEST} characters in MLflow, not {length}")


def experiment_id(client: MlflowClient, name: str, location: str | None, tags: dict[str, str]) -> str:
    """Return the id of an experiment, which is created if there is none of this name.

    Args:
        client: MLflow's client.
        name: Name of the experiment.
        location: Folder or URI for the artifacts of a new one; None leaves it to the server.
        tags: Tags of a new one, besides EXPERIMENT_TAGS, which one that is there gets as well.
    """
    key = (client.tracking_uri, name)
    if key not in _experiment_ids:
        _experiment_ids[key] = _find_experiment(client, name) or _create_experiment(client, name, location, tags)
    return _experiment_ids[key]


_experiment_ids: dict[tuple[str, str], str] = {}  # an id never changes


def _find_experiment(client: MlflowClient, name: str) -> str | None:
    found = client.get_experiment_by_name(name)
    if found is None:
        return None
    if found.lifecycle_stage == "active":
        for key in EXPERIMENT_TAGS.keys() - found.tags.keys():
            client.set_experiment_tag(found.experiment_id, key, EXPERIMENT_TAGS[key])
    return str(found.experiment_id)


def _create_experiment(client: MlflowClient, name: str, location: str | None, tags: dict[str, str]) -> str:
    try:
        return str(client.create_experiment(name, location, EXPERIMENT_TAGS | tags))
    except Exception:
        if found := _find_experiment(client, name):  # another process was quicker
            return found
        raise


def log_datasets(client: MlflowClient, run_id: str, datasets: Sequence[DatasetInfo]) -> None:
    """Record which datasets a run uses; their digests are cut at 36 characters.

    Where two runs add the same dataset at once, MLflow refuses the second one, which then succeeds when it retries.
    """
    inputs = [_dataset_input(info) for info in datasets]
    try:
        client.log_inputs(run_id, inputs)
    except Exception as error:
        if not _may_have_lost_a_race(error):
            raise
        client.log_inputs(run_id, inputs)


def _dataset_input(info: DatasetInfo) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": info.source})
    dataset = Dataset(info.name, info.digest[:_MAX_DIGEST_LENGTH], "local", source, profile=info.profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", info.context)])


def _may_have_lost_a_race(error: Exception) -> bool:
    """Whether a row may have existed already; a server says only that it failed."""
    from requests.exceptions import RetryError

    return "unique" in str(error).lower() or isinstance(error.__context__, RetryError)


def delete_artifacts(client: MlflowClient, artifact_uri: str, path: str) -> None:
    """Delete a file or folder below an artifact root, which MLflow's client itself cannot."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    get_artifact_repository(artifact_uri, tracking_uri=client.tracking_uri).delete_artifacts(path)
