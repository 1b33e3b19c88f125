"""The record of a run while it runs: its lock, its journal, the delivery to the tracker, and its status."""

import json
import logging
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from ksuit_runner import __version__
from ksuit_runner.config.flatten import flatten
from ksuit_runner.data.container import DataContainer
from ksuit_runner.delivery.artifact_uploader import Uploader
from ksuit_runner.delivery.deferred import DeferredTracker
from ksuit_runner.delivery.metric_sender import MetricSender
from ksuit_runner.delivery.tracked_points import copy_history, open_journal
from ksuit_runner.errors import TakenOverError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.journal import Journal
from ksuit_runner.record.provenance import Provenance
from ksuit_runner.record.stored_run import Launch, add_to_index
from ksuit_runner.system.atomic_files import renew, write_text
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.tracker.base import KIND_TAG, BaseTracker, DatasetInfo, EndStatus
from ksuit_runner.ui.command_line import sync_command

_LOGGER = logging.getLogger(__name__)
_AWAY_TIMEOUT_S = 2.5  # how long the end of a run waits for a tracker that was unreachable before
_OWNER_KNOWN_S = 0.01  # every flush asks, which must cost next to nothing; what another owner writes then is never read
_STATUS_S = 2.0  # part of the time for closing that is reserved for the status


class RunRecord:
    """Holds a run's lock, takes its metrics, and closes it with a true status.

    Args:
        tracker: Tracker of the run, which asks the same lock.
        paths: Paths of the run.
        lock: The run's lock, held by this process.
        journal: Journal of the run.
        status_before: Status of a stored run before it was resumed, KILLED if no process had set one; it is restored
            if the run cannot be resumed as asked. A new run that cannot start has FAILED.

    Attributes:
        taken_over: Set when another process has taken the run over.
    """

    def __init__(
        self,
        tracker: DeferredTracker,
        paths: PathProvider,
        lock: RunLock,
        journal: Journal,
        status_before: EndStatus = EndStatus.FAILED,
    ) -> None:
        self.tracker = tracker
        self.paths = paths
        self.journal = journal
        self._uploader = Uploader(tracker, paths, self.are_metrics_sent)
        self._sender = MetricSender(self.journal, paths.journal_sent, tracker, self._uploader.notify)
        self.taken_over = lock.lost
        self.status_before = status_before
        self._lock = lock

    @classmethod
    def begin(
        cls,
        tracker: BaseTracker,
        outputs: OutputPaths,
        config: Mapping[str, Any],
        launch: Launch,
        provenance: Provenance,
    ) -> "RunRecord":
        """Start the record of a new run.

        Raises:
            TrackerError: The tracker requires an answer at the start, and there was none.
        """
        tags = {**launch.tags, "ksuit.version": __version__, KIND_TAG: launch.mode}
        tags |= {"ksuit.command": launch.command, **provenance.tags}
        if launch.origin is not None:
            tags[f"ksuit.{launch.mode}_of"] = launch.origin
        random.seed()  # MLflow draws names from it: after an earlier run of this process they would repeat
        deferred = DeferredTracker(tracker, outputs, partial(_acquire, outputs))
        info = deferred.start_run(config["name"], tags, config["parent_run_id"])
        add_to_index(outputs, info.run_id, info.name, launch.mode, tags=launch.tags)
        paths, lock = PathProvider(outputs.output_dir, info.run_id), deferred.run_lock
        assert lock is not None
        return cls(deferred, paths, lock, Journal(paths.journal, partial(lock.check, _OWNER_KNOWN_S)))

    @classmethod
    def resume(
        cls,
        tracker: BaseTracker,
        paths: PathProvider,
        lock: RunLock,
        is_evaluation: bool = False,
        register_anew: bool = False,
    ) -> "RunRecord":
        """Resume the record of a run, whose lock this process holds.

        Args:
            tracker: Tracker of the run.
            paths: Paths of the run.
            lock: Its lock.
            is_evaluation: Whether the run only gets more metrics, and keeps its status.
            register_anew: Whether a run that the tracker has lost is recorded there again, with its whole history.

        Raises:
            TrackerError: The tracker requires an answer at the start, and there was none; or it has lost the run.
        """
        deferred = DeferredTracker(tracker, paths, lambda run_id: lock)
        if register_anew:
            deferred.forget_lost(paths.run_id)
        if is_evaluation:
            deferred.attach_run(paths.run_id)
            deferred.reach()
        else:
            deferred.resume_run(paths.run_id)
        if lock.was_forced:
            renew(paths.journal)  # its earlier owner may wake up in the middle of a write
        journal = open_journal(paths, deferred, partial(lock.check, _OWNER_KNOWN_S))
        return cls(deferred, paths, lock, journal, deferred.status_before or deferred.status or EndStatus.KILLED)

    def describe(self, config: Mapping[str, Any], data: DataContainer, provenance: Provenance) -> None:
        """Record parameters, datasets and provenance, unless an earlier start has done so."""
        if not self.paths.environment.exists():
            if provenance.diff:
                write_text(self.paths.diff, provenance.diff)
            write_text(self.paths.environment, json.dumps(provenance.environment, indent=2) + "\n")
        if not self.tracker.is_described:
            datasets = _dataset_infos(data)
            with self.tracker.together():
                self.tracker.log_params(flatten(config))
                self.tracker.log_inputs(datasets)
        self._sender.notify()  # what is sent while a short run trains need not be waited for at its end
        self.upload()

    def recorded(self, update: int) -> dict[str, float]:
        """Return the metrics that were recorded at an update."""
        found = self.journal.load_after(update - 1).get(update, {})
        return {key: point.value for key, point in found.items()}

    def carry_history(self, parent: PathProvider, update: int) -> None:
        """Copy the metrics of the parent run up to the fork, and tag that run with its fork."""
        self.tracker.set_tags({f"ksuit.forked_to.{self.paths.run_id[:8]}": self.paths.run_id}, parent.run_id)
        copy_history(parent, self.journal, self.tracker, update)

    def are_metrics_sent(self) -> bool:
        """Wait, for a bounded time, until the tracker has all metrics up to now, and return whether it has."""
        return self._sender.flush(self.tracker.close_timeout_s)

    def check_owner(self) -> None:
        """Make sure that no other process has taken the run over.

        Raises:
            TakenOverError: One has.
        """
        self._lock.check()

    def upload(self) -> None:
        """Upload new files and checkpoints, behind training."""
        self._uploader.request()

    def close(self, status: EndStatus) -> None:
        """Send what is left and set the status, within a bounded time; report what is unsent, which is not lost."""
        with suppress(TakenOverError):  # the status is the other process's to set
            self.check_owner()
            if self.tracker.status != status:
                self.tracker.end_run(status)
            self._send_the_rest()
        if self.taken_over.is_set():
            self.tracker.close()
        missing = self._uploader.missing()
        self._uploader.close()
        unsent = self._sender.close()
        self.tracker.close()
        self.journal.close()
        if not self.taken_over.is_set() and (unsent or missing or self.tracker.is_behind):
            _LOGGER.error(
                "not everything is recorded by the tracker: %d metric points, %d files and checkpoints%s are in %s\n"
                "To send them: %s",
                *(unsent, missing, f", and the status {status}" if self.tracker.is_behind else ""),
                *(self.paths.run_dir, sync_command(self.paths.run_id, self.paths.output_dir)),
            )
        self._lock.release()

    def _send_the_rest(self) -> None:
        is_away = not self.tracker.is_bound or self._sender.is_failing or self._uploader.is_failing
        whole_s = self.tracker.close_timeout_s
        deadline = time.monotonic() + (min(_AWAY_TIMEOUT_S, whole_s) if is_away else whole_s)
        if self._sender.flush(deadline - time.monotonic()):
            self._uploader.finish(deadline - _STATUS_S - time.monotonic())
            self._sender.finish(deadline - time.monotonic())


def _acquire(outputs: OutputPaths, run_id: str) -> RunLock:
    lock = RunLock(PathProvider(outputs.output_dir, run_id).lock)
    lock.acquire()
    return lock


def _dataset_infos(data: DataContainer) -> list[DatasetInfo]:
    return [
        DatasetInfo(
            name=key,
            context="training" if key == data.train else "evaluation",
            digest=str(found["digest"]),
            source=str(found["class"]),
            profile=json.dumps({"num_rows": found["size"]}),
        )
        for key, found in data.describe().items()
    ]
