"""The tracker that writes event files for TensorBoard into the run's folder."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any
from uuid import uuid4

from ksuit_runner.errors import ConfigError, LostRunError, ResumeError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.point import LoggedFile, Point, now
from ksuit_runner.system.atomic_files import make_folder
from ksuit_runner.system.optional_package import require_package
from ksuit_runner.system.untrusted_files import UnsafeFileError, check_inside, open_to_read
from ksuit_runner.tracker.base import RUN_ID_TAG, BaseTracker, DatasetInfo, EndStatus, RunInfo
from ksuit_runner.tracker.guarded import guarded
from ksuit_runner.tracker.recorded_steps import RecordedSteps
from ksuit_runner.tracker.run_file import RunFile
from ksuit_runner.tracker.tensorboard_events import (
    HPARAMS_PREFIX,
    TEXT_PREFIX,
    EventFile,
    import_messages,
    read_files,
    read_points,
)

_guarded = guarded("TensorBoard's files", OSError, ResumeError, UnsafeFileError)


class TensorboardTracker(BaseTracker):
    """Writes event files into the folder ``tensorboard`` of the run's folder.

    They are a copy of the journal for TensorBoard to show, and so they are not among the run's artifacts: they are not
    uploaded, and a checkpoint does not hold them. Each process that records the run writes a file of its own. What is
    in the files is not written again, so that a resumed run has every point once.

    Args:
        output_paths: The output folder.
        require: Whether a run may start only if the files can be written.
        close_timeout_s: How long the end of a run waits until everything is written, in seconds.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, output_paths: OutputPaths, require: bool = True, close_timeout_s: float = 10) -> None:
        super().__init__()
        require_package("tensorboard")
        self._outputs = output_paths
        self.require, self.close_timeout_s = require, close_timeout_s
        self._lock = threading.Lock()
        self._stored: RunFile | None = None
        self._recorded: RecordedSteps | None = None
        self._shown: RecordedSteps | None = None
        self._events: EventFile | None = None

    def warm_up(self) -> None:
        """Import TensorBoard's messages, which takes 0.2 s."""
        import_messages()

    @_guarded
    def start_run(
        self,
        name: str | None,
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        start_time: int | None = None,
    ) -> RunInfo:
        """Start a run under a new id, or under the one that it has in the output folder; there may be one already."""
        run_id = tags.get(RUN_ID_TAG) or uuid4().hex
        stored = self._load(run_id)
        if stored is None:
            stored = RunFile(run_id, name or run_id[:8], start_time or now(), parent_run_id, tags=dict(tags))
        return self._bind(stored, "RUNNING")

    @_guarded
    def resume_run(self, run_id: str) -> RunInfo:
        """Bind the tracker to a run whose files exist, and mark it RUNNING again."""
        return self._bind(self._load_existing(run_id), "RUNNING")

    @_guarded
    def attach_run(self, run_id: str) -> RunInfo:
        """Bind the tracker to a run whose files exist, and leave its status as it is."""
        return self._bind(self._load_existing(run_id))

    @_guarded
    def end_run(self, status: EndStatus, end_time: int | None = None) -> None:
        """Write how the run ended, as text, and close the file."""
        run = self._run_stored
        run.status = str(status)
        self._write_table("status", {"status": run.status})
        self._store()
        self._close()

    @_guarded
    def log_points(self, points: Sequence[Point]) -> None:
        """Write metric points to the disk, except for those that the files have."""
        known = self._known
        if new := known.new(points):
            self._write(lambda file: file.add_points(new))
            known.add(new)

    @_guarded
    def log_files(self, files: Sequence[LoggedFile]) -> None:
        """Write images, tables and the like to the disk, except for those that the files have."""
        root = PathProvider(self._outputs.output_dir, self._run_stored.run_id).artifacts_dir
        if self._shown is None:
            self._shown = RecordedSteps(read_files(self._folder))
        contents = []
        for file in self._shown.new(files):
            with suppress(FileNotFoundError):  # the user may have removed it
                contents.append((file, self._read(root / file.path)))
        if contents:
            self._write(lambda events: events.add_files(contents))
            self._shown.add(file for file, _ in contents)

    @_guarded
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Write parameters, as text and for the table of hyperparameters; those that are there keep their values."""
        run = self._run_stored
        new = {key: str(value) for key, value in params.items() if key not in run.params}
        if new:
            run.params |= new
            self._write_table("config", run.params)
            self._write(lambda file: file.add_hparams(run.name, run.params, run.start_time))
            self._store()

    @_guarded
    def set_tags(self, tags: Mapping[str, str], run_id: str | None = None) -> None:
        """Write tags of the run, as text; another run's files are not written to."""
        run = self._run_stored
        changed = {**run.tags, **tags}
        if run_id in (None, run.run_id) and changed != run.tags:
            run.tags = changed
            self._write_table("tags", changed)
            self._store()

    @_guarded
    def log_inputs(self, datasets: Sequence[DatasetInfo]) -> None:
        """Write which datasets the run uses, as text."""
        run = self._run_stored
        new = {info.name: f"{info.context}, {info.digest}, {info.source} {info.profile}" for info in datasets}
        if not new.items() <= run.datasets.items():
            run.datasets |= new
            self._write_table("datasets", run.datasets)
            self._store()

    @_guarded
    def last_steps(self, run_id: str | None = None) -> dict[str, int]:
        """Return the last recorded step of every metric, from the event files."""
        if self._stored is not None and run_id in (None, self._stored.run_id):
            return self._known.steps
        return RecordedSteps(read_points(self._folder_of(run_id or self.run_id))).steps

    @_guarded
    def history(self, key: str, run_id: str | None = None) -> list[Point]:
        """Return all recorded points of a metric in the order of their steps, from the event files."""
        points = [point for point in read_points(self._folder_of(run_id or self.run_id)) if point.key == key]
        return sorted(points, key=lambda point: (point.step, point.timestamp))

    def where(self) -> str:
        """Say in one line where the files are and how to look at them."""
        return f"TensorBoard, see it with: tensorboard --logdir {quote(str(self._outputs.runs_dir))}"

    def check_key(self, key: str) -> None:
        """Check that the name of a metric is not that of a text."""
        if not key or key.startswith((TEXT_PREFIX, HPARAMS_PREFIX)):
            raise ConfigError(f"metric '{key[:50]}': TensorBoard needs names that do not begin with {TEXT_PREFIX}")

    @property
    def _run_stored(self) -> RunFile:
        assert self._stored is not None, "no run was started"
        return self._stored

    @property
    def _known(self) -> RecordedSteps:
        if self._recorded is None:
            self._recorded = RecordedSteps(read_points(self._folder))
        return self._recorded

    @property
    def _folder(self) -> Path:
        return self._folder_of(self._run_stored.run_id)

    def _folder_of(self, run_id: str) -> Path:
        folder = PathProvider(self._outputs.output_dir, run_id).tensorboard_dir
        check_inside(folder, self._outputs.runs_dir)
        return folder

    def _read(self, path: Path) -> bytes:
        check_inside(path, self._outputs.runs_dir)
        with open_to_read(path) as file:
            return file.read()

    def _load(self, run_id: str) -> RunFile | None:
        return RunFile.load(self._folder_of(run_id), self._outputs.runs_dir, run_id)

    def _load_existing(self, run_id: str) -> RunFile:
        stored = self._load(run_id)
        if stored is None:
            raise LostRunError(f"there are no files of run {run_id} for TensorBoard in {self._folder_of(run_id)}")
        return stored

    def _bind(self, stored: RunFile, status: str | None = None) -> RunInfo:
        self._close()
        self._stored, self._recorded, self._shown = stored, None, None
        if status is not None:
            stored.status = status
            self._store()
        self._run = stored.info
        return self._run

    def _store(self) -> None:
        self._run_stored.store(self._folder)

    def _write_table(self, name: str, rows: Mapping[str, str]) -> None:
        step = max(self._recorded.steps.values(), default=0) if self._recorded is not None else 0
        self._write(lambda file: file.add_table(name, rows, step))

    def _write(self, add: Callable[[EventFile], None]) -> None:
        try:
            if self._events is None:
                make_folder(self._folder)
                self._events = EventFile(self._folder)
            add(self._events)
        except OSError:
            self._close()  # its end may be torn: what follows goes into another file
            self._recorded = self._shown = None
            raise

    def _close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None
