"""What a tracker has to be told about a run: kept in the run's folder until it has been."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import cast

from ksuit_runner.durable_files import make_folder, write_text
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.stored_files import MissingFileError, UnsafeFileError, read_json
from ksuit_runner.stored_run import add_to_index
from ksuit_runner.tracker.base import KIND_TAG, BaseTracker, DatasetInfo, EndStatus

_LOGGER = logging.getLogger(__name__)
_SIZE_LIMIT = 20_000_000  # a config of the largest size, as parameters and tags


@dataclass(frozen=True)
class Messages:
    """What a tracker is told about a run, and about others: the same attributes as in ``Outbox``."""

    params: dict[str, str]
    tags: dict[str, str]
    inputs: list[DatasetInfo]
    other_tags: dict[str, dict[str, str]]

    def tell(self, tracker: BaseTracker, known: Callable[[str], str | None]) -> None:
        """Tell a tracker that is bound to the run.

        Args:
            tracker: The tracker.
            known: Returns the tracker's id of another run of the output folder; None if it does not know that one.
        """
        if self.params:
            tracker.log_params(self.params)
        if self.inputs:
            tracker.log_inputs(self.inputs)
        if self.tags:
            tracker.set_tags(self.tags)
        for run_id, tags in self.other_tags.items():
            if tracker_id := known(run_id):
                tracker.set_tags(tags, tracker_id)


@dataclass
class Outbox:
    """A run's identity and what its tracker does not know yet.

    Attributes:
        run_id: Id of the run in the output folder.
        name: Its name.
        tracker_id: Its id in the tracker's store; None while it is not registered there.
        start_time: When it was started, in ms since 1970.
        parent_run_id: Id, in the output folder, of the run that it is grouped under.
        start_tags: Tags that it is registered with.
        params: Parameters that are to be recorded.
        tags: Tags that are to be set.
        inputs: Datasets that are to be recorded.
        other_tags: Tags that are to be set of other runs, by their ids in the output folder.
        status: How it ended; None while it runs, and after it was killed.
        end_time: When it ended, in ms since 1970.
        is_end_told: Whether the tracker knows how it ended.
    """

    run_id: str
    name: str
    tracker_id: str | None = None
    start_time: int | None = None
    parent_run_id: str | None = None
    start_tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    inputs: list[DatasetInfo] = field(default_factory=list)
    other_tags: dict[str, dict[str, str]] = field(default_factory=dict)
    status: EndStatus | None = None
    end_time: int | None = None
    is_end_told: bool = False

    @classmethod
    def load(cls, paths: PathProvider) -> Outbox | None:
        """Read what was stored in a run's folder; None if nothing was.

        Raises:
            TrackerError: The file is damaged.
        """
        try:
            found = read_json(paths.outbox, paths.runs_dir, _SIZE_LIMIT)
            found["inputs"] = [DatasetInfo(**item) for item in found["inputs"]]
            return cls(**found)
        except MissingFileError:
            return None
        except UnsafeFileError as error:
            raise TrackerError(f"{paths.outbox} is damaged: it {error}") from None
        except (TypeError, KeyError) as error:
            raise TrackerError(f"{paths.outbox} is damaged: {error}") from error

    def store(self, paths: PathProvider) -> None:
        """Write it to a run's folder: after a crash what was stored before is there, or this.

        A full disk is no reason to end a run: what was to be told is then told from memory.
        """
        try:
            make_folder(paths.run_dir)
            write_text(paths.outbox, json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            _LOGGER.error("what the tracker is to be told of run %s could not be written: %s", self.run_id, error)

    @property
    def has_messages(self) -> bool:
        """Whether the tracker is to be told something, the end of the run aside."""
        return self.tracker_id is None or bool(self.params or self.tags or self.inputs or self.other_tags)

    def messages(self) -> Messages:
        """Return what the tracker is to be told now."""
        others = {run_id: dict(tags) for run_id, tags in self.other_tags.items()}
        return Messages(dict(self.params), dict(self.tags), list(self.inputs), others)

    def forget(self, told: Messages) -> None:
        """Forget what was told; what has changed meanwhile stays for the next time."""
        self.params = {key: value for key, value in self.params.items() if told.params.get(key) != value}
        self.tags = {key: value for key, value in self.tags.items() if told.tags.get(key) != value}
        self.inputs = self.inputs[len(told.inputs) :]
        self.other_tags = {key: tags for key, tags in self.other_tags.items() if told.other_tags.get(key) != tags}

    @property
    def has_end(self) -> bool:
        """Whether the run has ended and the tracker does not know it."""
        return self.status is not None and not self.is_end_told


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
        if info.status in ("FINISHED", "FAILED", "KILLED"):
            box.status, box.is_end_told = cast(EndStatus, info.status), True
    return box


def index_registered(paths: OutputPaths, box: Outbox, tracker_id: str) -> None:
    """Have a run found in the output folder by the id that a tracker has given it later."""
    kind = box.start_tags.get(KIND_TAG, "train")
    if kind != "sweep":  # that is no run that could be gone on with
        add_to_index(paths, box.run_id, box.name, kind, (box.start_time or 0) / 1000, tracker_id)
