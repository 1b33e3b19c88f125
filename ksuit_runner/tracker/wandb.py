"""The tracker that records runs by Weights & Biases, online or in files that can be uploaded later."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

from ksuit_runner.config.types import NonNegativeFloat, PositiveFloat
from ksuit_runner.errors import ConfigError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.point import LoggedFile, Point, now
from ksuit_runner.system.atomic_files import make_folder
from ksuit_runner.system.optional_package import require_package
from ksuit_runner.system.untrusted_files import check_inside
from ksuit_runner.tracker.base import EndStatus, RunInfo
from ksuit_runner.tracker.file_tracker import Described, FileTracker
from ksuit_runner.tracker.guarded import guarded
from ksuit_runner.tracker.plain_value import plain_value
from ksuit_runner.tracker.recorded_steps import Logged, RecordedSteps
from ksuit_runner.tracker.run_file import RunFile
from ksuit_runner.tracker.start_tags import NOTES_TAG, TAGS_TAG
from ksuit_runner.tracker.wandb_files import STEP, TIMESTAMP, RecordReader, logged_in, read_logged, read_points

if TYPE_CHECKING:
    from wandb import Run

_FLUSH_S, _POLL_S = 0.05, 0.02  # how often W&B's process writes its file, and how often that is looked at

_SHOWN = ("images", "tables", "histograms")  # kinds of logged files
_LONGEST_TAG = 64
_MOST_BINS = 512  # of W&B's histograms

_live_lock = threading.Lock()
_live = 0  # runs of this process that W&B's service has open


class WandbTracker(FileTracker):
    """Records runs by W&B, under their ids in the output folder; its files are in the run's folder.

    W&B's own process writes everything to its files and uploads it; it is ended with the last run. A point counts as
    recorded once it is in the files, and what is in them is not sent again, so that a resumed run has every point once.
    What that process could not upload before it was killed is uploaded by ``wandb sync``.

    Args:
        output_paths: The output folder.
        project: W&B's project.
        entity: W&B's user or team; by default that of the API key.
        mode: ``online``, or ``offline``: only files are written, and ``wandb sync`` uploads them. By default what the
            environment variable WANDB_MODE says, else ``online``.
        timeout_s: How long the server may take to start or resume a run, in seconds.
        require: Whether a run may start only if it can be recorded at once.
        close_timeout_s: How long the end of a run waits until everything is recorded, in seconds.

    Raises:
        ConfigError: W&B is not installed.
    """

    _STORE, _ERRORS = "W&B", (Exception,)

    def __init__(
        self,
        output_paths: OutputPaths,
        project: str = "ksuit_runner",
        entity: str | None = None,
        mode: Literal["online", "offline"] | None = None,
        timeout_s: PositiveFloat = 5,
        require: bool = True,
        close_timeout_s: NonNegativeFloat = 10,
    ) -> None:
        super().__init__(output_paths, require, close_timeout_s)
        require_package("wandb")
        self._project, self._entity = project, entity
        self._mode = mode or os.environ.get("WANDB_MODE", "online")
        self._timeout_s = timeout_s
        self._open_run: Run | None = None
        self._reader: RecordReader | None = None
        self._sent = RecordedSteps()  # what W&B's process has got, and may not have written yet

    def warm_up(self) -> None:
        """Import W&B, which takes a second."""
        _import_quietly()

    @guarded
    def end_run(self, status: EndStatus, end_time: int | None = None) -> None:
        """Have W&B finish the run, and wait until it has uploaded everything; W&B notes the time itself.

        Raises:
            TrackerError: It has not, in time; what is left is in the run's folder, for ``wandb sync``.
        """
        run = self._send_to()
        run.summary["status"] = str(status)
        try:
            run.finish(exit_code=0 if status == EndStatus.FINISHED else 1)
        except TimeoutError as error:
            raise TrackerError(f"W&B: not everything is uploaded. To upload it: {self._sync_command}") from error
        finally:
            self._close()

    @guarded
    def log_points(self, points: Sequence[Point]) -> None:
        """Send metric points, except for those that were sent."""
        self._log(points, lambda group: {point.key: point.value for point in group})

    @guarded
    def log_files(self, files: Sequence[LoggedFile]) -> None:
        """Send images, tables and histograms, except for those that were sent; the others stay in the run's folder."""
        root = PathProvider(self._outputs.output_dir, self.run_id).artifacts_dir
        media = {}
        for file in files:
            check_inside(root / file.path, self._outputs.runs_dir)
            with suppress(OSError, ValueError, TypeError, LookupError):  # it was removed or changed
                if (shown := _media(file, root / file.path)) is not None:
                    media[file] = shown
        self._log(list(media), lambda group: {file.key: media[file] for file in group})

    def _log(self, items: Sequence[Logged], row_of: Callable[[Iterable[Logged]], dict[str, Any]]) -> None:
        known = self._known
        new = known.new(items)
        if not new:
            return
        run = self._send_to()
        unsent = self._sent.new(new)
        try:
            for (step, timestamp), group in groupby(unsent, key=lambda item: (item.step, item.timestamp)):
                run.log({STEP: step, TIMESTAMP: timestamp / 1000, **row_of(group)})
        except Exception:
            self._recorded = None  # what is in the files counts
            self._close()  # W&B's process has died: another one gets the batch
            raise
        self._sent.add(unsent)
        self._wait_for(new, known)

    def where(self) -> str:
        """Say where the run is recorded and how to look at it."""
        if self._mode != "online":
            return f"W&B ({self._mode}), upload it with:\n  {self._sync_command}"
        run = self._open_run
        return f"W&B, {run.url if run is not None and run.url else self._project}"

    def check_key(self, key: str) -> None:
        """Check that the name of a metric is not one that W&B or this tracker uses."""
        if not key or key == STEP or key.startswith("_"):
            raise ConfigError(f"metric '{key[:50]}': W&B needs names that do not begin with '_' and are not '{STEP}'")

    @property
    def _sync_command(self) -> str:
        if self._stored is None:  # nothing is recorded of the run yet
            return "wandb sync"
        return f"wandb sync {quote(str(self._folder_of(self._stored.run_id)))}/*run-*"

    def _folder_in(self, paths: PathProvider) -> Path:
        return paths.wandb_dir

    def _read_points(self, folder: Path) -> Iterable[Point]:
        return read_points(folder)

    def _read_logged(self, folder: Path) -> Iterable[Point | LoggedFile]:
        return read_logged(folder)

    def _find(self, run_id: str) -> RunFile:
        """Return what is known of a run; one that W&B does not know is started anew there."""
        return self._load(run_id) or RunFile(run_id, run_id[:8], now())

    def _begin(self, stored: RunFile) -> RunInfo:
        if not self.is_bound_to(stored.run_id):
            self._bind(stored)
        self._send_to()
        return self.run

    def _write_description(self, what: Described, new: Mapping[str, str], whole: Mapping[str, str]) -> None:
        """Send it as a part of the run's config; W&B's own tags and notes are those that the user has given."""
        config = self._send_to().config
        if what == "params":
            config.update({key: plain_value(value) for key, value in new.items()})
        else:
            config.update({what: dict(whole)}, allow_val_change=True)
        if what == "tags" and {NOTES_TAG, TAGS_TAG} & new.keys():  # to set them writes a record
            run = self._send_to()
            run.notes, run.tags = _told(whole)

    def _wait_for(self, items: Sequence[Logged], recorded: RecordedSteps) -> None:
        """Wait until points or files are in W&B's file; its process writes them a moment after it got them."""
        assert self._reader is not None, "no run is open"
        deadline = time.monotonic() + self._timeout_s
        while True:
            recorded.add(item for record in self._reader.read() for item in logged_in(record))
            if not recorded.new(items):
                return
            if time.monotonic() > deadline:
                raise TrackerError(f"W&B's process has not written its file for {self._timeout_s:g} s")
            time.sleep(_POLL_S)

    def _send_to(self) -> Run:
        """Return W&B's object for the run, which W&B starts or resumes first if it has not."""
        global _live
        if self._open_run is None:
            with _live_lock:
                self._open_run = self._init()
                _live += 1
            self._sent = RecordedSteps()
            self._reader = RecordReader(Path(self._open_run.settings.sync_file))
            self._open_run.define_metric(STEP)
            self._open_run.define_metric("*", step_metric=STEP)
            self._store()
        return self._open_run

    def _init(self) -> Run:
        wandb = _import_quietly()
        is_online = self._mode == "online"
        if is_online and not os.environ.get("WANDB_API_KEY") and not wandb.login(prompt=False, verify=False):
            raise TrackerError("W&B: there is no API key. Set WANDB_API_KEY, run `wandb login`, or set mode to offline")
        stored, folder = self._run_stored, self._folder
        notes, tags = _told(stored.tags)
        make_folder(folder)
        settings = wandb.Settings(
            **{"silent": True, "console": "off", "symlink": False},
            # What was sent is what the runner sends: no code, command lines or system metrics of this process.
            **{"disable_git": True, "disable_code": True, "save_code": False, "x_save_requirements": False},
            **{"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True},
            init_timeout=self._timeout_s,
            x_transaction_log_flush_interval=_FLUSH_S,
            finish_timeout=self.close_timeout_s,
            finish_timeout_raises=True,
        )
        try:
            run: Run = wandb.init(
                project=self._project,
                entity=self._entity,
                mode=self._mode,
                notes=notes or None,
                tags=tags,
                id=stored.run_id,
                name=stored.name,
                group=stored.parent_run_id,
                dir=str(folder.parent),
                resume="allow" if is_online else None,
                reinit="create_new",
                config={key: plain_value(value) for key, value in stored.params.items()}
                | {"tags": stored.tags, "datasets": stored.datasets},
                settings=settings,
            )
        except BaseException:
            _end_service()
            raise
        finally:
            _remove_links(folder)
        return run

    def _close(self) -> None:
        """Forget W&B's object for the run; the last one of this process takes W&B's own process with it."""
        global _live
        if self._open_run is not None:
            self._open_run = self._reader = None
            with _live_lock:
                _live -= 1
                _end_service()


def _media(file: LoggedFile, path: Path) -> Any:
    """Return a logged file as W&B shows it; None if it does not."""
    wandb = _import_quietly()
    if file.kind not in _SHOWN:
        return None
    if file.kind == "images":
        return wandb.Image(str(path))
    table = json.loads(path.read_bytes())
    if file.kind == "tables":
        return wandb.Table(columns=table["columns"], data=table["data"], allow_mixed_types=True)
    bins = [row for row in table["data"] if row[0] is not None]
    if not 0 < len(bins) <= _MOST_BINS:
        return None
    edges = [row[0] for row in bins] + [row[1] for row in bins[-1:]]
    return wandb.Histogram(np_histogram=([row[2] for row in bins], edges))


def _remove_links(folder: Path) -> None:
    """Remove W&B's links to logs elsewhere: a run's folder with a link that leaves it is not resumed."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            path.unlink()


def _end_service() -> None:
    """End W&B's own process if no run is open."""
    if _live == 0:
        with suppress(Exception, SystemExit):  # it calls sys.exit if that process has died
            _import_quietly().teardown()


def _told(tags: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Return what W&B shows as notes and tags of a run."""
    words = (word.strip()[:_LONGEST_TAG] for word in tags.get(TAGS_TAG, "").split(","))
    return tags.get(NOTES_TAG, ""), tuple(filter(None, words))


def _import_quietly() -> Any:
    """Import W&B, without its reports of errors to its makers, and without what it prints."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb
