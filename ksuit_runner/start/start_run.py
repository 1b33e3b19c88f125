"""Starts a run with a checked config: in this process, or in several ranks, which get the config as it is."""

import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ksuit_runner.checkpoint.folders import has_traces
from ksuit_runner.config.check.ranks import check_gpus, rank_count
from ksuit_runner.config.factory import Factory
from ksuit_runner.config.targets import Trust
from ksuit_runner.distributed.environment import place
from ksuit_runner.engine.outcome import RunOutcome
from ksuit_runner.errors import KsuitError, LostRankError, PeerError, files_explained
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.origin import Origin
from ksuit_runner.record.stored_run import Launch
from ksuit_runner.recorder.tracker import warm_up
from ksuit_runner.start.begun_runs import BegunRuns
from ksuit_runner.start.supervised_rank import Report
from ksuit_runner.start.supervisor import Ended, Supervisor
from ksuit_runner.system.imports import quick_imports
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.ui.command_line import resume_command
from ksuit_runner.ui.logs import log_to_file
from ksuit_runner.ui.terminal import make_console, print_error, print_warning

if TYPE_CHECKING:
    from ksuit_runner.record.provenance import Provenance

_LOGGER = logging.getLogger(__name__)
_RANK = ("-P", "-m", "ksuit_runner.start.rank_process")


@dataclass(frozen=True)
class Start:
    """What a run is started with.

    Attributes:
        config: Its config as plain values, with everything resolved: what ``check_config`` returns.
        launch: How it was started, to be stored with it.
        origin: The stored run that it starts from, if any.
        trust: Which targets a config may name that was not composed here.
        is_shown: Whether the user follows it on the terminal.
    """

    config: Mapping[str, Any]
    launch: Launch
    origin: Origin | None = None
    trust: Trust | None = None
    is_shown: bool = True


@dataclass(frozen=True)
class RankTask:
    """What a rank needs to know; it is sent to its process.

    Attributes:
        start: What the run is started with.
        id: Under which the run that the ranks begin is found when they start again.
        arguments: ``sys.argv`` of the command.
        path: Its import path.
    """

    start: Start
    id: str
    arguments: list[str]
    path: list[str]


@dataclass
class RankEnd:
    """How a rank has ended, for the process that has started it.

    Attributes:
        outcome: How the run has ended, with an error that was reported; None if it could not be started.
        error: The error of the run, or why it could not be started.
        trace: Its traceback.
    """

    outcome: RunOutcome | None = None
    error: BaseException | None = None
    trace: str = ""

    def report(self) -> Report:
        """Return the report that says so. An error that cannot be sent is replaced by one with its text."""
        blames_others = isinstance(self.error, PeerError)
        try:
            content = pickle.dumps(self)
            pickle.loads(content)
        except Exception:
            self.error = RuntimeError("".join(traceback.format_exception_only(self.error)).strip())
            content = pickle.dumps(self)
        return Report(blames_others, content)


def start_run(start: Start, provenance: "Provenance | None" = None) -> RunOutcome:
    """Execute a run and return how it ended, with an error in training, which was reported and is not raised.

    Args:
        start: What it is started with.
        provenance: Provenance of a new run; collected by default.

    Raises:
        KsuitError: It could not be started.
    """
    outputs = OutputPaths(start.config["output_dir"])
    outputs.check()
    check_gpus(start.config)
    if place() is None and rank_count(start.config) > 1:
        return _start_ranks(start)
    return execute(start, BegunRuns.of_this_process(outputs, start.config), provenance)


def execute(start: Start, begun: BegunRuns | None, provenance: "Provenance | None" = None) -> RunOutcome:
    """Execute a run in this process, alone or as one of its ranks; see ``start_run``.

    Args:
        start: What it is started with.
        begun: Where the run is found that an earlier attempt has begun, and which this one resumes.
        provenance: Provenance of a new run; collected by default.
    """
    here, origin, launch = place(), start.origin, start.launch
    outputs = OutputPaths(start.config["output_dir"])
    if begun is not None and (origin is None or origin.mode == Mode.FORK):
        run_id = begun.find(start.config)
        if run_id is not None and (origin is None or has_traces(PathProvider(outputs.output_dir, run_id))):
            origin, launch = Origin(Mode.RESUME, run_id), as_resume(launch, outputs, run_id)
    records = here is None or here.rank == 0
    if records:
        warm_up(Factory(start.config, start.trust), outputs)
    remember = None if begun is None or not records else partial(begun.add, start.config)
    import_engine()
    from ksuit_runner.engine.runner import run

    console = make_console(quiet=not start.is_shown)
    outcome = run(start.config, launch, origin, console, provenance, start.trust, remember)
    if begun is not None and records and (outcome.status == EndStatus.FINISHED or not outcome.folder.is_dir()):
        begun.remove()
    return outcome


def import_engine() -> None:
    """Import what executes a run, and torch with it; where a recorder was begun, it starts meanwhile."""
    with quick_imports(before_runs=True):
        import ksuit_runner.engine.runner  # noqa: F401


def as_resume(launch: Launch, outputs: OutputPaths, run_id: str) -> Launch:
    """Return how a run was started, for an attempt that resumes it; unchanged if only the id of the run is known."""
    if not PathProvider(outputs.output_dir, run_id).launch.is_file():
        return launch
    return replace(launch, mode=Mode.RESUME, origin=run_id, tags={})


def _start_ranks(start: Start) -> RunOutcome:
    config, size = start.config, rank_count(start.config)
    if not sys.executable:
        raise KsuitError("no further process can be started, as this Python is part of another program", path="ranks")
    outputs = OutputPaths(config["output_dir"])
    job = BegunRuns.of_this_process(outputs, config)
    begun = BegunRuns(outputs, uuid4().hex if job is None else job.id)
    if job is not None and not job.is_repeated:
        begun.remove()  # the same command in this job before had a run of its own
    task = RankTask(start, begun.id, sys.argv[:], [path or os.getcwd() for path in sys.path])

    def say(message: str) -> None:
        print_warning(make_console(stderr=True), message)
        if (run_id := begun.find(config)) is not None:
            with log_to_file(PathProvider(outputs.output_dir, run_id).log):
                _LOGGER.warning(message)

    supervisor = Supervisor(
        [sys.executable, *_RANK],
        size,
        int(config.get("max_restarts", 0)),
        say,
        environment={**os.environ, "PYTHONPATH": os.pathsep.join(task.path)},
        stdin=subprocess.DEVNULL,
        stdout=None if start.is_shown else subprocess.DEVNULL,
    )
    sys.stdout.flush()
    try:
        with files_explained():
            ended = supervisor.run(pickle.dumps(task))
        run_id = begun.find(config)
        if run_id is None and start.origin is not None and start.origin.mode != Mode.FORK:
            run_id = start.origin.run_id
    finally:
        if job is None:
            begun.remove()
    return outcome_of(ended, run_id, outputs)


def outcome_of(ended: Ended, run_id: str | None, outputs: OutputPaths) -> RunOutcome:
    """Return how the run has ended, with the error of the rank that is its cause.

    Raises:
        Exception: That error, if the run could not be started.
    """
    ends = [None if report is None else pickle.loads(report.content) for report in ended.reports]
    folder = outputs.output_dir if run_id is None else PathProvider(outputs.output_dir, run_id).run_dir
    first: RankEnd | None = ends[0]
    outcome = first.outcome if first is not None else None
    error = _cause(ended, ends, run_id, outputs)
    if isinstance(error, LostRankError):
        if run_id is None:
            raise error
        print_error(make_console(stderr=True), error)
        return RunOutcome(run_id, folder, EndStatus.KILLED if outcome is None else outcome.status, error=error)
    if outcome is not None:
        return replace(outcome, error=error if outcome.error is not None else None)
    if ended.signal is not None:
        return RunOutcome(run_id or "", folder, EndStatus.KILLED, ended.signal)
    assert error is not None
    raise error


def _cause(ended: Ended, ends: list[RankEnd | None], run_id: str | None, outputs: OutputPaths) -> BaseException | None:
    resume = "" if run_id is None else f"\nTo resume: {resume_command(run_id, outputs.output_dir)}"
    if ended.lost is not None:
        return LostRankError(f"{ended.lost.text}{resume}", ended.lost.exit_status)
    failed = [end for end in ends if end is not None and end.error is not None]
    own = [end for end in failed if not isinstance(end.error, PeerError)]
    for rank, (report, status) in enumerate(zip(ended.reports, ended.statuses, strict=True)):
        if not own and report is None and status >= 0 and ended.signal is None:  # what the others say of it is a guess
            text = f"rank {rank} has ended with exit status {status} before the run has{resume}"
            return LostRankError(text, status or 1)
    for end in (*own, *failed):
        assert end.error is not None
        if end.trace and end.error.__cause__ is None:
            end.error.__cause__ = _RankTraceback(end.trace)
        return end.error
    return None


class _RankTraceback(Exception):
    """The traceback of an error in a rank, which does not come with the error itself."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"
