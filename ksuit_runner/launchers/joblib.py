"""Runs jobs in parallel processes on this machine, in joblib's process pool (loky)."""

import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from ksuit_runner.config.types import PositiveInt, check_numbers
from ksuit_runner.launchers.base import Handle, Launcher, local_cap
from ksuit_runner.system.cores import core_count
from ksuit_runner.system.gpus import visible_gpus
from ksuit_runner.system.optional_package import require_package


class JoblibLauncher(Launcher):
    """Runs jobs in a pool of processes, each of which runs one job after another.

    Hydra's own joblib launcher returns only when all jobs have ended, so that no failure can be reported and no job
    held back before; that is why the pool is used directly.

    Args:
        max_jobs: How many jobs run at the same time; null is one per GPU, without a GPU one per core.
        threads: Threads that each process may use; null divides the cores among them.

    Raises:
        ConfigError: joblib is not installed, or there are fewer GPUs than jobs.
    """

    def __init__(self, max_jobs: PositiveInt | None = None, threads: PositiveInt | None = None) -> None:
        require_package("joblib", "launcher=joblib")
        check_numbers("PositiveInt", max_jobs=max_jobs)
        self._devices = visible_gpus()
        self.max_jobs = local_cap(max_jobs, self._devices)
        self._threads = threads or max(1, core_count() // self.max_jobs)
        self._pool: Any = None

    def submit(self, function: Callable[[Any], Any], task: Any) -> Handle:
        """Start ``function(task)`` in a process of the pool; a pool that has lost a process is replaced."""
        from joblib.externals.loky import get_reusable_executor

        # Requested each time: so loky replaces a pool that a killed process has broken.
        self._pool = get_reusable_executor(
            max_workers=self.max_jobs,
            timeout=300,
            env={"OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)},
        )
        handle: Handle = self._pool.submit(function, task)
        return handle

    def stop(self, handles: Iterable[Handle]) -> None:
        """Send SIGTERM to the processes of the pool: their jobs write a checkpoint and end."""
        for pid in list(getattr(self._pool, "_processes", None) or ()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def close(self) -> None:
        """End the processes of the pool."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, kill_workers=True)

    @property
    def devices(self) -> list[str]:
        """The GPUs of this machine, if there are several."""
        return self._devices if len(self._devices) > 1 else []

    def where(self) -> str:
        """Return in a few words where the jobs run."""
        return f"in {self.max_jobs} processes of this machine (joblib)"
