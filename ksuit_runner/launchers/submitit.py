"""Runs jobs on a Slurm cluster, or in separate processes on this machine, through submitit."""

import os
import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal

from ksuit_runner.config.types import PositiveInt, check_numbers
from ksuit_runner.distributed.environment import adopt_tasks
from ksuit_runner.errors import ConfigError, LostRankError
from ksuit_runner.launchers.base import Handle, Launcher, local_cap
from ksuit_runner.paths import SweepPaths
from ksuit_runner.system.gpus import visible_gpus
from ksuit_runner.system.optional_package import require_package
from ksuit_runner.system.signals import REQUEUE_SIGNALS


class Preemptible:
    """A function whose job is put back into the queue, with the same task, when it is preempted or its time is up.

    submitit requests that by a signal, in the middle of whatever runs. A run handles the signal itself, to end with a
    checkpoint, and it is raised for submitit here; also for any other that says that the time is up.

    Args:
        function: Runs a task, and returns a result with the ``signal`` that ended it.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __call__(self, task: Any) -> Any:
        """Run the task, also as one of several ranks. After a preemption the process ends here."""
        import submitit

        job = submitit.JobEnvironment()
        if job.num_tasks > 1:
            host = job.hostnames[0] if job.cluster == "slurm" else "127.0.0.1"
            started = f"{job.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
            adopt_tasks(job.global_rank, job.num_tasks, job.local_rank, job.num_nodes, host, started)
        result = self._function(task)
        if result.signal in REQUEUE_SIGNALS:
            signal.raise_signal(getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}"))
        return result

    def checkpoint(self, task: Any) -> Any:
        """Return what submitit puts back into the queue."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, task)


class SubmittedJob:
    """A job that submitit runs, in one task or in several, which are the ranks of its run.

    Args:
        job: The job of submitit.
    """

    def __init__(self, job: Any) -> None:
        self.job = job

    def done(self) -> bool:
        """Whether it has ended."""
        return bool(self.job.done())

    def result(self) -> Any:
        """Return what its first task returned, or raise what ended one of them.

        Raises:
            LostRankError: One of several tasks has ended without a result.
        """
        from submitit.core.utils import FailedJobError, UncompletedJobError

        results = []
        for rank in range(self.job.num_tasks):
            try:
                results.append(self.job.task(rank).result())
            except UncompletedJobError as error:
                if self.job.num_tasks == 1 or isinstance(error, FailedJobError):
                    raise
                reason = f"task {rank} of job {self.job.job_id} has ended without a result"
                raise LostRankError(f"rank {rank} is lost ({reason})") from error
        return results[0]


class SubmititLauncher(Launcher):
    """Submits every job of the sweep as a separate job of the cluster; submitit's files are in the sweep's folder.

    A job that is preempted, or whose time is up, leaves a checkpoint, waits in the queue again and resumes its run.

    Hydra's own submitit launcher ends with the first job whose process dies, has no cap for the local executor and
    leaves jobs running on Ctrl-C; that is why submitit is used directly.

    Args:
        executor: ``slurm``, or ``local`` for this machine.
        max_jobs: How many jobs are submitted at the same time; null is 64 on Slurm, and on this machine one per GPU,
            without a GPU one per core.
        timeout_min: Longest time of a job, in minutes.
        parameters: What each job requests from the cluster, by submitit's names: ``mem_gb``, ``cpus_per_task``,
            ``gpus_per_node``, ``slurm_partition`` ... With ``tasks_per_node`` and ``nodes``, a job has that many ranks.

    Raises:
        ConfigError: submitit is not installed, or there are fewer GPUs than jobs.
    """

    def __init__(
        self,
        executor: Literal["slurm", "local"] = "slurm",
        max_jobs: PositiveInt | None = None,
        timeout_min: PositiveInt = 1440,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        require_package("submitit", "launcher=submitit")
        check_numbers("PositiveInt", max_jobs=max_jobs)
        self._cluster = executor
        self.is_elsewhere = executor == "slurm"
        self._devices = visible_gpus() if executor == "local" else []
        self.max_jobs = local_cap(max_jobs, self._devices) if executor == "local" else max_jobs or 64
        self._parameters = {"timeout_min": timeout_min, **(parameters or {})}
        self.tasks = int(self._parameters.get("nodes", 1)) * int(self._parameters.get("tasks_per_node", 1))
        self._executor: Any = None

    def open(self, sweep_paths: SweepPaths) -> None:
        """Create the executor.

        Raises:
            ConfigError: There is no Slurm here, or submitit does not know one of the parameters.
        """
        import submitit

        sweep_paths.submitit_dir.mkdir(parents=True, exist_ok=True, mode=0o700)  # its files hold the tracker's password
        try:
            self._executor = submitit.AutoExecutor(folder=str(sweep_paths.submitit_dir), cluster=self._cluster)
            self._executor.update_parameters(**self._parameters)
        except (RuntimeError, NameError, TypeError) as error:
            raise ConfigError(str(error).splitlines()[0], path="launcher") from error

    def submit(self, function: Callable[[Any], Any], task: Any) -> Handle:
        """Submit ``function(task)``."""
        return SubmittedJob(self._executor.submit(Preemptible(function), task))

    def stop(self, handles: Iterable[Handle]) -> None:
        """Interrupt the jobs: their runs write a checkpoint and end."""
        for handle in handles:
            if isinstance(handle, SubmittedJob):
                with suppress(ProcessLookupError):
                    handle.job.cancel()

    @property
    def devices(self) -> list[str]:
        """The GPUs of this machine, if there are several; Slurm assigns each job its own."""
        return self._devices if len(self._devices) > 1 else []

    def where(self) -> str:
        """Return in a few words where the jobs run."""
        where = "on Slurm" if self._cluster == "slurm" else "on this machine"
        return f"{where} through submitit, {self.max_jobs} at a time"
