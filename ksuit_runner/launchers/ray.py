"""Runs jobs on a Ray cluster."""

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from ksuit_runner.config.types import NonNegativeFloat, PositiveInt, check_numbers
from ksuit_runner.distributed.environment import adopt_tasks
from ksuit_runner.errors import ConfigError, LostRankError
from ksuit_runner.launchers.base import Handle, Launcher
from ksuit_runner.paths import SweepPaths
from ksuit_runner.system.optional_package import require_package

_CONNECT_S = 10.0
_OTHERS_S = 60.0  # for the end of the other ranks once the first has ended


class RayJob:
    """A job on a Ray cluster, in one task or in several, which are the ranks of its run.

    Args:
        ray: The module.
        references: Ray's references to what its tasks return, in the order of the ranks.
        group: The placement group that holds their resources, if there is one.
    """

    def __init__(self, ray: Any, references: Sequence[Any], group: Any = None) -> None:
        self._ray = ray
        self._references = references
        self._futures: list[Future[Any]] = [reference.future() for reference in references]
        self._group = group
        self._failure: tuple[int, BaseException] | None = None
        self._first_ended_at: float | None = None
        self._is_stopped = self._is_killed = False

    def done(self) -> bool:
        """Whether all its tasks have ended; once one is lost, or does not end as the first has, the rest is killed."""
        running = [rank for rank, future in enumerate(self._futures) if not future.done()]
        if running and (self._has_failed() or self._takes_too_long(running)) and not self._is_killed:
            self._is_killed = True
            self._cancel(running, force=True)
        if not running and self._group is not None:
            self._ray.util.remove_placement_group(self._group)
            self._group = None
        return not running

    def stop(self) -> None:
        """Interrupt its tasks."""
        self._is_stopped = True
        self._cancel(range(len(self._references)), force=False)

    def result(self) -> Any:
        """Return what its first task returned, or raise what ended one of them.

        Raises:
            LostRankError: A task did not return: its process was killed, or its machine is gone.
            CancelledError: The job was stopped before it began.
        """
        if self._has_failed():
            assert self._failure is not None
            rank, error = self._failure
            if isinstance(error, self._ray.exceptions.RayTaskError):
                raise error.cause
            reason = str(error).partition(". ")[0].rstrip(".")
            raise LostRankError(f"rank {rank} is lost ({reason[:1].lower()}{reason[1:]})") from error
        try:
            return self._futures[0].result()
        except self._ray.exceptions.TaskCancelledError as error:
            raise CancelledError("it was stopped before it began") from error

    def _has_failed(self) -> bool:
        """Whether a task has ended without a result, which nobody has asked it to."""
        if self._failure is None and not self._is_stopped and not self._is_killed:
            for rank, future in enumerate(self._futures):
                if future.done() and (error := future.exception()) is not None:
                    self._failure = rank, error
                    break
        return self._failure is not None

    def _takes_too_long(self, running: Sequence[int]) -> bool:
        """Whether tasks still run a while after the first has ended; a run that blames them is lost because of them."""
        if not self._futures[0].done():
            return False
        self._first_ended_at = self._first_ended_at or time.monotonic()
        if time.monotonic() - self._first_ended_at < _OTHERS_S:
            return False
        if getattr(self._futures[0].result(), "blames_others", False):
            self._failure = running[0], TimeoutError("it did not react any more and was killed")
        return True

    def _cancel(self, ranks: Iterable[int], force: bool) -> None:
        for rank in ranks:
            with suppress(ValueError):  # it has ended
                self._ray.cancel(self._references[rank], force=force)


class RayLauncher(Launcher):
    """Runs each job as a Ray task in a process of its own, or as several, on one machine or more, which are its ranks.

    The output folder has to be on a shared file system.

    Hydra's own ray launcher requires cloudpickle below 3 and boto3, and returns only when all jobs have ended; that is
    why Ray is used directly.

    Args:
        address: ``auto`` or ``HOST:PORT`` of a running cluster; null starts one on this machine, for the sweep only.
        max_jobs: How many jobs are submitted at the same time; null is as many as the cluster has room for as it is.
            With a number, jobs also wait for machines that the cluster gets later.
        num_cpus: CPUs per task.
        num_gpus: GPUs per task; Ray hides the others from it.
        nodes: Machines per job.
        tasks_per_node: Tasks on each machine of a job. With several in all, each is a rank; a single task starts the
            ranks of its job itself.

    Raises:
        ConfigError: Ray is not installed, or a number makes no sense.
    """

    def __init__(
        self,
        address: str | None = None,
        max_jobs: PositiveInt | None = None,
        num_cpus: NonNegativeFloat = 1,
        num_gpus: NonNegativeFloat = 0,
        nodes: PositiveInt = 1,
        tasks_per_node: PositiveInt = 1,
    ) -> None:
        require_package("ray", "launcher=ray")
        check_numbers("PositiveInt", max_jobs=max_jobs, nodes=nodes, tasks_per_node=tasks_per_node)
        self._address = address
        self.is_elsewhere = address is not None
        self._cap = max_jobs
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._nodes = nodes
        self._tasks_per_node = tasks_per_node
        self.tasks = nodes * tasks_per_node
        amounts = {"CPU": num_cpus * tasks_per_node, "GPU": num_gpus * tasks_per_node}
        self._per_node = {name: amount for name, amount in amounts.items() if amount}
        if self.tasks > 1 and not self._per_node:
            raise ConfigError("a job of several tasks needs CPUs or GPUs", path="launcher.num_cpus")
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
        self._check_address()
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
        if self._cap is not None and self._address is not None:  # the cluster may get more machines
            self.max_jobs = self._cap
        else:
            capacity = self._capacity()
            self.max_jobs = capacity if self._cap is None else min(self._cap, capacity)

    def submit(self, function: Callable[[Any], Any], task: Any) -> Handle:
        """Start ``function(task)`` on the cluster, in workers of its own, and only once."""
        ray = self._ray
        remote = ray.remote(max_calls=1, max_retries=0, **self._resources)
        if self.tasks == 1:
            return RayJob(ray, [remote(function).remote(task)])
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = ray.util.placement_group([self._per_node] * self._nodes, strategy="STRICT_SPREAD")
        start, attempt, references = remote(_run_as_rank), uuid4().hex, []
        for rank in range(self.tasks):
            node, local_rank = divmod(rank, self._tasks_per_node)
            on_node = start.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, node))
            place = (rank, self.tasks, local_rank, self._nodes)
            references.append(on_node.remote(function, task, place, group, attempt))
        return RayJob(ray, references, group)

    def stop(self, handles: Iterable[Handle]) -> None:
        """Interrupt the jobs: their runs write a checkpoint and end."""
        for handle in handles:
            if isinstance(handle, RayJob):
                handle.stop()

    def close(self) -> None:
        """Disconnect; a cluster that was started for the sweep ends."""
        if self._ray is not None:
            self._ray.shutdown()

    def where(self) -> str:
        """Return in a few words where the jobs run."""
        return f"on Ray at {self._address}" if self._address else "on a Ray cluster of its own on this machine"

    def _check_address(self) -> None:
        """Raise ConfigError if nobody listens at ``HOST:PORT``; Ray itself tries for many minutes."""
        host, _, port = (self._address or "").rpartition(":")
        if not port.isdecimal() or "/" in host:  # null, auto, ray://...
            return
        if host in ("localhost", "127.0.0.1", "::1"):  # as Ray does
            host = self._ray.util.get_node_ip_address()
        try:
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"no Ray cluster answers at {host}:{port}: {reason}", path="launcher.address") from error

    def _capacity(self) -> int:
        """Return how many jobs fit into the cluster as it is.

        Raises:
            ConfigError: Not even one does.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        fits = [
            int(min((has.get(name, 0) / need for name, need in self._per_node.items()), default=1)) for has in nodes
        ]
        jobs = sum(fits) // self._nodes
        while sum(min(fit, jobs) for fit in fits) < jobs * self._nodes:  # those of a job are different ones
            jobs -= 1
        if jobs < 1:
            raise ConfigError(self._what_is_missing(sum(fit > 0 for fit in fits)), path="launcher")
        return jobs

    def _what_is_missing(self, fitting: int) -> str:
        each = " and ".join(f"{need:g} {name}{'' if need == 1 else 's'}" for name, need in self._per_node.items())
        if self._nodes > 1:
            return f"a job needs {self._nodes} machines with {each} each, and the Ray cluster has {fitting} of them"
        return (
            f"a job needs a machine with {each}, and the Ray cluster has none (launcher.num_cpus, num_gpus). "
            "launcher.nodes and launcher.tasks_per_node spread the ranks of a job over several machines"
        )


def _run_as_rank(
    function: Callable[[Any], Any], task: Any, place: tuple[int, int, int, int], group: Any, attempt: str
) -> Any:
    """Call ``function(task)`` as one of the ranks of a job, in a Ray task."""
    import ray

    first = ray.util.placement_group_table(group)["bundles_to_node_id"][0]
    host = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == first)
    adopt_tasks(*place, host, attempt)
    return function(task)
