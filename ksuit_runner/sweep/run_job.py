"""Run one job of a sweep, in the process that the launcher chose: start its run, or resume it."""

import os
import signal
import socket
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksuit_runner.config.check.ranks import rank_count
from ksuit_runner.config.factory import Factory
from ksuit_runner.config.targets import Trust
from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.distributed.environment import ATTEMPT, place
from ksuit_runner.errors import AliveError, ConfigError, KsuitError, PeerError
from ksuit_runner.paths import OutputPaths, SweepPaths
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.origin import Origin
from ksuit_runner.record.stored_run import Launch
from ksuit_runner.recorder.tracker import open_tracker
from ksuit_runner.security.masking import mask_text
from ksuit_runner.start.start_run import Start, as_resume, start_run
from ksuit_runner.sweep.gpu_lock import claim_devices
from ksuit_runner.sweep.job_runs import find_records, local_record
from ksuit_runner.system.atomic_files import write_text
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.system.signals import catch_signals
from ksuit_runner.system.untrusted_files import read_text
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.ui.lasting_output import secure_output

if TYPE_CHECKING:
    from ksuit_runner.record.provenance import Provenance

_POLL_S = 0.2


@dataclass(frozen=True)
class JobTask:
    """What a process needs to know to run a job.

    Attributes:
        index: Number of the job.
        output_dir: The output folder.
        sweep_id: Id of the sweep.
        folder: Working directory of the sweep: configs, callbacks and git are looked for there.
        config: Resolved config of the job, as plain values.
        launch: How the run was started, to be stored with it.
        run_id: Run to resume; None starts a new one.
        devices: GPUs that the jobs of this machine share, one for each rank.
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
    provenance: "Provenance | None" = None
    trust: Trust | None = None

    @property
    def ranks(self) -> int:
        """How many ranks train the run."""
        return rank_count(self.config)

    @property
    def max_restarts(self) -> int:
        """How often the ranks are started again after one of them was lost."""
        return int(self.config.get("max_restarts", 0))


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
        index: Number of the job.
        status: How.
        run_id: Its run, None if it did not get as far.
        seconds: How long it took this time, in seconds.
        signal: Number of the signal that ended it.
        error: What it failed with, in a few lines.
        trace: The traceback, empty for an error that is explained without one.
        blames_others: Whether this rank has failed only because it cannot go on without another one.
        is_lost: Whether one of several ranks was lost, so that the job can start again.
    """

    index: int
    status: EndStatus
    run_id: str | None = None
    seconds: float = 0.0
    signal: int | None = None
    error: str = ""
    trace: str = ""
    blames_others: bool = False
    is_lost: bool = False


def run_job(task: JobTask) -> JobResult:
    """Start the run of a job, or resume it. Whatever happens is in the result.

    Nothing is raised, except by a rank that cannot join the first one, whose result is that of the job.

    A scheduler may start a job again, after a preemption or on another machine, with the task that was made before the
    job had a run. Such a job looks for the run that it has by now, and resumes it.
    """
    start = time.monotonic()
    secure_output()  # a process of a pool prints where the sweep does
    try:
        return _run_alone(task, start)
    except KeyboardInterrupt:
        return JobResult(task.index, EndStatus.KILLED, task.run_id, time.monotonic() - start, signal.SIGINT)
    except BaseException as error:
        if _follows() and not isinstance(error, PeerError):
            raise
        _tell(SweepPaths(task.output_dir, task.sweep_id), task.index, EndStatus.FAILED)
        return _failed(task, error, task.run_id, start)


def _run_alone(task: JobTask, start: float) -> JobResult:
    """Run a job once no other process does; a run that has finished by then is not run again."""
    paths = SweepPaths(task.output_dir, task.sweep_id)
    if not paths.sweep_dir.is_dir():
        raise ConfigError(
            f"{task.output_dir} is another folder on {socket.gethostname()}, where this job runs: it has to be on a "
            "file system that all machines share",
            path="output_dir",
        )
    if _follows():
        _enter_folder(task.folder)
        return _follow(task, paths, start)
    is_requeued = task.run_id is None and not _is_first_start(paths, task.index)
    _enter_folder(task.folder)
    with ExitStack() as stack:
        if number := _claim(paths, task.index, stack):
            return _not_run(task, EndStatus.KILLED, start, number)
        if is_requeued:
            task = _with_its_run(task, paths)
        if task.run_id is not None and local_record(paths, task.run_id).status == EndStatus.FINISHED:
            return _not_run(task, EndStatus.FINISHED, start)
        claim_devices([(device, paths.device_lock(device)) for device in task.devices], task.ranks)
        _tell(paths, task.index, f"run {task.run_id or ''}")
        return _run(task, start)


def _follows() -> bool:
    """Whether this process is a rank of a job, and not the first one."""
    here = place()
    return here is not None and here.rank > 0


def _not_run(task: JobTask, status: EndStatus, start: float, number: int | None = None) -> JobResult:
    _tell(SweepPaths(task.output_dir, task.sweep_id), task.index, status)
    return JobResult(task.index, status, task.run_id, time.monotonic() - start, number)


def _tell(paths: SweepPaths, index: int, decision: str) -> None:
    """Tell the other ranks of a job what becomes of it, if a process of a cluster is a rank."""
    if not _follows() and (attempt := os.environ.get(ATTEMPT)) and paths.sweep_dir.is_dir():
        write_text(paths.decision(index, attempt), decision)


def _follow(task: JobTask, paths: SweepPaths, start: float) -> JobResult:
    """Wait until the first rank of the job has decided, and do the same."""
    path = paths.decision(task.index, os.environ[ATTEMPT])
    with catch_signals() as interruption:
        while not path.exists() and interruption.signal is None:
            time.sleep(_POLL_S)
    if interruption.signal is not None:
        return JobResult(task.index, EndStatus.KILLED, task.run_id, time.monotonic() - start, interruption.signal)
    decision, _, run_id = read_text(path, paths.sweep_dir).partition(" ")
    if decision == "run":
        return _run(replace(task, run_id=run_id or None), start)
    return JobResult(task.index, EndStatus(decision), task.run_id, time.monotonic() - start)


def _is_first_start(paths: SweepPaths, index: int) -> bool:
    """Record that a job is started; return whether it never was before."""
    mark = paths.begun(index)
    mark.parent.mkdir(exist_ok=True)
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        return False
    return True


def _with_its_run(task: JobTask, paths: SweepPaths) -> JobTask:
    """Return the task with the run that its job has by now, if it has one."""
    tracker = RecordedTracker(open_tracker(Factory(task.config), paths), OutputPaths(task.output_dir))
    record = find_records(paths, tracker).get(task.index)
    return task if record is None else replace(task, run_id=record.run_id)


def _claim(paths: SweepPaths, index: int, stack: ExitStack) -> int | None:
    """Lock a job for this process, waiting for another one that runs it; return the signal that ended the wait.

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


def _run(task: JobTask, start: float) -> JobResult:
    config = {**task.config, "output_dir": str(task.output_dir), "parent_run_id": task.sweep_id}
    origin, launch = None, task.launch
    if task.run_id is not None:
        origin = Origin(Mode.RESUME, task.run_id)
        launch = as_resume(launch, OutputPaths(task.output_dir), task.run_id)
    outcome = start_run(Start(config, launch, origin, task.trust, is_shown=False), task.provenance)
    if outcome.error is not None:
        return _failed(task, outcome.error, outcome.run_id, start)
    return JobResult(task.index, outcome.status, outcome.run_id, time.monotonic() - start, outcome.signal)


def _failed(task: JobTask, error: BaseException, run_id: str | None, start: float) -> JobResult:
    trace = "" if isinstance(error, KsuitError) else "".join(traceback.format_exception(error))
    text = str(error) if isinstance(error, KsuitError) else f"{type(error).__name__}: {error}"
    return JobResult(
        task.index,
        EndStatus.FAILED,
        run_id,
        time.monotonic() - start,
        error=mask_text(text),
        trace=mask_text(trace),
        blames_others=isinstance(error, PeerError),
    )


def _enter_folder(folder: Path) -> None:
    """Work in the sweep's working directory and import from it; a worker of a cluster starts elsewhere."""
    if folder != Path.cwd():
        os.chdir(folder)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
