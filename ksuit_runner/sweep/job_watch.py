"""Follows the run of a job by what it writes into its folder, wherever the job runs."""

from contextlib import suppress
from threading import Lock

from ksuit_runner.metric_property import MetricPropertyProvider, Summary
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.record.journal import JournalReader
from ksuit_runner.record.stored_run import read_length
from ksuit_runner.sweep.leaderboard import shown_metrics
from ksuit_runner.sweep.plan import Job, SweepPlan
from ksuit_runner.system.untrusted_files import UnsafeFileError


class JobWatch:
    """Reads how far a job is, and the metric that jobs are ranked by; each time only what is new.

    Several threads may look.

    Args:
        job: The job.
        plan: The plan of its sweep.
        properties: Knows which direction of a metric is better.

    Attributes:
        job: The job.
        paths: The files of its run; None until that is known.
        update: The last update at which something was logged.
        length: How many updates training takes; None until that is known.
    """

    def __init__(self, job: Job, plan: SweepPlan, properties: MetricPropertyProvider) -> None:
        self.job = job
        self.paths: PathProvider | None = None
        self.update = 0
        self.length: int | None = None
        self._objective, self._ranked = plan.objective, plan.settings.value
        self._direction = properties.direction(plan.objective) if plan.objective else "neutral"
        self._metrics: dict[str, Summary] = {}
        self._offset = 0
        self._reading = Lock()

    def find(self, paths: SweepPaths, run_id: str | None) -> None:
        """Take note of the run that the job has; None if it has none yet."""
        if run_id is not None and self.paths is None:
            self.paths = PathProvider(paths.output_dir, run_id)

    def look(self) -> None:
        """Read what the run has written since the last look."""
        if self.paths is None:
            return
        with self._reading, suppress(OSError, UnsafeFileError):  # of a file system that cannot be reached for now
            self.length = read_length(self.paths)
            for points, position in JournalReader(self.paths.journal).read(self._offset):
                self._offset = position
                for key, value, step, _ in points:
                    self.update = step
                    if key == self._objective:
                        self._metrics.setdefault(key, Summary(self._direction, value, step)).add(value, step)

    @property
    def fraction(self) -> float:
        """How much of the training is done, from 0 to 1; 0 while that is not known."""
        return min(1.0, self.update / self.length) if self.length else 0.0

    @property
    def value(self) -> float | None:
        """What the job is ranked by so far."""
        if self._objective is None:
            return None
        return shown_metrics(self._metrics, self._objective, self._ranked).get(self._objective)
