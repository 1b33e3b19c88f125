"""A tracker beside the first: what it cannot take for now is stored in the run's folder, and recorded later."""

import json
import logging
import threading
import time
from pathlib import Path

import msgspec

from ksuit_runner.errors import TrackerError
from ksuit_runner.record.point import LoggedFile, Point, now
from ksuit_runner.system.atomic_files import append_line, make_folder
from ksuit_runner.system.untrusted_files import UnsafeFileError, conform, open_to_read, parse_json
from ksuit_runner.tracker.base import RUN_ID_TAG, BaseTracker, DatasetInfo, EndStatus, RunInfo

_LOGGER = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


class Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Something that is recorded of a run.

    Attributes:
        params: Parameters.
        inputs: Datasets that it uses.
        tags: Tags.
        points: Metric points, at most 1000.
        files: Logged files.
        end: How it ended, and when, in ms since 1970.
        is_withdrawn: Whether it is to be deleted.
    """

    params: dict[str, str] = msgspec.field(default_factory=dict)
    inputs: list[DatasetInfo] = msgspec.field(default_factory=list)
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    points: list[Point] = msgspec.field(default_factory=list)
    files: list[LoggedFile] = msgspec.field(default_factory=list)
    end: tuple[EndStatus, int] | None = None
    is_withdrawn: bool = False

    def deliver(self, tracker: BaseTracker) -> None:
        """Deliver to a tracker that is bound to the run."""
        if self.params:
            tracker.log_params(self.params)
        if self.inputs:
            tracker.log_inputs(self.inputs)
        if self.tags:
            tracker.set_tags(self.tags)
        if self.points:
            tracker.log_points(self.points)
        if self.files:
            tracker.log_files(self.files)
        if self.end is not None:
            tracker.end_run(*self.end)
        if self.is_withdrawn:
            tracker.delete_run()


class Follower:
    """Has a tracker record the runs of another one, under the ids that they have in the output folder.

    While the tracker fails, what it is sent is appended to a file in the run's folder, its backlog; once it can be
    used again, it gets the backlog first. A message may reach it twice after a crash, which changes nothing in it.

    Args:
        name: Name of the tracker in the config.
        tracker: The tracker.
    """

    def __init__(self, name: str, tracker: BaseTracker) -> None:
        self.tracker = tracker
        self._name = name
        self._lock = threading.Lock()
        self._info: RunInfo | None = None
        self._backlog = Path()
        self._taken = 0  # position in the backlog up to which the tracker has taken it
        self._is_joined = self._is_resumed = self._is_gone = False
        self._reason = ""
        self._pause_s, self._retry_at = _FIRST_PAUSE_S, 0.0

    @property
    def is_behind(self) -> bool:
        """Whether the tracker lacks something of the run."""
        return self._info is not None and self._backlog.exists()

    @property
    def reason(self) -> str:
        """Why the tracker could not record, the last time."""
        return f"tracker.{self._name}: {self._reason}"

    def follow(self, info: RunInfo, backlog: Path, is_resumed: bool = False) -> None:
        """Follow a run from now on; the tracker gets to know it with the first message.

        Args:
            info: The run, as the first tracker has it.
            backlog: File for what the tracker cannot take.
            is_resumed: Whether the run may be there with the status of its end.
        """
        with self._lock:
            if self._info is None or self._info.run_id != info.run_id:
                self._is_joined, self._is_gone, self._taken = False, False, 0
            self._info, self._backlog = info, backlog
            if is_resumed:
                self._is_joined, self._is_gone, self._is_resumed = False, False, True

    def join(self) -> None:
        """Have the tracker start or resume the run now.

        Raises:
            TrackerError: It could not, and the run requires it.
        """
        with self._lock:
            try:
                self._join()
            except Exception as error:  # a tracker of the user's own may raise anything
                self._failed(error)
                if self.tracker.require:
                    raise TrackerError(self.reason) from error

    def record(self, message: Message) -> None:
        """Have the tracker record a message, now or later.

        Raises:
            TrackerError: It could neither be recorded nor stored.
        """
        with self._lock:
            if not self.is_behind:
                try:
                    return self._deliver(message)
                except Exception as error:
                    self._failed(error)
            try:
                make_folder(self._backlog.parent)
                append_line(self._backlog, json.dumps(msgspec.to_builtins(message)))
            except OSError as error:
                raise TrackerError(f"{self._backlog}: {error.strerror or error}") from error

    def catch_up(self, is_last: bool = False) -> bool:
        """Have the tracker record its backlog, if it is time to try again; return whether it lacks nothing.

        Args:
            is_last: Whether to try at once.
        """
        with self._lock:
            if self.is_behind and (is_last or time.monotonic() >= self._retry_at):
                try:
                    self._send_backlog()
                except Exception as error:
                    self._failed(error)
            return not self.is_behind

    def _join(self) -> None:
        if self._is_joined:
            return
        assert self._info is not None, "no run was started"
        info, parent = self._info, self._info.parent_run_id
        if parent is not None and (found := self.tracker.find(parent)):
            parent = found[0].run_id
        tags = {**info.tags, RUN_ID_TAG: info.local_id}
        joined = self.tracker.start_run(info.name, tags, parent, info.start_time or now())
        if self._is_resumed:
            self.tracker.resume_run(joined.run_id)
        self._is_joined, self._is_resumed = True, False

    def _send_backlog(self) -> None:
        with open_to_read(self._backlog) as file:
            file.seek(self._taken)
            while line := file.readline():
                if line.strip():
                    self._send(line)
                self._taken = file.tell()
        self._backlog.unlink()
        self._taken, self._pause_s = 0, _FIRST_PAUSE_S
        _LOGGER.warning("tracker.%s can be used again, and has everything", self._name)

    def _send(self, line: bytes) -> None:
        try:
            message = conform(Message, parse_json(line.decode(errors="replace")))
        except UnsafeFileError as error:  # torn by a crash, after which it was sent again
            _LOGGER.warning("%s: a line is skipped: it %s", self._backlog, error)
        else:
            self._deliver(message)

    def _deliver(self, message: Message) -> None:
        if not self._is_gone:  # what was deleted gets nothing more
            self._join()
            message.deliver(self.tracker)
            self._is_gone = message.is_withdrawn

    def _failed(self, error: Exception) -> None:
        is_new = not self._reason or not self.is_behind
        self._reason = str(error) if isinstance(error, TrackerError) else repr(error)
        if is_new:
            _LOGGER.warning(
                "tracker.%s cannot be used for now (what it lacks is stored, the other trackers continue): %s",
                *(self._name, self._reason),
            )
        self._retry_at = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
