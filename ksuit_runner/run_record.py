"""The record of a run while it runs: its lock, its journal, what is sent to the tracker, and its status."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ksuit_runner import __version__
from ksuit_runner.data.container import DataContainer
from ksuit_runner.environment import Surroundings
from ksuit_runner.errors import TrackerError
from ksuit_runner.journal import Journal, Point
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.run_lock import RunLock
from ksuit_runner.sender import MetricSender
from ksuit_runner.stored_run import Launch, add_to_index, store
from ksuit_runner.tracker.base import KIND_TAG, BaseTracker, DatasetInfo, EndStatus

_LOGGER = logging.getLogger(__name__)
UNSENT_TAG = "ksuit.unsent_points"


class RunRecord:
    """Holds a run's lock, takes its metrics, and closes it with a status that is true.

    Args:
        tracker: Tracker that is bound to the run.
        paths: Paths of the run.
        lock: The run's lock, held by this process.
        close_timeout_s: How long the end waits for metrics to be sent, in seconds.

    Attributes:
        taken_over: Set when another process has taken the run over.
        status_before: Status that a run had before it was gone on with, KILLED if no process had set one; it gets that
            back if it cannot go on as asked. A new run that cannot start has FAILED.
    """

    def __init__(self, tracker: BaseTracker, paths: PathProvider, lock: RunLock, close_timeout_s: float = 10.0) -> None:
        self.tracker = tracker
        self.paths = paths
        self.had_journal = paths.journal.exists()
        self.journal = Journal(paths.journal)
        self._sender = MetricSender(self.journal, paths.journal_sent, tracker)
        self.taken_over = lock.lost
        self.status_before: EndStatus = "FAILED"
        self._lock = lock
        self._close_timeout_s = close_timeout_s

    @classmethod
    def begin(cls, tracker: BaseTracker, outputs: OutputPaths, config: DictConfig, launch: Launch) -> "RunRecord":
        """Start the record of a new run; the tracker chooses its id."""
        tags = {**launch.tags, "ksuit.version": __version__, KIND_TAG: launch.mode}
        if launch.origin is not None:
            tags[f"ksuit.{launch.mode}_of"] = launch.origin
        random.seed()  # MLflow makes up names with it: after an earlier run of this process they would come again
        info = tracker.start_run(config.name, tags, config.parent_run_id)
        paths = PathProvider(outputs.output_dir, info.run_id)
        lock = RunLock(paths.lock)
        lock.acquire()
        add_to_index(outputs, info.run_id, info.name, launch.mode)
        record = cls(tracker, paths, lock)
        record.had_journal = True  # that of a new run is whole: there is nothing to ask the tracker for
        return record

    @classmethod
    def go_on(cls, tracker: BaseTracker, paths: PathProvider) -> "RunRecord":
        """Go on with the record of a run.

        Raises:
            ResumeError: The run is alive elsewhere.
        """
        lock = RunLock(paths.lock)
        lock.acquire()
        try:
            before = {info.run_id: info.status for info in tracker.find(paths.run_id)}
            tracker.resume_run(paths.run_id)
        except BaseException:
            lock.release()
            raise
        record = cls(tracker, paths, lock)
        status = before.get(paths.run_id)
        record.status_before = "FINISHED" if status == "FINISHED" else "FAILED" if status == "FAILED" else "KILLED"
        return record

    def store_start(
        self, config: DictConfig, launch: Launch, data: DataContainer, surroundings: Surroundings | None = None
    ) -> None:
        """Store how the run was started: in its folder, and with the tracker."""
        surroundings = surroundings or Surroundings.now()
        store(self.paths, config, launch)
        found = surroundings.environment
        self.paths.environment.write_text(json.dumps(found, indent=2) + "\n")
        files = [self.paths.config, self.paths.launch, self.paths.environment]
        if surroundings.diff:
            self.paths.diff.write_text(surroundings.diff)
            files.append(self.paths.diff)
        self.tracker.log_params(flat(OmegaConf.to_container(config, resolve=True)))
        self.tracker.log_inputs(_dataset_infos(data))
        git = {f"git.{key}": str(value) for key, value in found["git"].items() if value is not None}
        self.tracker.set_tags({"ksuit.command": launch.command, **git})
        self._upload(files)

    def is_logged(self, update: int) -> Callable[[str, int], bool]:
        """Return the test for points that were recorded before, for a run that goes on after an update.

        Without a journal (the run comes from another machine) the last recorded step of a metric is the watermark.
        """
        known = self.journal.load_after(update)
        last_steps = {} if self.had_journal else self.tracker.last_steps()
        return lambda key, step: key in known.get(step, ()) or step <= last_steps.get(key, -1)

    def points_until(self, update: int) -> list[Point]:
        """Return everything that was recorded up to an update, from the journal or, without one, from the tracker."""
        if self.had_journal or self.journal.size:
            return [point for points, _ in self.journal.read() for point in points if point.step <= update]
        return self._history(self.paths.run_id, update)

    def carry_history(self, parent: PathProvider, update: int) -> None:
        """Begin with the metrics of the run that this one was forked from, up to the fork."""
        if parent.journal.exists():
            self.journal.copy_until(parent.journal, update)
            return
        for point in self._history(parent.run_id, update):
            self.journal.append(point.step, {point.key: point.value}, point.timestamp)

    def _history(self, run_id: str, update: int) -> list[Point]:
        points = [point for key in self.tracker.last_steps(run_id) for point in self.tracker.history(key, run_id)]
        return sorted(
            (point for point in points if point.step <= update), key=lambda point: (point.step, point.timestamp)
        )

    def are_metrics_sent(self) -> bool:
        """Wait, for a bounded time, until the tracker has all metrics up to now, and return whether it has."""
        return self._sender.flush(self._close_timeout_s)

    def close(self, status: EndStatus) -> None:
        """Send what is left and set the status; a run with unsent metrics is not called finished."""
        unsent = self._sender.close(self._close_timeout_s)
        self.journal.close()
        try:
            self._upload([self.paths.log])
            if self.taken_over.is_set():
                pass  # the status is the other process's to set
            elif unsent == 0:
                self.tracker.end_run(status)
            else:
                self.tracker.set_tags({UNSENT_TAG: str(unsent)})
        except TrackerError as error:
            _LOGGER.error("the tracker could not be told that the run is %s: %s", status, error)
        if unsent:
            _LOGGER.error(
                "%d metric points are not sent; they are in %s, and the next resume sends them",
                unsent,
                self.paths.journal,
            )
        self._lock.release()

    def _upload(self, files: list[Path]) -> None:
        if self.tracker.artifacts_are_local:
            return
        for path in files:
            if path.exists():
                self.tracker.upload(path, path.name)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts into ``a.b.c`` keys; empty ones and lists are values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    return {key: value for name, node in tree.items() for key, value in flat(node, f"{prefix}{name}.").items()}


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
