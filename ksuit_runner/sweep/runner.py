"""The life of a sweep in one process: its parent run, its jobs on the launcher, and the leaderboard at the end."""

import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from ksuit_runner.config.factory import Factory
from ksuit_runner.config.targets import Trust
from ksuit_runner.delivery.recorded_tracker import RecordedTracker
from ksuit_runner.delivery.recording import Recording
from ksuit_runner.errors import AliveError, ConfigError, TrackerError
from ksuit_runner.launchers.base import Launcher
from ksuit_runner.metric_property import MetricPropertyProvider
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.record.provenance import Provenance
from ksuit_runner.record.stored_run import add_to_index, entries
from ksuit_runner.recorder.tracker import open_tracker
from ksuit_runner.sweep.fetch_sweep import fetch_runs
from ksuit_runner.sweep.job_queue import run_jobs
from ksuit_runner.sweep.job_runs import JobRecord, find_records, launch_of
from ksuit_runner.sweep.job_source import JobSource
from ksuit_runner.sweep.job_status import read_ends, record_end, status_of
from ksuit_runner.sweep.leaderboard import Leaderboard, Row, make_leaderboard
from ksuit_runner.sweep.leaderboard_plot import draw_leaderboard
from ksuit_runner.sweep.leaderboard_tables import as_markdown, print_leaderboard, write_leaderboard
from ksuit_runner.sweep.plan import Job, SweepPlan, read_jobs
from ksuit_runner.sweep.progress import SweepProgress, print_sweep
from ksuit_runner.sweep.run_job import JobResult, JobTask
from ksuit_runner.system.recorder_lock import StoredRunLock
from ksuit_runner.system.run_lock import RunLock
from ksuit_runner.system.signals import Interruption, catch_signals
from ksuit_runner.tracker.base import BaseTracker, EndStatus
from ksuit_runner.tracker.start_tags import DESCRIPTION_TAG
from ksuit_runner.ui.acknowledge import acknowledged
from ksuit_runner.ui.command_line import resume_command, sync_command
from ksuit_runner.ui.formats import format_number
from ksuit_runner.ui.terminal import print_blank, print_error, print_pairs

_MOST_DESCRIBED = 20  # rows of a table in the description of the parent run


@dataclass
class SweepOutcome:
    """How a sweep ended.

    Attributes:
        run_id: Its id, which is that of the parent of its runs.
        folder: Folder of its files.
        status: FINISHED, FAILED if one of its runs has, or KILLED.
        signal: Number of the signal that ended it, if one did.
        jobs: Its jobs, ranked; empty if the tracker could not be asked.
    """

    run_id: str
    folder: Path
    status: EndStatus = EndStatus.FAILED
    signal: int | None = None
    jobs: list[Row] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """Exit status of a process that runs this sweep only."""
        return 128 + self.signal if self.signal is not None else int(self.status == EndStatus.FAILED)


class SweepRunner:
    """Runs a sweep in this process, from its start or a resume to its end or an interruption.

    Args:
        paths: Files of the sweep; its plan is stored there.
        plan: The plan.
        config: A config with the tracker of the sweep.
        tracker: Tracker of the parent run.
        launcher: Where the jobs run.
        console: Where progress and the leaderboard are printed.
        lock: The sweep's lock, held by this process.
        trust: Limits of configs that this user did not write.

    Attributes:
        recording: Delivers the parent run.
    """

    def __init__(
        self,
        paths: SweepPaths,
        plan: SweepPlan,
        config: DictConfig,
        tracker: RecordedTracker,
        launcher: Launcher,
        console: Console,
        lock: RunLock,
        trust: Trust | None = None,
    ) -> None:
        self.paths = paths
        self._plan = plan
        self._tracker = tracker
        self.recording = Recording(tracker.store, PathProvider(paths.output_dir, paths.sweep_id), lock.check)
        self._launcher = launcher
        self._console = console
        self._properties = build_properties(config, plan.objective, trust)
        self._records: Mapping[int, JobRecord] = {}
        self._indexed: set[str] = set()
        self._results: dict[int, JobResult] = {}
        self._skipped: dict[int, str] = {}
        self._provenance = Provenance() if launcher.runs_here else None
        self._lock = lock
        self._trust = trust
        self._is_resumed = False

    def run(self, source: JobSource, total: int, resume: Callable[[], None] | None = None) -> SweepOutcome:
        """Run the jobs that are not done, and return how the sweep ended.

        Args:
            source: Where the jobs come from.
            total: How many jobs there will be.
            resume: For a sweep that has run before: called once all else is ready, before anything is changed.

        Raises:
            KsuitError: It cannot be started or resumed; nothing was changed.
        """
        self._is_resumed = resume is not None
        is_started = resume is None
        outcome = SweepOutcome(self.paths.sweep_id, self.paths.sweep_dir)
        with catch_signals() as interruption:
            try:
                self._launcher.open(self.paths)
                if resume is not None:
                    resume()
                    is_started = True
                    self._records = find_records(self.paths, self._tracker)
                    fetch_runs(self._tracker, self.paths, self._records)
                    self._indexed = {entry.run_id for entry in entries(self.paths)}
                print_sweep(self._console, self._plan, self.paths, total, self._launcher.where(), self._tracker.where())
                self._share_plan()
                outcome.signal = self._run_jobs(source, total, interruption)
                of_all = EndStatus.FAILED if EndStatus.FAILED in self._statuses() else EndStatus.FINISHED
                outcome.status = EndStatus.KILLED if outcome.signal else of_all
            except KeyboardInterrupt:
                outcome.signal, outcome.status = signal.SIGINT, EndStatus.KILLED
            finally:
                self._launcher.close()
                if is_started and not self._lock.lost.is_set():
                    outcome.jobs = self._finish(source, outcome.status)
        return outcome

    def _share_plan(self) -> None:
        """Upload plan and jobs at once, so that the sweep can be resumed on another machine."""
        for path in filter(Path.exists, (self.paths.signature, self.paths.plan, self.paths.jobs)):
            self._tracker.upload(path, path.name)
        if not self._tracker.artifacts_are_local:
            try:
                self.recording.deliver_all()
            except TrackerError as error:
                message = f"{error}\nThe sweep continues, but as long as this fails only this machine can resume it"
                print_error(self._console, TrackerError(message))

    def _statuses(self) -> set[str]:
        return {result.status for result in self._results.values()} | set(self._skipped.values())

    def _run_jobs(self, source: JobSource, total: int, interruption: Interruption) -> int | None:
        jobs: dict[int, Job] = {}
        progress = SweepProgress(self._console, self.paths, self._plan, self._properties, total)

        def on_start(task: JobTask) -> None:
            progress.starts(jobs[task.index], task.run_id)

        def on_end(task: JobTask, result: JobResult) -> None:
            job = jobs[task.index]
            self._lock.check()
            record_end(self.paths, result)
            self._results[task.index] = result
            source.job_ended(job, result.status, result.run_id)
            progress.ends(job, result, task.index in source.pruned())

        def on_restart(task: JobTask, reason: str) -> None:
            self._lock.check()
            progress.say(jobs[task.index], reason)

        with (
            progress,
            acknowledged(progress.acknowledge, "jobs that run finish this update and save, and the sweep ends"),
        ):
            tasks = self._tasks(source, jobs, progress)
            run_jobs(tasks, self._launcher, interruption, on_start, on_end, on_restart, self._plan.settings.fail_fast)
        signals = [result.signal for result in self._results.values() if result.signal is not None]
        return interruption.signal or next(iter(signals), None)

    def _tasks(self, source: JobSource, jobs: dict[int, Job], progress: SweepProgress) -> Iterator[JobTask]:
        ends = read_ends(self.paths)
        pruned = source.pruned()  # before this process: those jobs are not run again
        for job in source.jobs():
            record, end = self._records.get(job.index), ends.get(job.index)
            status = status_of(record, end)
            if status == EndStatus.FINISHED or (status == EndStatus.FAILED and not self._plan.settings.retry):
                self._skipped[job.index] = status
                progress.had_ended(job, status, record.run_id if record else None, job.index in pruned)
                if record is not None and not record.is_delivered:
                    self._deliver(job, record, progress)
                source.job_ended(job, status, record.run_id if record else None)
                continue
            jobs[job.index] = job
            self._lock.check()
            if self._is_resumed:
                self._print_wait(job, progress)
            yield self._task(job, record)

    def _deliver(self, job: Job, record: JobRecord, progress: SweepProgress) -> None:
        """Send what the tracker lacks of a run that has ended: the run was killed, or the tracker away, before."""
        run = PathProvider(self.paths.output_dir, record.run_id)
        tracker = open_tracker(Factory(self._plan.with_tracker(job.config), self._trust), self.paths)
        try:
            with StoredRunLock(run.lock, run.recorder_lock) as lock:
                recording = Recording(tracker, run, lock.check)
                recording.mark_if_killed()
                recording.deliver_all()
        except AliveError:  # it is still sending it itself
            return
        except (TrackerError, OSError) as error:
            again = sync_command(run.run_id, run.output_dir)
            message = f"job {job.index + 1}: {error}\nTo send the rest: {again}"
            print_error(self._console, TrackerError(message))
        else:
            progress.say(job, "had ended; what the tracker lacked of it is sent")

    def _task(self, job: Job, record: JobRecord | None) -> JobTask:
        launch = launch_of(job, self._plan, self.paths)
        if record is not None and record.run_id not in self._indexed:  # killed before it was added to the index
            add_to_index(self.paths, record.run_id, record.name, launch.mode, tags=launch.tags)
        return JobTask(
            index=job.index,
            output_dir=self.paths.output_dir,
            sweep_id=self.paths.sweep_id,
            folder=Path.cwd(),
            config=self._plan.with_tracker(job.config),
            launch=launch,
            run_id=record.run_id if record else None,
            devices=tuple(self._launcher.devices),
            provenance=self._provenance,
            trust=self._trust,
        )

    def _print_wait(self, job: Job, progress: SweepProgress) -> None:
        """Print that another process still runs a job, for which the sweep waits before it resumes the job."""
        lock = RunLock(self.paths.job_lock(job.index))
        try:
            lock.acquire(wait=False)
            lock.release()
        except AliveError as error:
            progress.say(job, f"waits for another process that runs it: {error}")

    def _finish(self, source: JobSource, status: EndStatus) -> list[Row]:
        """Print, store and return the leaderboard, and end the parent run, as far as the tracker can be reached."""
        rows: list[Row] = []
        try:
            board = make_leaderboard(
                self.paths, self._plan, read_jobs(self.paths), self._tracker, self._properties, source.pruned()
            )
            rows = board.rows
            print_blank(self._console)
            print_leaderboard(self._console, board)
            if status != EndStatus.FINISHED:
                print_blank(self._console)
                print_pairs(self._console, {"resume": resume_command(self.paths.sweep_id, self.paths.output_dir)})
            store_leaderboard(self.paths, board, self._tracker)
        except TrackerError as error:
            print_error(self._console, error)
        self._tracker.end_run(status)
        run = PathProvider(self.paths.output_dir, self.paths.sweep_id)
        try:
            self.recording.deliver_all()
        except TrackerError as error:
            again = sync_command(run.run_id, run.output_dir)
            print_error(self._console, TrackerError(f"{error}\nTo send how the sweep ended: {again}"))
        return rows


def store_leaderboard(paths: SweepPaths, board: Leaderboard, tracker: BaseTracker) -> None:
    """Write tables and plot, and upload them to the parent run, with the list of jobs: a search has more by now."""
    write_leaderboard(paths, board)
    files = [paths.jobs, paths.table, paths.csv]
    if draw_leaderboard(paths.plot, board):
        files.append(paths.plot)
    for path in files:
        tracker.upload(path, path.name)
    tracker.set_tags({DESCRIPTION_TAG: as_markdown(board, _MOST_DESCRIBED), **_best(board)})


def _best(board: Leaderboard) -> dict[str, str]:
    """Return a tag with the best value of the objective, if the first row has one."""
    value = board.rows[0].metrics.get(board.objective) if board.rows and board.objective else None
    return {} if value is None else {"ksuit.best": f"{board.objective} {format_number(value)}"}


def build_properties(config: DictConfig, objective: str | None, trust: Trust | None = None) -> MetricPropertyProvider:
    """Build the provider that knows which direction of a metric is better.

    Raises:
        ConfigError: It knows no direction of the objective.
    """
    properties = Factory(config, trust).build_or_default("metric_property_provider", MetricPropertyProvider)
    if objective is not None and properties.direction(objective) == "neutral":
        raise ConfigError(
            f"metric_property_provider does not know whether higher or lower '{objective}' is better", path="objective"
        )
    return properties
