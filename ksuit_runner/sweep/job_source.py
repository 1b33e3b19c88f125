"""Where a sweep's jobs come from: a list, or a search that learns from how they end."""

from collections.abc import Iterator
from typing import Protocol

from ksuit_runner.sweep.plan import Job


class JobSource(Protocol):
    """Yields the jobs of a sweep, and is notified when one has ended."""

    def jobs(self) -> Iterator[Job]:
        """Yield all jobs in their order, also those that have run before a resume; each when there is room for it."""
        ...

    def job_ended(self, job: Job, status: str, run_id: str | None) -> None:
        """Learn that a job has ended, now or before a resume."""
        ...

    def pruned(self) -> frozenset[int]:
        """Return the numbers of the jobs that were stopped early."""
        ...


class ListedJobs:
    """Jobs that are all known from the start.

    Args:
        jobs: The jobs.
    """

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs

    def jobs(self) -> Iterator[Job]:
        """Yield the jobs in their order."""
        yield from self._jobs

    def job_ended(self, job: Job, status: str, run_id: str | None) -> None:
        """Do nothing: the list does not depend on results."""

    def pruned(self) -> frozenset[int]:
        """Return no numbers: nothing is stopped early."""
        return frozenset()
