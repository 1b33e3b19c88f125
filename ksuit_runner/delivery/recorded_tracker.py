"""The tracker that callbacks see: what it is told goes into the run's folder, from where it is delivered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from ksuit_runner.delivery.local_ids import LocalIdTracker
from ksuit_runner.delivery.outbox import Outbox, load_or_ask
from ksuit_runner.delivery.registration import registered
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.record.point import Point, now
from ksuit_runner.security.masking import mask_text, mask_value
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.base import (
    START_TAG,
    BaseTracker,
    DatasetInfo,
    EndStatus,
    ExportedModel,
    ModelVersion,
    RunInfo,
)

_LONGEST_PARAM = 10_000  # characters, more than a store keeps


class RecordedTracker(LocalIdTracker):
    """Stores what is to be recorded of a run in the run's folder, from where a ``RunFollower`` delivers it.

    A run starts with one request to the store, to get the store's id. If there is no answer and the tracker does not
    require one, the run starts under an id of its own and is registered later. After that everything is written to the
    run's folder only, without passwords, and is on the disk before the call returns: after a power cut no point or
    checkpoint is there without what was told before it. Files are where the embedded store has them, in
    ``PathProvider.artifacts_dir``.

    Ids are those of the output folder.

    Args:
        tracker: The tracker that everything is delivered to. It is asked for a run's id, and about other runs.
        outputs: The output folder.
        lock_run: Returns the lock of a run, held by this process, by the run's id; called before anything is written of
            that run. Without one, the run counts as this process's own.

    Attributes:
        status_before: How a resumed run had ended; None for a new one, and for one that was killed.
        run_lock: What ``lock_run`` returned.
        is_stored: Whether all that was told is in the run's folder: not if the disk was full the last time.
    """

    def __init__(
        self, tracker: BaseTracker, outputs: OutputPaths, lock_run: Callable[[str], RunLock] | None = None
    ) -> None:
        super().__init__(tracker, outputs)
        self.require, self.close_timeout_s = tracker.require, tracker.close_timeout_s
        self.has_registry = tracker.has_registry
        self.status_before: EndStatus | None = None
        self._lock_run = lock_run
        self.run_lock: RunLock | None = None
        self.is_stored = False
        self._box: Outbox | None = None
        self._is_closed = False
        self._is_held = False
        self._lock = threading.Lock()

    @property
    def is_reached(self) -> bool:
        """Whether the store knows the run and has been reached since it was started, resumed or attached to."""
        known = self._known(self.run_id)
        return known is not None and self._tracker.is_bound_to(known)

    @property
    def status(self) -> EndStatus | None:
        """How the run ended; None while it runs."""
        return self._outbox.status

    @property
    def artifacts_are_local(self) -> bool:
        """Whether the run's files need no upload; taken as true until the store is reached."""
        return not self.is_reached or self._tracker.artifacts_are_local

    def start_run(
        self,
        name: str | None,
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        start_time: int | None = None,
    ) -> RunInfo:
        """Start a new run, under the store's id or, if that need not be reached, under an id of its own."""
        own_id, begun = uuid4().hex, start_time or now()
        tags = {**{key: mask_text(value) for key, value in tags.items()}, START_TAG: own_id}
        try:
            parent = registered(self._tracker, self._outputs, parent_run_id) if parent_run_id else None
            info = self._tracker.start_run(name, tags, parent)
        except TrackerError:
            if self.require:
                raise
            box = Outbox(own_id, name or own_id[:8], None, begun, parent_run_id, tags)
        else:
            paths = self._paths(info.run_id)
            if any(path.exists() for path in (paths.outbox, paths.journal, paths.artifacts_dir)):
                raise TrackerError(f"the tracker has given a new run the id of one in the output folder: {info.run_id}")
            box = Outbox(info.run_id, info.name, info.run_id, info.start_time, parent_run_id, tags)
        self._own(box.run_id)
        self._take(box)
        self._store()
        return self.run

    def resume_run(self, run_id: str) -> RunInfo:
        """Resume a run of the output folder: it has not ended any more."""
        self._own(run_id)
        box = load_or_ask(self._paths(run_id), self._tracker)
        self.status_before = box.status
        box.resume(self._paths(run_id))
        self._take(box)
        self._store()
        return self.run

    def attach_run(self, run_id: str) -> RunInfo:
        """Attach to a run of the output folder that has ended, to record more of it; one without a status is KILLED."""
        self._own(run_id)
        box = load_or_ask(self._paths(run_id), self._tracker)
        if box.status is None:
            box.kill(self._paths(run_id))
        self._take(box)
        self._store()
        return self.run

    def end_run(self, status: EndStatus, end_time: int | None = None) -> None:
        """Store how the run ended."""
        with self._lock:
            self._outbox.status, self._outbox.end_time = status, end_time or now()
            self._store()

    def delete_run(self) -> None:
        """Have the run deleted once its end is delivered."""
        with self._lock:
            self._outbox.is_withdrawn = True
            self._store()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Store parameters."""
        with self._lock:
            self._outbox.add_params(
                {key: str(mask_value(key, value))[:_LONGEST_PARAM] for key, value in params.items()}
            )
            self._store()

    def set_tags(self, tags: Mapping[str, str], run_id: str | None = None) -> None:
        """Store tags, of this run or of another one of the output folder."""
        with self._lock:
            box = self._outbox
            box.add_tags({key: mask_text(str(value)) for key, value in tags.items()}, run_id or box.run_id)
            self._store()

    def log_inputs(self, datasets: Sequence[DatasetInfo]) -> None:
        """Store which datasets the run uses."""
        with self._lock:
            self._outbox.add_inputs(datasets)
            self._store()

    def register_model(self, version: ModelVersion) -> None:
        """Store a version of a model, to be registered once the run has ended."""
        with self._lock:
            if version not in self._outbox.models:
                self._outbox.models.append(version)
            self._store()

    def list_tagged(self, tag: str, chosen_by: Sequence[str]) -> None:
        """Store that the checkpoint with a tag is listed among the models, once the run has ended."""
        assert chosen_by, "it is listed with the metrics that it is chosen by"
        with self._lock:
            if self._outbox.listed.get(tag) != tuple(chosen_by):
                self._outbox.listed[tag] = tuple(chosen_by)
                self._store()

    def add_export(self, export: ExportedModel) -> None:
        """Store which checkpoint can be loaded by MLflow."""
        with self._lock:
            if export not in self._outbox.exports:
                self._outbox.exports.append(export)
                self._store()

    def log_points(self, points: Sequence[Point]) -> None:
        """Record metric points at once, past the journal; ``LogWriter`` is how metrics are logged."""
        self.check_owner()
        if not self.is_reached:
            raise TrackerError(f"{self._tracker.where()} has not been reached yet")
        self._tracker.log_points(points)

    def check_owner(self) -> None:
        """Make sure that the run is this process's to record; asked before everything that is written.

        Raises:
            TakenOverError: It is another process's.
        """
        if self.run_lock is not None:
            self.run_lock.check()

    def close(self) -> None:
        """Write nothing to the run's folder from now on: it may belong to another process."""
        with self._lock:
            self._is_closed = True

    def where(self) -> str:
        """Say where the run is recorded and how to look at it."""
        is_away = self._box is not None and not self.is_reached
        return self._tracker.where() + (" (does not answer; everything is sent when it does)" if is_away else "")

    @property
    def is_described(self) -> bool:
        """Whether the parameters of the run are stored, and with them its datasets."""
        return bool(self._outbox.params)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write what is recorded in the block to the run's folder once, at its end."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            with self._lock:
                self._store()

    @property
    def _outbox(self) -> Outbox:
        assert self._box is not None, "no run was started"
        return self._box

    def _own(self, run_id: str) -> None:
        if self._lock_run is not None:
            self.run_lock = self._lock_run(run_id)

    def _take(self, box: Outbox) -> None:
        self._box = box
        self._run = RunInfo(box.run_id, box.name, "RUNNING", box.all_tags, box.parent_run_id, box.start_time or 0)

    def _store(self) -> None:
        if not (self._is_closed or self._is_held):
            self.check_owner()
            self.is_stored = self._outbox.store(self._paths(self._outbox.run_id))
