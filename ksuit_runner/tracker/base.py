"""Base class of trackers."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ksuit_runner.config.overridden import check_overridden
from ksuit_runner.errors import TrackerError
from ksuit_runner.record.point import LoggedFile, Point

KIND_TAG = "ksuit.kind"
"""Tag that says what a run is; ``sweep`` for the parent of a sweep's runs."""

RUN_ID_TAG = "ksuit.run_id"
"""Tag with the id that a run has in its output folder, if the tracker could not be reached when it started."""

START_TAG = "ksuit.start_id"
"""Tag with a unique id of a run's start: a run whose creation was not acknowledged is not created twice."""


EXIT_TAG = "ksuit.exit"
"""Tag of a run that something else than training has ended: the reason, such as ``SIGKILL``."""

REFUSED = "refused before its first update"
"""Reason of a run that never began, for a tracker that keeps it."""


class EndStatus(StrEnum):
    """How a run ended; as text, it is the status in files, in trackers and for the user."""

    FINISHED = "FINISHED"  # it is complete
    FAILED = "FAILED"  # an error ended it
    KILLED = "KILLED"  # a signal ended it

    @classmethod
    def of(cls, status: str) -> "EndStatus | None":
        """Return the member of a recorded status; None for one that is not an end, such as RUNNING."""
        return next((member for member in cls if member == status), None)


@dataclass(frozen=True)
class RunInfo:
    """What is known about a recorded run without reading its metrics.

    Attributes:
        run_id: Its id.
        name: Its name; not necessarily unique.
        status: RUNNING, FINISHED, FAILED or KILLED. A process that was killed leaves RUNNING behind.
        tags: Its tags.
        parent_run_id: Id of the run that it is grouped under, such as its sweep.
        start_time: When it was started, in ms since 1970.
    """

    run_id: str
    name: str
    status: str = "RUNNING"
    tags: Mapping[str, str] = field(default_factory=dict)
    parent_run_id: str | None = None
    start_time: int = 0

    @property
    def local_id(self) -> str:
        """Id that the run has in its output folder."""
        local = self.tags.get(RUN_ID_TAG, "")
        return local if re.fullmatch("[0-9a-f]{32}", local) else self.run_id


@dataclass(frozen=True)
class ModelVersion:
    """A version of a model for a registry, or a model of the run for the list of an experiment's models.

    Attributes:
        path: Path of the model below the artifact root of its run, which another version of the run does not have.
        name: Name of the registered model, or of what the run has one of, such as ``best``.
        alias: Alias that the version gets; None for none.
        chosen_by: Metrics that a checkpoint was chosen by: it is listed, and not registered.
        weights: Name of the weights of a checkpoint that these metrics are about.
        export: Path below the artifact root of these weights as a model that MLflow loads; None for none.
    """

    path: str
    name: str
    alias: str | None = None
    chosen_by: tuple[str, ...] = ()
    weights: str = "model"
    export: str | None = None


@dataclass(frozen=True)
class ExportedModel:
    """A model that MLflow loads, among the files of its run.

    Attributes:
        path: Its path below the artifact root.
        checkpoint: Name of the checkpoint that has its weights, if that is kept.
        weights: Which of its weights: ``model``, or the name of others, such as ``ema``.
    """

    path: str
    checkpoint: str
    weights: str


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset as a run's record names it.

    Attributes:
        name: Its name.
        context: What it is used for, such as ``training``.
        digest: Short fingerprint of its content, at most 36 characters.
        source: Where it comes from.
        profile: Its sizes and the like, as text or JSON.
    """

    name: str
    context: str
    digest: str
    source: str
    profile: str = ""


class BaseTracker(ABC):
    """Records one run at a time: its parameters, tags, metrics and files.

    A subclass has to implement ``start_run``, ``resume_run``, ``end_run`` and ``log_points``; everything else has a
    default that records nothing and finds nothing. All methods raise TrackerError, with one line of reason, within
    seconds when the store cannot be used. ``log_points`` is called from a thread of its own.

    Where a method takes a ``run_id``, None means the run that the tracker is bound to.

    Attributes:
        require: Whether a run may start only if it can be recorded at once.
        close_timeout_s: How long the end of a run waits until everything is recorded, in seconds.
        has_registry: Whether it has a registry of models.
        may_be_away: Whether its store is not the run's own, such as a server: then a run that requires it asks first
            whether it answers (``check_answer``).
    """

    require: bool = True
    close_timeout_s: float = 10.0
    has_registry: bool = False
    may_be_away: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_overridden(cls, hooks=(), others=[name for name in vars(BaseTracker) if not name.startswith("_")])

    def __init__(self) -> None:
        self._run: RunInfo | None = None

    @property
    def run(self) -> RunInfo:
        """The run that is being recorded, as it was when it was started or resumed."""
        assert self._run is not None, "no run was started"
        return self._run

    @property
    def run_id(self) -> str:
        """Id of the run that is being recorded."""
        return self.run.run_id

    def is_bound_to(self, run_id: str) -> bool:
        """Whether this is the run that was last started, resumed or attached to."""
        return self._run is not None and self._run.run_id == run_id

    @property
    def artifacts_are_local(self) -> bool:
        """Whether the run's artifact root is ``PathProvider.artifacts_dir``: then files need no upload."""
        return True

    @abstractmethod
    def start_run(
        self,
        name: str | None,
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        start_time: int | None = None,
    ) -> RunInfo:
        """Start a new run and bind the tracker to it.

        Args:
            name: Name of the run; chosen by the tracker by default.
            tags: Tags of the run.
            parent_run_id: Run under which it is shown.
            start_time: When it was started, in ms since 1970, for a run that is registered later than that, or whose
                registration was not acknowledged. If the store has a run with its START_TAG, no other is created; a
                RUN_ID_TAG is added to that one.
        """

    @abstractmethod
    def resume_run(self, run_id: str) -> RunInfo:
        """Bind the tracker to a run that exists and mark it RUNNING again."""

    def attach_run(self, run_id: str) -> RunInfo:
        """Bind the tracker to a run that exists and leave its status as it is."""
        return self.resume_run(run_id)

    @abstractmethod
    def end_run(self, status: EndStatus, end_time: int | None = None) -> None:
        """Mark the run as ended, now or at a time in ms since 1970."""

    def delete_run(self) -> None:  # noqa: B027 - optional
        """Delete the run, which has ended before it began; a tracker that cannot keeps it, FAILED, with EXIT_TAG."""

    @abstractmethod
    def log_points(self, points: Sequence[Point]) -> None:
        """Record metric points, at most 1000; one that is recorded already changes nothing."""

    def log_files(self, files: Sequence[LoggedFile]) -> None:  # noqa: B027 - optional
        """Show images, tables and the like; one that is recorded already changes nothing.

        They are files in the run's folder, and artifacts of the run: what the tracker cannot show may be left to that.
        """

    def warm_up(self) -> None:  # noqa: B027 - optional
        """Import and prepare what the first call needs, ahead of it; opens nothing and leaves no trace."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let a tracker record what it is told in the block at once, at its end, where that takes less time."""
        yield

    def check_answer(self) -> None:  # noqa: B027 - optional
        """Check that the store answers, before time is spent on a run that could not be recorded; records nothing."""

    @property
    def is_behind(self) -> bool:
        """Whether something that it was told is not recorded yet; never true for a tracker that records at once."""
        return False

    def deliver(self) -> None:  # noqa: B027 - optional
        """Record what is not recorded yet, except for the end of the run."""

    def deliver_end(self) -> None:  # noqa: B027 - optional
        """Record that the run has ended, if it has."""

    def log_params(self, params: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Record parameters; one that is recorded already keeps its value."""

    def set_tags(self, tags: Mapping[str, str], run_id: str | None = None) -> None:  # noqa: B027 - optional
        """Set tags of a run."""

    def log_inputs(self, datasets: Sequence[DatasetInfo]) -> None:  # noqa: B027 - optional
        """Record which datasets the run uses."""

    def register_model(self, version: ModelVersion) -> None:  # noqa: B027 - optional
        """Add a version to a registered model, which is created if there is none; one that is there gets the alias.

        A checkpoint is listed instead, in place of the run's earlier one of that name.
        """

    def list_tagged(self, tag: str, chosen_by: Sequence[str]) -> None:  # noqa: B027 - for callbacks
        """List the checkpoint that has a tag when the run has ended, even if it is killed, among the models.

        For callbacks: what a tracker is told of it then is ``register_model``, with the name of the checkpoint.

        Args:
            tag: The tag.
            chosen_by: Metrics that the checkpoint is chosen by, at least one.
        """

    def add_export(self, export: ExportedModel) -> None:  # noqa: B027 - for callbacks
        """Say that a checkpoint can be loaded by MLflow: if it is listed, then so that MLflow finds this model."""

    def last_steps(self, run_id: str | None = None) -> dict[str, int]:
        """Return the last recorded step of every metric."""
        return {}

    def history(self, key: str, run_id: str | None = None) -> list[Point]:
        """Return all recorded points of a metric in the order of their steps."""
        return []

    def upload(self, path: Path, artifact_path: str) -> None:  # noqa: B027 - optional
        """Copy a file or folder to the run's artifacts, unless it is there already.

        Args:
            path: The file or folder.
            artifact_path: Its path below the artifact root; the last part is the name of the file or folder.
        """

    def download(self, artifact_path: str, destination: Path, run_id: str | None = None) -> Path:
        """Copy a file or folder from the run's artifacts into a folder, under its own name, and return its new path.

        Raises:
            TrackerError: There is no such artifact, or it could not be read.
        """
        raise TrackerError(f"{type(self).__name__} stores no '{artifact_path}'")

    def list_artifacts(self, path: str = "", run_id: str | None = None) -> list[str]:
        """Return the paths, below the artifact root, of what lies directly in one of its folders."""
        return []

    def delete_artifacts(self, path: str) -> None:  # noqa: B027 - optional
        """Delete a file or folder of the run's artifacts; one that does not exist is not an error."""

    def find(self, query: str) -> list[RunInfo]:
        """Look up runs without creating or changing anything.

        Args:
            query: A run's id, the first 6 or more characters of it, its name, or ``last`` for the newest run that
                is not the parent of a sweep.

        Returns:
            All runs that match, newest first.
        """
        return []

    def children(self, run_id: str) -> list[RunInfo]:
        """Return the runs that are grouped under a run, oldest first."""
        return []

    def where(self) -> str:
        """Say where the run is recorded and how to look at it: in a line, and a command in another, indented by two."""
        return f"{type(self).__name__} (nothing is recorded)"

    def check_key(self, key: str) -> None:  # noqa: B027 - optional
        """Check the name of a metric or parameter.

        Raises:
            ConfigError: The tracker would refuse it.
        """
