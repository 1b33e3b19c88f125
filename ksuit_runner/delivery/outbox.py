"""What is to be delivered to a run's tracker, as stored in the run's folder, and how much of it is delivered."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated
from uuid import uuid4

import msgspec
from msgspec import Meta

from ksuit_runner.errors import LostRunError, TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider, RunId
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.stored_run import add_to_index
from ksuit_runner.system.atomic_files import make_folder, write_text
from ksuit_runner.system.untrusted_files import MissingFileError, UnsafeFileError, conform, read_json
from ksuit_runner.tracker.base import KIND_TAG, RUN_ID_TAG, START_TAG, BaseTracker, DatasetInfo, EndStatus

_LOGGER = logging.getLogger(__name__)
_SIZE_LIMIT = 100_000_000  # thousands of parameters of the longest kind
_Count = Annotated[int, Meta(ge=0, lt=1 << 53)]


@dataclass(frozen=True)
class Messages:
    """What is delivered about a run, and about others, at once: the same attributes as in ``Outbox``."""

    version: int
    params: dict[str, str]
    tags: dict[str, str]
    inputs: list[DatasetInfo]
    other_tags: dict[str, dict[str, str]]

    def deliver(self, tracker: BaseTracker, known: Callable[[str], str | None]) -> None:
        """Deliver to a tracker that is bound to the run.

        Args:
            tracker: The tracker.
            known: Returns the tracker's id of another run of the output folder; None for one that is not registered.
        """
        if self.params:
            tracker.log_params(self.params)
        if self.inputs:
            tracker.log_inputs(self.inputs)
        if self.tags:
            tracker.set_tags(self.tags)
        for run_id, tags in self.other_tags.items():
            if tracker_id := known(run_id):
                with suppress(LostRunError):  # what is gone needs no tags
                    tracker.set_tags(tags, tracker_id)


class Outbox(msgspec.Struct, forbid_unknown_fields=True):
    """A run's identity, and everything for its tracker; also what is delivered, in case the tracker loses the run.

    Attributes:
        run_id: Id of the run in the output folder.
        name: Its name.
        tracker_id: Its id in the tracker's store; None while it is not registered there.
        start_time: When it was started, in ms since 1970.
        parent_run_id: Id, in the output folder, of the run that it is grouped under.
        start_tags: Tags that it is registered with.
        params: Parameters of the run.
        tags: Tags that were added since.
        inputs: Datasets that it uses.
        other_tags: Tags that it adds to other runs, by their ids in the output folder.
        version: Number of additions to these.
        delivered_version: Number of additions that are delivered.
        status: How it ended; None while it runs, and after it was killed.
        end_time: When it ended, in ms since 1970.
        is_end_delivered: Whether its status is delivered.
    """

    run_id: RunId
    name: str
    tracker_id: RunId | None = None
    start_time: _Count | None = None
    parent_run_id: RunId | None = None
    start_tags: dict[str, str] = msgspec.field(default_factory=dict)
    params: dict[str, str] = msgspec.field(default_factory=dict)
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    inputs: list[DatasetInfo] = msgspec.field(default_factory=list)
    other_tags: dict[RunId, dict[str, str]] = msgspec.field(default_factory=dict)
    version: _Count = 0
    delivered_version: _Count = msgspec.field(default=0, name="told_version")
    status: EndStatus | None = None
    end_time: _Count | None = None
    is_end_delivered: bool = msgspec.field(default=False, name="is_end_told")

    @classmethod
    def load(cls, paths: PathProvider) -> Outbox | None:
        """Read what was stored in a run's folder; None if nothing was.

        Raises:
            TrackerError: The file is damaged, or is another run's.
        """
        try:
            found = read_json(paths.outbox, paths.runs_dir, _SIZE_LIMIT)
            box = conform(
                cls, {"version": 1, **found} if isinstance(found, dict) else found
            )  # 1: nothing is delivered yet
        except MissingFileError:
            return None
        except UnsafeFileError as error:
            raise TrackerError(f"{paths.outbox} is damaged: it {error}") from None
        if box.run_id != paths.run_id:
            raise TrackerError(f"{paths.outbox} belongs to run {box.run_id}, not to the run of this folder")
        return box

    def store(self, paths: PathProvider) -> None:
        """Write it to a run's folder: after a crash what was stored before is there, or this.

        A full disk does not end a run: deliveries are then made from memory.
        """
        try:
            make_folder(paths.run_dir)
            write_text(paths.outbox, json.dumps(msgspec.to_builtins(self), indent=2) + "\n")
        except OSError as error:
            _LOGGER.error(
                "what is to be delivered to the tracker of run %s could not be written: %s", self.run_id, error
            )

    def add_params(self, params: Mapping[str, str]) -> None:
        """Add parameters; existing ones keep their values."""
        self.params = {**params, **self.params}
        self.version += 1

    def add_tags(self, tags: Mapping[str, str], run_id: str) -> None:
        """Add tags, of this run or of another one."""
        (self.tags if run_id == self.run_id else self.other_tags.setdefault(run_id, {})).update(tags)
        self.version += 1

    def add_inputs(self, datasets: Sequence[DatasetInfo]) -> None:
        """Add datasets that are not in the list."""
        self.inputs += [info for info in datasets if info not in self.inputs]
        self.version += 1

    @property
    def has_messages(self) -> bool:
        """Whether something is to be delivered, apart from the end of the run."""
        return self.tracker_id is None or self.delivered_version != self.version

    def messages(self) -> Messages:
        """Return what is to be delivered now."""
        others = {run_id: dict(tags) for run_id, tags in self.other_tags.items()}
        return Messages(self.version, dict(self.params), dict(self.tags), list(self.inputs), others)

    def forget_registration(self) -> None:
        """Have the run registered again, with everything that was ever delivered."""
        self.tracker_id, self.delivered_version, self.is_end_delivered = None, 0, False
        self.start_tags = {START_TAG: uuid4().hex, **self.start_tags, RUN_ID_TAG: self.run_id}

    @property
    def has_end(self) -> bool:
        """Whether the run has ended and that is not delivered yet."""
        return self.status is not None and not self.is_end_delivered


def load_or_ask(paths: PathProvider, tracker: BaseTracker) -> Outbox:
    """Read what was stored in a run's folder; for a run of a version that stored nothing, ask the tracker.

    Raises:
        TrackerError: The file is damaged, or the tracker does not answer.
    """
    box = Outbox.load(paths)
    if box is not None:
        return box
    box = Outbox(paths.run_id, paths.run_id[:8], paths.run_id)
    for info in tracker.find(paths.run_id):
        box.name, box.start_time, box.tracker_id = info.name, info.start_time, info.run_id
        box.status = EndStatus.of(info.status)
        box.is_end_delivered = box.status is not None
    return box


def index_registered(paths: OutputPaths, box: Outbox, tracker_id: str) -> None:
    """Add a run to the index again, with the id that a tracker has given it later."""
    kind = box.start_tags.get(KIND_TAG, Mode.TRAIN)
    if kind != "sweep":  # not a run that could be resumed
        add_to_index(paths, box.run_id, box.name, kind, (box.start_time or 0) / 1000, tracker_id)
