"""The tracker that records runs in MLflow: in the output folder's own store, or on a server."""

from __future__ import annotations

import posixpath
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from ksuit_runner.config.types import NonNegativeFloat, PositiveFloat
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.point import LoggedFile, Point
from ksuit_runner.security.masking import mask_addresses
from ksuit_runner.system.untrusted_files import check_folder
from ksuit_runner.tracker import artifact_location
from ksuit_runner.tracker import mlflow_store as embedded
from ksuit_runner.tracker.base import BaseTracker, DatasetInfo, EndStatus, ModelVersion, RunInfo
from ksuit_runner.tracker.mlflow_client import (
    DATABASES,
    check_key,
    connect,
    delete_artifacts,
    experiment_id,
    explained,
    import_client,
    log_datasets,
)
from ksuit_runner.tracker.mlflow_files import shown_files
from ksuit_runner.tracker.mlflow_models import list_model, register_model
from ksuit_runner.tracker.mlflow_names import escape_short
from ksuit_runner.tracker.mlflow_registration import move_artifacts, register
from ksuit_runner.tracker.mlflow_search import (
    PARENT_TAG,
    active_run,
    children,
    find,
    history,
    last_points,
    name_in,
    run_info,
)
from ksuit_runner.tracker.mlflow_tags import with_shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_BATCH_SIZE = 100  # parameters or tags
_MAX_PARAM_LENGTH, _MAX_TAG_LENGTH = 6000, 8000


class MlflowTracker(BaseTracker):
    """Records runs in MLflow, through a client of its own: several trackers in one process do not disturb each other.

    Nothing is imported, opened or created before the first call.

    Args:
        output_paths: The output folder.
        uri: Tracking URI. By default the store that is embedded in the output folder: an SQLite database there, and the
            runs' folders themselves as artifacts.
        experiment: Name of the MLflow experiment.
        timeout_s: How long a server may take for an answer, and how long to wait for a database that another process
            has locked, in seconds. Raise it for a server that takes longer to store a large checkpoint; the
            environment variable MLFLOW_HTTP_REQUEST_TIMEOUT takes precedence.
        require: Whether a run may start only if it can be recorded at once. If not, one that starts while the store
            cannot be reached is registered there later.
        close_timeout_s: How long the end of a run waits until everything is recorded, in seconds.
        artifact_root: Folder or URI below which a store may have a run's files copied. By default only the run's own
            folder and the network: a database or a server could name any folder of this machine.
    """

    has_registry = True

    def __init__(
        self,
        output_paths: OutputPaths,
        uri: str | None = None,
        experiment: str = "ksuit_runner",
        timeout_s: PositiveFloat = 5,
        require: bool = True,
        close_timeout_s: NonNegativeFloat = 10,
        artifact_root: str | None = None,
    ) -> None:
        super().__init__()
        self._paths, self._uri = output_paths, uri
        self._experiment = experiment
        self._timeout_s = timeout_s
        self._artifact_root = artifact_root
        self.require, self.close_timeout_s, self.may_be_away = require, close_timeout_s, uri is not None
        self._blank: bytes | None = None
        self._connection: MlflowClient | None = None
        self._connecting = threading.Lock()
        self._bound: Run | None = None
        self._known_params: set[str] = set()
        self._known_inputs: set[DatasetInfo] = set()

    def warm_up(self) -> None:
        """Import MLflow and prepare the database that an output folder without one gets, which takes a second each."""
        import_client(self._uri)
        if self._uri is None and not embedded.exists(self._paths):
            self._blank = embedded.make_blank(self._paths)

    @explained
    def check_answer(self) -> None:
        """Ask the store for an experiment."""
        self._client.search_experiments(max_results=1)

    @property
    def artifacts_are_local(self) -> bool:
        """Whether the run's artifact root is in the output folder: then files need no upload."""
        assert self._bound is not None, "no run was started"
        return artifact_location.folder(self._bound.info.artifact_uri) in self._own_folders(self.run)

    @property
    def _artifacts_dir(self) -> Path:
        return PathProvider(self._paths.output_dir, self.run.local_id).artifacts_dir

    @explained
    def start_run(
        self,
        name: str | None,
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        start_time: int | None = None,
    ) -> RunInfo:
        """Create a run in MLflow, which chooses its id and, without one, its name."""
        tags = with_shown(tags) | ({PARENT_TAG: parent_run_id} if parent_run_id else {})
        tags = {escape_short(key): str(value)[:_MAX_TAG_LENGTH] for key, value in tags.items()}
        if start_time is not None:
            return self._bind(register(self._client, self._experiment_id(), name, tags, start_time), moved=True)
        return self._bind(self._client.create_run(self._experiment_id(), tags=tags, run_name=name))

    @explained
    def resume_run(self, run_id: str) -> RunInfo:
        """Bind the tracker to a run that exists and mark it RUNNING again."""
        self.attach_run(run_id)
        self._client.update_run(run_id, status="RUNNING")
        return self._bind(self._client.get_run(run_id))

    @explained
    def attach_run(self, run_id: str) -> RunInfo:
        """Bind the tracker to a run that exists and leave its status as it is."""
        return self._bind(active_run(self._client, run_id), moved=True)

    @explained
    def end_run(self, status: EndStatus, end_time: int | None = None) -> None:
        """Mark the run as ended, now or at a time in ms since 1970."""
        self._client.set_terminated(self.run_id, status.value, end_time)

    @explained
    def delete_run(self) -> None:
        """Move the run to MLflow's trash."""
        self._client.delete_run(self.run_id)

    @explained
    def log_points(self, points: Sequence[Point]) -> None:
        """Record metric points, at most 1000, in one request; one that is recorded already changes nothing."""
        from mlflow.entities import Metric

        assert self._bound is not None, "no run was started"
        bound = self._bound
        metrics = [Metric(name_in(bound, key), value, timestamp, step) for key, value, step, timestamp in points]
        self._client.log_batch(self.run_id, metrics, synchronous=True)

    @explained
    def log_files(self, files: Sequence[LoggedFile]) -> None:
        """Have MLflow's page show images as charts, and tables as such; the files themselves are artifacts."""
        from mlflow.entities import RunTag

        tags = shown_files(files, self._client.get_run(self.run_id).data.tags)
        self._client.log_batch(self.run_id, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)

    @explained
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters, cut at 6000 characters. MLflow never changes one: those that it has keep their value."""
        from mlflow.entities import Param

        escaped = {escape_short(key): str(value)[:_MAX_PARAM_LENGTH] for key, value in params.items()}
        added = {key: value for key, value in escaped.items() if key not in self._known_params}
        new = [Param(key, value) for key, value in added.items()]
        for start in range(0, len(new), _BATCH_SIZE):
            self._client.log_batch(self.run_id, params=new[start : start + _BATCH_SIZE], synchronous=True)
        self._known_params |= added.keys()

    @explained
    def set_tags(self, tags: Mapping[str, str], run_id: str | None = None) -> None:
        """Set tags of the run, or of another one, cut at 8000 characters."""
        from mlflow.entities import RunTag

        if run_id is not None:
            active_run(self._client, run_id)
        new = [RunTag(escape_short(key), str(value)[:_MAX_TAG_LENGTH]) for key, value in with_shown(tags).items()]
        for start in range(0, len(new), _BATCH_SIZE):
            self._client.log_batch(run_id or self.run_id, tags=new[start : start + _BATCH_SIZE], synchronous=True)

    @explained
    def log_inputs(self, datasets: Sequence[DatasetInfo]) -> None:
        """Record which datasets the run uses; one that is recorded already changes nothing."""
        new = [info for info in datasets if info not in self._known_inputs]
        if new:
            log_datasets(self._client, self.run_id, new)
        self._known_inputs.update(new)

    @explained
    def register_model(self, version: ModelVersion) -> None:
        """Add a version to a registered model, or list a checkpoint as the experiment's and the run's model."""
        assert self._bound is not None, "no run was started"
        if version.chosen_by:
            is_here = self._is_database and self.artifacts_are_local
            list_model(self._client, self._bound, version, self._artifacts_dir, is_here)
        else:
            register_model(self._client, self._bound, version)

    @explained
    def last_steps(self, run_id: str | None = None) -> dict[str, int]:
        """Return the last recorded step of every metric, in one request."""
        return {key: point.step for key, point in last_points(self._client, run_id or self.run_id).items()}

    @explained
    def history(self, key: str, run_id: str | None = None) -> list[Point]:
        """Return all recorded points of a metric in the order of their steps."""
        return history(self._client, run_id or self.run_id, key)

    @explained
    def upload(self, path: Path, artifact_path: str) -> None:
        """Copy a file or folder to the run's artifacts, unless it is there already."""
        if self.artifacts_are_local and path.resolve() == (self._artifacts_dir / artifact_path).resolve():
            return
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), artifact_path)
        else:
            folder, name = posixpath.split(artifact_path)
            assert name == path.name, f"MLflow cannot store {path.name} as {name}"
            self._client.log_artifact(self.run_id, str(path), folder or None)

    @explained
    def download(self, artifact_path: str, destination: Path, run_id: str | None = None) -> Path:
        """Copy a file or folder from the run's artifacts into a folder, under its own name, and return its new path."""
        root = artifact_location.folder(self._client.get_run(run_id or self.run_id).info.artifact_uri)
        if root is not None:
            check_folder(root)
        destination.mkdir(parents=True, exist_ok=True)
        return Path(self._client.download_artifacts(run_id or self.run_id, artifact_path, str(destination)))

    @explained
    def list_artifacts(self, path: str = "", run_id: str | None = None) -> list[str]:
        """Return the paths, below the artifact root, of what lies directly in one of its folders."""
        return [str(file.path) for file in self._client.list_artifacts(run_id or self.run_id, path or None)]

    @explained
    def delete_artifacts(self, path: str) -> None:
        """Delete a file or folder of the run's artifacts; one that does not exist is not an error."""
        assert self._bound is not None, "no run was started"
        if path in self.list_artifacts(posixpath.dirname(path)):
            delete_artifacts(self._client, self._bound.info.artifact_uri, path)

    @explained
    def find(self, query: str) -> list[RunInfo]:
        """Look up runs, also by their ids in an output folder, without creating or changing anything.

        An exact id is found anywhere; everything else in every experiment of the embedded store, but on a server, which
        others may share, in this tracker's experiment only.
        """
        if self._uri is not None:
            return find(self._client, self._experiment, query)
        return find(self._client, None, query) if embedded.exists(self._paths) else []

    @explained
    def children(self, run_id: str) -> list[RunInfo]:
        """Return the runs that are grouped under a run, oldest first."""
        return children(self._client, run_id)

    def where(self) -> str:
        """Say where the run is recorded and how to look at it."""
        if self._uri is None:
            return f"MLflow, see it with:\n  mlflow ui --backend-store-uri {quote(embedded.uri(self._paths))}"
        shown = mask_addresses(self._uri)
        if self._bound is None or not shown.startswith("http"):
            return f"MLflow, {shown}"
        info = self._bound.info
        return f"MLflow, {shown.rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}"

    def check_key(self, key: str) -> None:
        """Check that MLflow accepts the name of a metric, of which some characters are escaped."""
        check_key(key)

    @property
    def _client(self) -> MlflowClient:
        with self._connecting:  # metrics and files are sent from threads of their own
            if self._connection is None:
                uri = self._uri
                if uri is None:
                    uri = embedded.open_store(self._paths, self._timeout_s, self._blank)
                self._connection, self._blank = connect(uri, self._timeout_s), None
            return self._connection

    @property
    def _is_database(self) -> bool:
        return self._uri is None or self._uri.startswith(DATABASES)

    def _bind(self, run: Run, moved: bool = False) -> RunInfo:
        """Bind the tracker to a run; its folder may have another name than MLflow's id, and may have been ``moved``."""
        info = run_info(run)
        wanted, chosen = self._own_folders(info)
        if moved and self._is_database and chosen != wanted and run.info.artifact_uri == str(chosen):
            run = move_artifacts(self._client, run, wanted)
        artifact_location.check(run.info.artifact_uri, (wanted, chosen), self._artifact_root, self._uri is not None)
        self._bound, self._run = run, info
        self._known_params, self._known_inputs = set(run.data.params), set()
        return info

    def _own_folders(self, run: RunInfo) -> tuple[Path, Path]:
        """Return where the output folder has a run's files, and where MLflow puts them: mostly the same."""
        first, second = (PathProvider(self._paths.output_dir, run_id) for run_id in (run.local_id, run.run_id))
        return first.artifacts_dir, second.artifacts_dir

    def _experiment_id(self) -> str:
        # A server has a location for artifacts, a bare database has none.
        location = str(self._paths.runs_dir) if self._is_database else None
        tags = {embedded.OWN_TAG: "true"} if self._uri is None else {}
        return experiment_id(self._client, self._experiment, location, tags)
