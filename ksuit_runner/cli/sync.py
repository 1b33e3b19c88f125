"""Sends the tracker afterwards what it is missing of a run: ``sync=RUN_ID``."""

import shutil
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from ksuit_runner.config.compose import compose_config, with_trackers_beside
from ksuit_runner.config.factory import Factory
from ksuit_runner.config.overrides import allow_only
from ksuit_runner.delivery.outbox import Outbox, load_or_ask
from ksuit_runner.delivery.recording import Recording
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.record.stored_run import find_local, unknown_run
from ksuit_runner.resume.stored_tracker import tracker_factory
from ksuit_runner.system.recorder_lock import StoredRunLock
from ksuit_runner.tracker.build import build_tracker
from ksuit_runner.ui.command_line import sync_command
from ksuit_runner.ui.terminal import make_console, tracked_at

_TAKES = ("output_dir", "tracker", "trust", "register_anew")


def sync(query: str, overrides: Sequence[str]) -> int:
    """Register a run if needed, and send what is missing: metrics, files and checkpoints, and how it ended.

    Args:
        query: The run's id, the first 6 or more characters of it, its name, or ``last``.
        overrides: The command line; besides the run it may say where runs are, and what differs about the tracker.

    Returns:
        The exit status, 0: everything is recorded.

    Raises:
        ResumeError: There is no such run, or it is alive.
        TrackerError: The tracker cannot be reached; what was sent until then counts, and nothing is lost.
    """
    allow_only(overrides, "sync", *_TAKES)
    composed = compose_config(with_trackers_beside(overrides))
    outputs = OutputPaths(composed.output_dir)
    run_id = find_local(outputs, query)
    if run_id is None:
        raise unknown_run(outputs, query, "sync")
    paths = PathProvider(outputs.output_dir, run_id)
    console = make_console()
    console.print(tracked_at(console, deliver(paths, composed, overrides), label=""), soft_wrap=True)
    if (box := Outbox.load(paths)) and box.is_withdrawn:
        shutil.rmtree(paths.run_dir, ignore_errors=True)  # as if the tracker had been told at once
    return 0


def deliver(
    paths: PathProvider,
    composed: DictConfig,
    overrides: Sequence[str],
    change: Callable[[Outbox], None] | None = None,
    factory: Factory | None = None,
) -> str:
    """Deliver what a tracker is missing of a run that no process trains.

    Args:
        paths: Paths of the run.
        composed: The composed command line.
        overrides: The command line.
        change: Changes what is to be delivered; it is stored before anything is sent.
        factory: Builds the tracker; by default from the stored config of the run.

    Returns:
        A line that says what was sent.

    Raises:
        ResumeError: The run is alive.
        TrackerError: The tracker cannot be reached; what is not sent yet stays stored.
    """
    factory = factory or tracker_factory(paths, composed, overrides)
    with StoredRunLock(paths.lock, paths.recorder_lock) as lock:
        try:
            tracker = build_tracker(factory, paths)
            if change is not None:
                box = load_or_ask(paths, tracker)
                change(box)
                box.store(paths)
            recording = Recording(tracker, paths, lock.check)
            if composed.register_anew:
                recording.forget_lost()
            recording.mark_if_killed()
            return recording.deliver_all()
        except (TrackerError, OSError) as error:
            again = f"What is not sent yet stays stored; to try again: {sync_command(paths.run_id, paths.output_dir)}"
            raise TrackerError(f"{error}\n{again}") from error
