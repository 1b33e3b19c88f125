"""What is to be delivered to a run's tracker, as stored in the run's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated

import msgspec
from msgspec import Meta

from ksuit_runner.errors import KsuitError, LostRunError, TrackerError
from ksuit_runner.paths import PathProvider, RunId
from ksuit_runner.record.journal import last_logged
from ksuit_runner.record.point import now
from ksuit_runner.system.atomic_files import make_folder, write_json
from ksuit_runner.system.untrusted_files import MissingFileError, UnsafeFileError, conform, read_json
from ksuit_runner.tracker.base import (
    RUN_ID_TAG,
    START_TAG,
    BaseTracker,
    DatasetInfo,
    EndStatus,
    ExportedModel,
    ModelVersion,
)
from ksuit_runner.tracker.start_tags import with_shown_together

_LOGGER = logging.getLogger(__name__)
_SIZE_LIMIT = 100_000_000  # thousands of parameters of the longest kind
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
"""A number as it is read from a file."""


class Outbox(msgspec.Struct, forbid_unknown_fields=True):
    """A run's identity, and everything for its tracker; also what is delivered, in case the tracker loses the run.

    It is written only by the process that holds the run's lock; ``Delivery`` says how much of it the tracker has.

    Attributes:
        run_id: Id of the run in the output folder.
        name: Its name.
        tracker_id: Its id in the tracker's store, if that was known when it started.
        start_time: When it was started, in ms since 1970.
        parent_run_id: Id, in the output folder, of the run that it is grouped under.
        start_tags: Tags that it is registered with.
        params: Parameters of the run.
        tags: Tags that were added since.
        inputs: Datasets that it uses.
        other_tags: Tags that it adds to other runs, by their ids in the output folder.
        version: Number of additions to these.
        models: Versions of registered models that it adds, once it has ended.
        listed: Tags of checkpoints, with the metrics that each is chosen by: those that have one when the run has
            ended, however it has, are listed among the models.
        exports: Models that MLflow loads, among its files.
        status: How it ended; None while it runs, and after it was killed.
        end_time: When it ended, in ms since 1970.
        resume_time: When it was last resumed, in ms since 1970.
        ran_ms: How long it had run until then, in ms, without interruptions.
        is_withdrawn: Whether the tracker is to delete it: its config was refused before it began.
    """

    run_id: RunId
    name: str
    tracker_id: RunId | None = None
    start_time: Count | None = None
    parent_run_id: RunId | None = None
    start_tags: dict[str, str] = msgspec.field(default_factory=dict)
    params: dict[str, str] = msgspec.field(default_factory=dict)
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    inputs: list[DatasetInfo] = msgspec.field(default_factory=list)
    other_tags: dict[RunId, dict[str, str]] = msgspec.field(default_factory=dict)
    version: Count = 0
    models: list[ModelVersion] = msgspec.field(default_factory=list)
    listed: dict[str, Annotated[tuple[str, ...], Meta(min_length=1)]] = msgspec.field(default_factory=dict)
    exports: list[ExportedModel] = msgspec.field(default_factory=list)
    status: EndStatus | None = None
    end_time: Count | None = None
    resume_time: Count | None = None
    ran_ms: Count = 0
    is_withdrawn: bool = False

    @property
    def all_tags(self) -> dict[str, str]:
        """Tags of the run, as it was last told."""
        return {**self.start_tags, **self.tags}

    @classmethod
    def load(cls, paths: PathProvider) -> Outbox | None:
        """Read what was stored in a run's folder; None if nothing was.

        Raises:
            TrackerError: The file is damaged, or is another run's.
        """
        try:
            box = conform(cls, read_json(paths.outbox, paths.runs_dir, _SIZE_LIMIT))
        except MissingFileError:
            return None
        except UnsafeFileError as error:
            raise TrackerError(f"{paths.outbox} is damaged: it {error}") from None
        if box.run_id != paths.run_id:
            raise TrackerError(f"{paths.outbox} belongs to run {box.run_id}, not to the run of this folder")
        return box

    def store(self, paths: PathProvider) -> bool:
        """Write it to a run's folder: after a crash what was stored before is there, or this.

        A full disk does not end a run: what could not be written then is written with the next change.

        Returns:
            Whether it could be written.
        """
        try:
            make_folder(paths.run_dir)
            write_json(paths.outbox, msgspec.to_builtins(self))
        except OSError as error:
            _LOGGER.error(
                "what is to be delivered to the tracker of run %s could not be written: %s", self.run_id, error
            )
            return False
        return True

    def resume(self, paths: PathProvider) -> None:
        """Let the run be one that has not ended: it is resumed now."""
        until = self.last_sign(paths) if self.end_time is None else self.end_time
        self.ran_ms = (None if until is None else self.ran_until(until)) or self.ran_ms
        self.status = self.end_time = None
        self.resume_time, self.is_withdrawn = now(), False

    def kill(self, paths: PathProvider, end_time: int | None = None) -> None:
        """Let the run be one that was killed: at a time in ms since 1970, by default at its last sign of life."""
        self.status = EndStatus.KILLED
        self.end_time = self.last_sign(paths) if end_time is None else end_time

    def last_sign(self, paths: PathProvider) -> int | None:
        """Return when the run was last seen alive, for one that was killed, in ms since 1970; None if never.

        That is when training last logged something, or else its start or last resume.
        """
        logged = None
        with suppress(KsuitError, OSError):  # a damaged journal: the run was at least begun
            logged = last_logged(paths.journal)
        logged = None if logged is None else max(0, min(logged, now()))  # the file is untrusted
        # A fork has copied points that are older than it.
        return max((time for time in (self._begun, logged) if time is not None), default=None)

    def ran_until(self, time: int) -> int | None:
        """Return how long the run had run at a time, both in ms, without interruptions; None if that is not known."""
        return None if self._begun is None else self.ran_ms + max(0, time - self._begun)

    @property
    def _begun(self) -> int | None:
        return self.start_time if self.resume_time is None else self.resume_time

    def add_params(self, params: Mapping[str, str]) -> None:
        """Add parameters; existing ones keep their values."""
        self.params = {**params, **self.params}
        self.version += 1

    def add_tags(self, tags: Mapping[str, str], run_id: str) -> None:
        """Add tags, of this run or of another one."""
        if run_id == self.run_id:
            self.tags.update(with_shown_together(tags, self.all_tags))
        else:
            self.other_tags.setdefault(run_id, {}).update(tags)
        self.version += 1

    def add_inputs(self, datasets: Sequence[DatasetInfo]) -> None:
        """Add datasets that are not in the list."""
        self.inputs += [info for info in datasets if info not in self.inputs]
        self.version += 1

    def deliver(self, tracker: BaseTracker, known: Callable[[str], str | None]) -> None:
        """Deliver everything but the end of the run to a tracker that is bound to it.

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

    def registration_tags(self) -> dict[str, str]:
        """Return the tags for a run that is registered later than it started, the same ones every time."""
        return {START_TAG: self.run_id, **self.start_tags, RUN_ID_TAG: self.run_id}


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
    return box
