"""One job of a sweep, done in whatever process it was handed to."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksuit_runner.config.targets import Trust
from ksuit_runner.errors import AliveError, KsuitError
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.record.origin import Origin
from ksuit_runner.record.stored_run import Launch
from ksuit_runner.security.masking import mask_text
from ksuit_runner.sweep.gpu_lock import claim_device
from ksuit_runner.sweep.job_runs import local_record
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.system.signals import catch_signals
from ksuit_runner.ui.lasting_output import secure_output
from ksuit_runner.ui.terminal import make_console

if TYPE_CHECKING:
    from ksuit_runner.record.provenance import Provenance

_POLL_S = 0.2


@dataclass(frozen=True)
class Task:
    """What a process needs to know to do a job.

    Attributes:
        index: Number of the job.
        output_dir: The output folder.
        sweep_id: Id of the sweep.
        folder: Working directory of the sweep: configs, callbacks and git are looked for there.
        config: Resolved config of the job, as plain values.
        launch: How the run was started, to be stored with it.
        run_id: Run to go on with; None starts a new one.
        devices: Devices that the jobs share out among themselves.
        is_shown: Whether to print what a run prints.
        provenance: Provenance of the run, shared with the other jobs of this process; collected by default.
        trust: Limits of a config that is not this user's own.
    """

    index: int
    output_dir: Path
    sweep_id: str
    folder: Path
    config: dict[str, Any]
    launch: Launch
    run_id: str | None = None
    devices: tuple[str, ...] = ()
    is_shown: bool = True
    provenance: "Provenance | None" = None
    trust: Trust | None = None


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
        index: Number of the job.
        status: FINISHED, FAILED or KILLED.
        run_id: Its run, None if it did not get as far.
        seconds: How long it took, this time.
        signal: Number of the signal that ended it.
        error: What it failed with, in a few lines.
        trace: The traceback, empty for an error that is explained without one.
    """

    index: int
    status: str
    run_id: str | None = None
    seconds: float = 0.0
    signal: int | None = None
    error: str = ""
    trace: str = ""


def do_job(task: Task, find_run: Callable[[Task], Task] = lambda task: task) -> JobResult:
    """Do a job: start its run, or resume it; whatever happens is in the result and not raised.

    Args:
        task: The job.
        find_run: Returns the task with the run that it has by now; called in the sweep's working directory, when
            no other process does the job.
    """
    start = time.monotonic()
    secure_output()  # a process of a pool prints where the sweep does
    try:
        return _do(task, start, find_run)
    except KeyboardInterrupt:
        return JobResult(task.index, "KILLED", task.run_id, time.monotonic() - start, signal.SIGINT)
    except BaseException as error:
        return _failed(task, error, task.run_id, start)


def _do(task: Task, start: float, find_run: Callable[[Task], Task]) -> JobResult:
    _go_to(task.folder)
    paths = SweepPaths(task.output_dir, task.sweep_id)
    with ExitStack() as stack:
        if number := _claim(paths, task.index, stack):
            return JobResult(task.index, "KILLED", task.run_id, time.monotonic() - start, number)
        task = find_run(task)
        if task.run_id is not None and local_record(paths, task.run_id).status == "FINISHED":
            return JobResult(task.index, "FINISHED", task.run_id, time.monotonic() - start)
        claim_device([(device, paths.device_lock(device)) for device in task.devices])
        return _run(task, start)


def _claim(paths: SweepPaths, index: int, stack: ExitStack) -> int | None:
    """Keep all other processes from doing a job; wait for one that does it, and return the signal that ends the wait.

    A sweep that was killed leaves its jobs running, or waiting in the queue of a cluster.
    """
    lock = RunLock(paths.job_lock(index))
    with catch_signals() as interruption:
        while interruption.signal is None:
            try:
                lock.acquire()
            except AliveError:
                time.sleep(_POLL_S)
                continue
            stack.callback(lock.release)
            return None
    return interruption.signal


def _run(task: Task, start: float) -> JobResult:
    from ksuit_runner.engine.runner import run

    config = {**task.config, "output_dir": str(task.output_dir), "parent_run_id": task.sweep_id}
    origin = Origin("resume", task.run_id) if task.run_id else None
    launch = task.launch
    if task.run_id is not None and PathProvider(task.output_dir, task.run_id).launch.is_file():
        launch = replace(launch, mode="resume", origin=task.run_id, tags={})  # else nothing but its id is known
    if task.is_shown:
        outcome = run(config, launch, origin, provenance=task.provenance, trust=task.trust)
    else:
        with open(os.devnull, "w") as nowhere:
            outcome = run(config, launch, origin, make_console(file=nowhere), task.provenance, task.trust)
    if outcome.error is not None:
        return _failed(task, outcome.error, outcome.run_id, start)
    return JobResult(task.index, outcome.status, outcome.run_id, time.monotonic() - start, outcome.signal)


def _failed(task: Task, error: BaseException, run_id: str | None, start: float) -> JobResult:
    trace = "" if isinstance(error, KsuitError) else "".join(traceback.format_exception(error))
    text = str(error) if isinstance(error, KsuitError) else f"{type(error).__name__}: {error}"
    return JobResult(task.index, "FAILED", run_id, time.monotonic() - start, None, mask_text(text), mask_text(trace))


def _go_to(folder: Path) -> None:
    """Make the sweep's working directory this process's, as a worker of a cluster begins elsewhere."""
    if folder != Path.cwd():
        os.chdir(folder)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
