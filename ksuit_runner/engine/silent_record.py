"""The record of a run on the ranks that do not record it: it has the same interface, and writes nothing."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from threading import Event
from typing import Any

from ksuit_runner.checkpoint.commit import HandOver
from ksuit_runner.data.container import DataContainer
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import Journal, SilentJournal
from ksuit_runner.record.provenance import Provenance
from ksuit_runner.tracker.base import BaseTracker, EndStatus, RunInfo
from ksuit_runner.tracker.noop import NoopTracker


class SilentRecord:
    """Stands for the record of a run, which rank 0 keeps, on another rank; ``RunRecord`` is the real one.

    Args:
        paths: Paths of the run.
        run: What is known about it.

    Attributes:
        tracker: Takes everything and records nothing; it has no answers either.
        paths: Paths of the run.
        journal: The run's journal, to be read.
        checkpoints: Takes no checkpoints.
        taken_over: Set when another process has taken the run over, which rank 0 alone notices.
        status_before: Status of a stored run before it was resumed.
    """

    tracker: BaseTracker
    journal: Journal
    checkpoints: HandOver

    def __init__(self, paths: PathProvider, run: RunInfo) -> None:
        self.paths = paths
        self.tracker = _SilentTracker(run)
        self.journal = SilentJournal(paths.journal)
        self.checkpoints = _NoCheckpoints()
        self.taken_over = Event()
        self.status_before = EndStatus.FAILED

    def describe(
        self,
        config: Mapping[str, Any],
        data: DataContainer,
        provenance: Provenance,
        choices: Mapping[str, str] | None = None,
    ) -> None:
        """Record parameters, datasets and provenance, unless an earlier start has done so."""

    def annotate(self, config: Mapping[str, Any], changes: Sequence[str]) -> None:
        """Record notes and tags, if they are among the config paths that a resume has changed."""

    def recorded(self, update: int) -> dict[str, float]:
        """Return the metrics that were recorded at an update."""
        return {}

    def carry_history(self, parent: PathProvider, update: int) -> None:
        """Copy the metrics of the parent run up to the fork, and tag that run with its fork."""

    def link_beginning(self, source: str, run_id: str | None) -> None:
        """Tag the run with what its first weights were taken from; and that, if it is a run, with this one."""

    def check_owner(self) -> None:
        """Make sure that no other process has taken the run over.

        Raises:
            TakenOverError: One has.
        """

    def notify(self) -> None:
        """Have new files and checkpoints uploaded, and everything else sent, behind training."""

    def close(self, status: EndStatus, never_began: bool = False) -> None:
        """Send what is left and set the status, within a bounded time; report what is unsent, which is not lost.

        Args:
            status: How the run has ended.
            never_began: Whether its config was refused before it began: a new run then leaves nothing behind.

        Raises:
            Exception: Whoever delivers cannot; the status is stored, and the run is let go of, all the same.
        """


class _SilentTracker(NoopTracker):
    def __init__(self, run: RunInfo) -> None:
        super().__init__()
        self._run = run


class _NoCheckpoints:
    def submit(self, name: str) -> Future[None]:
        done = Future[None]()
        done.set_result(None)
        return done

    def hurry(self) -> None: ...

    def restore_tags(self, name: str, tags: Sequence[str]) -> None: ...

    def close(self) -> None: ...
