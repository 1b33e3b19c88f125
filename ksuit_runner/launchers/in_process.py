"""Runs jobs one after another in this process."""

from collections.abc import Callable
from typing import Any

from ksuit_runner.launchers.base import Handle, Launcher


class FinishedJob:
    """A job that has ended.

    Args:
        value: Its return value.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def done(self) -> bool:
        """Return True."""
        return True

    def result(self) -> Any:
        """Return what the job returned."""
        return self._value


class InProcessLauncher(Launcher):
    """Runs a job when it is submitted, and shows everything that it prints."""

    max_jobs = 1
    runs_here = True

    def submit(self, function: Callable[[Any], Any], task: Any) -> Handle:
        """Run ``function(task)`` to its end."""
        return FinishedJob(function(task))

    def where(self) -> str:
        """Return in a few words where the jobs run."""
        return "in this process, one after another"
