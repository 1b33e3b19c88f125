"""The record of a run while it runs: its lock, its journal, the delivery to the tracker, and its status."""

import json
import logging
import random
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ksuit_runner import __version__
from ksuit_runner.config.comparable import comparable
from ksuit_runner.data.container import DataContainer
from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.delivery.recording import Recording, RunFollower, RunFollowerFactory, Unsent
from ksuit_runner.delivery.tracked_points import copy_history, open_journal
from ksuit_runner.engine.silent_record import SilentRecord
from ksuit_runner.errors import TakenOverError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.point import Point
from ksuit_runner.record.provenance import Provenance
from ksuit_runner.record.stored_run import Launch, add_to_index
from ksuit_runner.system.atomic_files import renew, write_json, write_text
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.base import KIND_TAG, BaseTracker, DatasetInfo, EndStatus
from ksuit_runner.tracker.start_tags import annotations, changed_annotations, start_tags
from ksuit_runner.ui.command_line import sync_command

_LOGGER = logging.getLogger(__name__)
_OWNER_KNOWN_S = 0.01  # every flush asks, which must cost next to nothing; what another owner writes then is never read


class RunRecord(SilentRecord):
    """Holds a run's lock, takes its metrics, and closes it with a true status.

    Args:
        tracker: Tracker of the run, which asks the same lock.
        paths: Paths of the run.
        lock: The run's lock, held by this process.
        journal: Journal of the run.
        follower: Delivers what is in the run's folder.
        status_before: Status of a stored run before it was resumed, KILLED if no process had set one; it is restored
            if the run cannot be resumed as asked. A new run that cannot start has FAILED.
        is_new: Whether nobody else knows the run yet, not even a sweep.

    Attributes:
        checkpoints: Takes the checkpoints of the run.
        taken_over: Set when another process has taken the run over.
    """

    tracker: RecordedTracker

    def __init__(
        self,
        tracker: RecordedTracker,
        paths: PathProvider,
        lock: RunLock,
        journal: Journal,
        follower: RunFollower,
        status_before: EndStatus = EndStatus.FAILED,
        is_new: bool = False,
    ) -> None:
        self.tracker = tracker
        self.paths = paths
        self.journal = journal
        self.taken_over = lock.lost
        self.status_before = status_before
        self._is_new = is_new
        self._lock = lock
        self._follower = follower
        self.checkpoints = follower.checkpoints
        follower.start()
        tracker.on_files = follower.notify

    @classmethod
    def begin(
        cls,
        tracker: BaseTracker,
        outputs: OutputPaths,
        config: Mapping[str, Any],
        launch: Launch,
        provenance: Provenance,
        make_follower: RunFollowerFactory = Recording.of_owner,
    ) -> "RunRecord":
        """Start the record of a new run.

        Args:
            tracker: The tracker that it is delivered to.
            outputs: The output folder.
            config: Config of the run.
            launch: How it was started.
            provenance: What it was started from.
            make_follower: Makes what delivers it; by default threads of this process.

        Raises:
            TrackerError: The tracker requires an answer at the start, and there was none.
        """
        tags = {**launch.tags, "ksuit.version": __version__, KIND_TAG: launch.mode}
        tags |= {**start_tags(launch.command), **annotations(config), **provenance.tags}
        if launch.origin is not None:
            tags[f"ksuit.{launch.mode}_of"] = launch.origin
        random.seed()  # MLflow draws names from it: after an earlier run of this process they would repeat
        recorded = RecordedTracker(tracker, outputs, partial(_acquire, outputs))
        info = recorded.start_run(config["name"], tags, config["parent_run_id"])
        add_to_index(outputs, info.run_id, info.name, launch.mode, tags=launch.tags)
        paths, lock = PathProvider(outputs.output_dir, info.run_id), recorded.run_lock
        assert lock is not None
        journal = Journal(paths.journal, partial(lock.check, _OWNER_KNOWN_S))
        is_new = config["parent_run_id"] is None
        return cls(recorded, paths, lock, journal, make_follower(tracker, paths, lock), is_new=is_new)

    @classmethod
    def resume(
        cls,
        tracker: BaseTracker,
        paths: PathProvider,
        lock: RunLock,
        is_evaluation: bool = False,
        register_anew: bool = False,
        make_follower: RunFollowerFactory = Recording.of_owner,
    ) -> "RunRecord":
        """Resume the record of a run, whose lock this process holds.

        Args:
            tracker: Tracker of the run.
            paths: Paths of the run.
            lock: Its lock.
            is_evaluation: Whether the run only gets more metrics, and keeps its status.
            register_anew: Whether a run that the tracker has lost is recorded there again, with its whole history.
            make_follower: Makes what delivers it; by default threads of this process.

        Raises:
            TrackerError: The tracker requires an answer at the start, and there was none; or it has lost the run.
        """
        recorded, follower = (
            RecordedTracker(tracker, paths, lambda run_id: lock),
            make_follower(tracker, paths, lock),
        )
        if register_anew:
            follower.forget_lost()
        follower.reach()  # a run that cannot be resumed stays as it is
        if is_evaluation:
            recorded.attach_run(paths.run_id)
        else:
            recorded.resume_run(paths.run_id)
        if lock.was_forced:
            renew(paths.journal)  # its earlier owner may wake up in the middle of a write
        journal = open_journal(paths, recorded, partial(lock.check, _OWNER_KNOWN_S))
        status_before = recorded.status_before or recorded.status or EndStatus.KILLED
        return cls(recorded, paths, lock, journal, follower, status_before)

    def describe(
        self,
        config: Mapping[str, Any],
        data: DataContainer,
        provenance: Provenance,
        choices: Mapping[str, str] | None = None,
    ) -> None:
        """Record parameters, datasets and provenance, unless an earlier start has done so."""
        if not self.paths.environment.exists():
            if provenance.diff:
                write_text(self.paths.diff, provenance.diff)
            write_json(self.paths.environment, provenance.environment)
        if not self.tracker.is_described:
            datasets = _dataset_infos(data)
            with self.tracker.together():
                self.tracker.log_params(comparable(config, choices))
                self.tracker.log_inputs(datasets)

    def annotate(self, config: Mapping[str, Any], changes: Sequence[str]) -> None:
        """Record notes and tags, if they are among the config paths that a resume has changed."""
        if tags := changed_annotations(config, {path.partition(".")[0] for path in changes}):
            self.tracker.set_tags(tags)

    def recorded(self, update: int) -> dict[str, float]:
        """Return the metrics that were recorded at an update."""
        found = self.journal.load_after(update - 1).get(update, {})
        return {key: point.value for key, point in found.items() if isinstance(point, Point)}

    def carry_history(self, parent: PathProvider, update: int) -> None:
        """Copy the metrics of the parent run up to the fork, and tag that run with its fork."""
        self.tracker.set_tags({f"ksuit.forked_to.{self.paths.run_id[:8]}": self.paths.run_id}, parent.run_id)
        copy_history(parent, self.journal, self.tracker, update)

    def link_beginning(self, source: str, run_id: str | None) -> None:
        """Tag the run with what its first weights were taken from; and that, if it is a run, with this one."""
        self.tracker.set_tags({"ksuit.initialized_from": source})
        if run_id is not None:
            self.tracker.set_tags({f"ksuit.initialized.{self.paths.run_id[:8]}": self.paths.run_id}, run_id)

    def check_owner(self) -> None:
        """Make sure that no other process has taken the run over.

        Raises:
            TakenOverError: One has.
        """
        self._lock.check()

    def notify(self) -> None:
        """Have new files and checkpoints uploaded, and everything else sent, behind training."""
        self._follower.notify()

    def close(self, status: EndStatus, never_began: bool = False) -> None:
        """Send what is left and set the status, within a bounded time; report what is unsent, which is not lost.

        Args:
            status: How the run has ended.
            never_began: Whether its config was refused before it began: a new run then leaves nothing behind, once all
                trackers have been told.

        Raises:
            Exception: Whoever delivers cannot; the status is stored, and the run is let go of, all the same.
        """
        is_withdrawn = never_began and self._is_new
        try:
            if is_withdrawn:
                self.tracker.delete_run()
            unsent = self._finish(status)
        finally:
            self._let_go()
        lacks_status = unsent.messages or not self.tracker.is_stored
        if self.taken_over.is_set():
            return
        if is_withdrawn and not lacks_status:
            _LOGGER.info("the run did not begin, and its folder is removed")
            shutil.rmtree(self.paths.run_dir, ignore_errors=True)
        elif is_withdrawn:
            _LOGGER.error(
                "the tracker could not be told that the run never began. To tell it: %s",
                sync_command(self.paths.run_id, self.paths.output_dir),
            )
        elif unsent or lacks_status:
            _LOGGER.error(
                "not everything is recorded by the tracker: %d metric points, %d files and checkpoints%s are in %s\n"
                "To send them: %s",
                *(unsent.points, unsent.files, f", and the status {status}" if lacks_status else ""),
                *(self.paths.run_dir, sync_command(self.paths.run_id, self.paths.output_dir)),
            )

    def _finish(self, status: EndStatus) -> Unsent:
        with suppress(TakenOverError):  # the status is the other process's to set
            self.check_owner()
            if self.tracker.status != status:
                self.tracker.end_run(status)
            with suppress(OSError):  # of a full disk, which was reported
                self.journal.write_rest()
            return self._follower.finish(self.tracker.close_timeout_s)
        return Unsent()

    def _let_go(self) -> None:
        self._follower.close()
        self.tracker.close()
        self.journal.close()
        self._lock.release()


def _acquire(outputs: OutputPaths, run_id: str) -> RunLock:
    lock = RunLock(PathProvider(outputs.output_dir, run_id).lock)
    lock.acquire()
    return lock


def _dataset_infos(data: DataContainer) -> list[DatasetInfo]:
    return [
        DatasetInfo(
            name=f"{str(found['class']).rpartition('.')[2].lower()}/{key}",
            context="training" if key == data.train else "evaluation",
            digest=str(found["digest"]),
            source=str(found["class"]),
            profile=json.dumps({"num_rows": found["size"]}),
        )
        for key, found in data.describe().items()
    ]
