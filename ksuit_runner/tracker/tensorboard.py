"""The tracker that writes event files for TensorBoard into the run's folder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from shlex import quote

from ksuit_runner.config.types import NonNegativeFloat
from ksuit_runner.errors import ConfigError, LostRunError, ResumeError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.point import LoggedFile, Point
from ksuit_runner.system.atomic_files import make_folder
from ksuit_runner.system.optional_package import require_package
from ksuit_runner.system.untrusted_files import UnsafeFileError, check_inside, open_to_read
from ksuit_runner.tracker.base import EndStatus, RunInfo
from ksuit_runner.tracker.file_tracker import Described, FileTracker
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


class TensorboardTracker(FileTracker):
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

    _STORE, _ERRORS = "TensorBoard's files", (OSError, ResumeError, UnsafeFileError)

    def __init__(self, output_paths: OutputPaths, require: bool = True, close_timeout_s: NonNegativeFloat = 10) -> None:
        super().__init__(output_paths, require, close_timeout_s)
        require_package("tensorboard")
        self._shown: RecordedSteps | None = None
        self._events: EventFile | None = None

    def warm_up(self) -> None:
        """Import TensorBoard's messages, which takes 0.2 s."""
        import_messages()

    @guarded
    def end_run(self, status: EndStatus, end_time: int | None = None) -> None:
        """Write how the run ended, as text, and close the file."""
        run = self._run_stored
        run.status = str(status)
        self._write_table("status", {"status": run.status})
        self._store()
        self._close()

    @guarded
    def log_points(self, points: Sequence[Point]) -> None:
        """Write metric points to the disk, except for those that the files have."""
        known = self._known
        if new := known.new(points):
            self._write(lambda file: file.add_points(new))
            known.add(new)

    @guarded
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

    def where(self) -> str:
        """Say where the files are and how to look at them."""
        return f"TensorBoard, see it with:\n  tensorboard --logdir {quote(str(self._outputs.runs_dir))}"

    def check_key(self, key: str) -> None:
        """Check that the name of a metric is not that of a text."""
        if not key or key.startswith((TEXT_PREFIX, HPARAMS_PREFIX)):
            raise ConfigError(f"metric '{key[:50]}': TensorBoard needs names that do not begin with {TEXT_PREFIX}")

    def _folder_in(self, paths: PathProvider) -> Path:
        return paths.tensorboard_dir

    def _read_points(self, folder: Path) -> Iterable[Point]:
        return read_points(folder)

    def _find(self, run_id: str) -> RunFile:
        stored = self._load(run_id)
        if stored is None:
            raise LostRunError(f"there are no files of run {run_id} for TensorBoard in {self._folder_of(run_id)}")
        return stored

    def _begin(self, stored: RunFile) -> RunInfo:
        stored.status = "RUNNING"
        info = self._bind(stored)
        self._store()
        return info

    def _bind(self, stored: RunFile) -> RunInfo:
        self._shown = None
        return super()._bind(stored)

    def _write_description(self, what: Described, new: Mapping[str, str], whole: Mapping[str, str]) -> None:
        """Write it as text; parameters also for the table of hyperparameters."""
        run = self._run_stored
        self._write_table("config" if what == "params" else what, whole)
        if what == "params":
            self._write(lambda file: file.add_hparams(run.name, whole, run.start_time))

    def _read(self, path: Path) -> bytes:
        check_inside(path, self._outputs.runs_dir)
        with open_to_read(path) as file:
            return file.read()

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
