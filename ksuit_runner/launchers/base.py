"""The base class of launchers, and what they share: optional packages, GPUs and the cap on parallel jobs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ksuit_runner.errors import ConfigError
from ksuit_runner.paths import SweepPaths
from ksuit_runner.system.cores import core_count


class Handle(Protocol):
    """A job that was submitted to a launcher."""

    def done(self) -> bool:
        """Whether it has ended."""
        ...

    def result(self) -> Any:
        """Return what it returned, or raise what ended it."""
        ...


class Launcher(ABC):
    """Runs functions somewhere, each in a process that can see the output folder.

    It never gets more than ``max_jobs`` at a time, so it needs no queue of its own.

    Attributes:
        max_jobs: How many jobs may run at the same time.
        runs_here: Whether jobs run in this very process, so that what they print appears here.
        is_elsewhere: Whether they run on other machines, of which nothing is known here.
        tasks: How many processes execute each job; several are its ranks.
    """

    max_jobs: int = 1
    runs_here: bool = False
    is_elsewhere: bool = False
    tasks: int = 1

    def open(self, sweep_paths: SweepPaths) -> None:  # noqa: B027 - optional
        """Prepare for the first job: connect, make folders for the launcher's own files."""

    @abstractmethod
    def submit(self, function: Callable[[Any], Any], task: Any) -> Handle:
        """Start ``function(task)``; function and task can be pickled."""

    def stop(self, handles: Iterable[Handle]) -> None:  # noqa: B027 - optional
        """Ask running jobs to finish their update, write a checkpoint and end, as by SIGTERM."""

    def close(self) -> None:  # noqa: B027 - optional
        """Release what the launcher holds, after the last job."""

    @property
    def devices(self) -> list[str]:
        """GPUs, of which each job claims one per rank; empty where a cluster assigns them, or with one at most."""
        return []

    def where(self) -> str:
        """Return in a few words where the jobs run."""
        return type(self).__name__


def local_cap(max_jobs: int | None, devices: list[str]) -> int:
    """Return how many jobs may run on this machine: ``max_jobs``, or else one per GPU, or else one per core.

    Raises:
        ConfigError: There are several GPUs, but fewer than jobs.
    """
    cap = max_jobs if max_jobs is not None else len(devices) or core_count()
    if len(devices) > 1 and cap > len(devices):
        raise ConfigError(f"{cap} jobs at once need a GPU each, and there are {len(devices)}", path="launcher.max_jobs")
    return cap
