"""Base class of trackers that write files into the run's folder."""

import threading
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.point import LoggedFile, Point, now
from ksuit_runner.system.untrusted_files import check_inside
from ksuit_runner.tracker.base import RUN_ID_TAG, BaseTracker, DatasetInfo, RunInfo
from ksuit_runner.tracker.guarded import guarded
from ksuit_runner.tracker.recorded_steps import RecordedSteps
from ksuit_runner.tracker.run_file import RunFile

Described = Literal["params", "tags", "datasets"]
"""A field of ``RunFile`` that says what the run is."""


class FileTracker(BaseTracker):
    """Records runs, under their ids in the output folder, in files; each tracker has a folder in that of the run.

    Identity, tags and parameters are remembered there as well (``RunFile``). What is in the files is not written again,
    so that a resumed run has every point once.

    Args:
        output_paths: The output folder.
        require: Whether a run may start only if it can be recorded at once.
        close_timeout_s: How long the end of a run waits until everything is recorded, in seconds.
    """

    _STORE: str
    _ERRORS: tuple[type[Exception], ...]
    """See ``guarded``."""

    def __init__(self, output_paths: OutputPaths, require: bool, close_timeout_s: float) -> None:
        super().__init__()
        self.require, self.close_timeout_s = require, close_timeout_s
        self._outputs = output_paths
        self._lock = threading.Lock()
        self._stored: RunFile | None = None
        self._recorded: RecordedSteps | None = None

    @guarded
    def start_run(
        self,
        name: str | None,
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        start_time: int | None = None,
    ) -> RunInfo:
        """Start a run under a new id, or under the one that it has in the output folder; there may be one already."""
        run_id = tags.get(RUN_ID_TAG) or uuid4().hex
        new = RunFile(run_id, name or run_id[:8], start_time or now(), parent_run_id, tags=dict(tags))
        return self._begin(self._load(run_id) or new)

    @guarded
    def resume_run(self, run_id: str) -> RunInfo:
        """Bind the tracker to a run that exists and mark it RUNNING again."""
        return self._begin(self._find(run_id))

    @guarded
    def attach_run(self, run_id: str) -> RunInfo:
        """Bind the tracker to a run that exists and leave its status as it is."""
        return self._bind(self._find(run_id))

    @guarded
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters; one that is recorded already keeps its value."""
        known = self._run_stored.params
        self._describe("params", {key: str(value) for key, value in params.items() if key not in known})

    @guarded
    def set_tags(self, tags: Mapping[str, str], run_id: str | None = None) -> None:
        """Record tags of the run; another run's files are not written to."""
        if run_id in (None, self._run_stored.run_id):
            self._describe("tags", tags)

    @guarded
    def log_inputs(self, datasets: Sequence[DatasetInfo]) -> None:
        """Record which datasets the run uses."""
        texts = {info.name: f"{info.context}, {info.digest}, {info.source} {info.profile}" for info in datasets}
        self._describe("datasets", texts)

    @guarded
    def last_steps(self, run_id: str | None = None) -> dict[str, int]:
        """Return the last recorded step of every metric, from the files."""
        return RecordedSteps(self._read_points(self._folder_of(run_id or self.run_id))).steps

    @guarded
    def history(self, key: str, run_id: str | None = None) -> list[Point]:
        """Return all recorded points of a metric in the order of their steps, from the files."""
        found = self._read_points(self._folder_of(run_id or self.run_id))
        return sorted((point for point in found if point.key == key), key=lambda point: (point.step, point.timestamp))

    @abstractmethod
    def _folder_in(self, paths: PathProvider) -> Path:
        """Return the tracker's folder of a run."""

    @abstractmethod
    def _read_points(self, folder: Path) -> Iterable[Point]:
        """Read the points that the files in a folder hold."""

    def _read_logged(self, folder: Path) -> Iterable[Point | LoggedFile]:
        """Read everything that was logged and that the files hold; by default that is the points."""
        return self._read_points(folder)

    @abstractmethod
    def _find(self, run_id: str) -> RunFile:
        """Return what is known of a run that exists.

        Raises:
            LostRunError: Nothing is, and that is an error.
        """

    @abstractmethod
    def _begin(self, stored: RunFile) -> RunInfo:
        """Bind the tracker to a run and mark it RUNNING."""

    @abstractmethod
    def _write_description(self, what: Described, new: Mapping[str, str], whole: Mapping[str, str]) -> None:
        """Write what is new of the parameters, tags or datasets; the whole has what was written before, too."""

    @abstractmethod
    def _close(self) -> None:
        """Close what is open for the run that the tracker is bound to, if anything is."""

    def _describe(self, what: Described, new: Mapping[str, str]) -> None:
        run = self._run_stored
        before: dict[str, str] = getattr(run, what)
        whole = {**before, **new}
        if whole != before:
            self._write_description(what, new, whole)
            setattr(run, what, whole)
            self._store()

    @property
    def _run_stored(self) -> RunFile:
        assert self._stored is not None, "no run was started"
        return self._stored

    @property
    def _known(self) -> RecordedSteps:
        """What of the run the files have."""
        if self._recorded is None:
            self._recorded = RecordedSteps(self._read_logged(self._folder))
        return self._recorded

    @property
    def _folder(self) -> Path:
        return self._folder_of(self._run_stored.run_id)

    def _folder_of(self, run_id: str) -> Path:
        folder = self._folder_in(PathProvider(self._outputs.output_dir, run_id))
        check_inside(folder, self._outputs.runs_dir)
        return folder

    def _load(self, run_id: str) -> RunFile | None:
        return RunFile.load(self._folder_of(run_id), self._outputs.runs_dir, run_id)

    def _bind(self, stored: RunFile) -> RunInfo:
        self._close()
        self._stored, self._recorded = stored, None
        self._run = stored.info
        return self._run

    def _store(self) -> None:
        self._run_stored.store(self._folder)
