"""The tracker that records nothing: metrics stay in the run's journal."""

from collections.abc import Mapping, Sequence
from uuid import uuid4

from ksuit_runner.record.point import Point, now
from ksuit_runner.tracker.base import BaseTracker, EndStatus, RunInfo


class NoopTracker(BaseTracker):
    """Gives runs an id and records nothing else. The journal and the artifacts in the output folder stay complete."""

    def start_run(
        self,
        name: str | None,
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        start_time: int | None = None,
    ) -> RunInfo:
        """Choose a run id; its first 8 characters are the default name."""
        run_id = uuid4().hex
        start_time = start_time or now()
        self._run = RunInfo(run_id, name or run_id[:8], "RUNNING", dict(tags), parent_run_id, start_time)
        return self._run

    def resume_run(self, run_id: str) -> RunInfo:
        """Accept any id; only the output folder knows whether there is such a run."""
        self._run = RunInfo(run_id, run_id[:8])
        return self._run

    def end_run(self, status: EndStatus, end_time: int | None = None) -> None:
        """Do nothing."""

    def log_points(self, points: Sequence[Point]) -> None:
        """Do nothing: the journal has them."""
