"""Runs jobs on a Ray cluster."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from ksuit_runner.errors import ConfigError
from ksuit_runner.launchers.base import Handle, Launcher, check_max_jobs
from ksuit_runner.paths import SweepPaths
from ksuit_runner.system.optional_package import require_package


class RayJob:
    """A job on a Ray cluster.

    Args:
        reference: Ray's reference to the return value of the job.
    """

    def __init__(self, reference: Any) -> None:
        self.reference = reference
        self._future: Future[Any] = reference.future()

    def done(self) -> bool:
        """Whether it has ended."""
        return self._future.done()

    def result(self) -> Any:
        """Return what it returned, or raise what ended it."""
        return self._future.result()


class RayLauncher(Launcher):
    """Runs each job as a Ray task in a process of its own. The output folder has to be on a shared file system.

    Hydra's own ray launcher requires cloudpickle below 3 and boto3, and returns only when all jobs have ended; that is
    why Ray is used directly.

    Args:
        address: ``auto`` or ``HOST:PORT`` of a running cluster; null starts one on this machine, for the sweep only.
        max_jobs: How many jobs are submitted at the same time; null is as many as the cluster has room for.
        num_cpus: CPUs per job.
        num_gpus: GPUs per job; Ray hides the others from it.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(
        self, address: str | None = None, max_jobs: int | None = None, num_cpus: float = 1, num_gpus: float = 0
    ) -> None:
        require_package("ray", "launcher=ray")
        check_max_jobs(max_jobs)
        self._address = address
        self.is_elsewhere = address is not None
        self._cap = max_jobs
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._ray: Any = None

    def open(self, sweep_paths: SweepPaths) -> None:
        """Connect to the cluster, or start one on 127.0.0.1.

        Raises:
            ConfigError: It cannot be reached, or is too small for a single job.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray = ray
        local: dict[str, Any] = {} if self._address else {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
        try:
            ray.init(
                address=self._address or "local",  # by default Ray would join a cluster that it finds
                runtime_env={"env_vars": {"PYTHONPATH": path}},
                log_to_driver=False,
                logging_level="error",
                configure_logging=False,
                **local,
            )
        except (ConnectionError, RuntimeError) as error:
            raise ConfigError(str(error).splitlines()[0], path="launcher.address") from error
        self.max_jobs = self._capacity() if self._cap is None else self._cap

    def submit(self, function: Callable[[Any], Any], task: Any) -> Handle:
        """Start ``function(task)`` on the cluster, in a worker of its own, and only once."""
        remote = self._ray.remote(max_calls=1, max_retries=0, **self._resources)(function)
        return RayJob(remote.remote(task))

    def stop(self, handles: Iterable[Handle]) -> None:
        """Interrupt the jobs: their runs write a checkpoint and end."""
        for handle in handles:
            if isinstance(handle, RayJob):
                with suppress(ValueError):
                    self._ray.cancel(handle.reference)

    def close(self) -> None:
        """Disconnect; a cluster that was started for the sweep ends."""
        if self._ray is not None:
            self._ray.shutdown()

    def where(self) -> str:
        """Return in a few words where the jobs run."""
        return f"on Ray at {self._address}" if self._address else "on a Ray cluster of its own on this machine"

    def _capacity(self) -> int:
        """Return how many jobs fit into the cluster as it is."""
        available = self._ray.cluster_resources()
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        fits = [available.get(names[key], 0) / amount for key, amount in self._resources.items() if amount]
        capacity = int(min(fits, default=1))
        if capacity < 1:
            raise ConfigError(
                "the Ray cluster has less than one job needs (launcher.num_cpus, num_gpus)", path="launcher"
            )
        return capacity
