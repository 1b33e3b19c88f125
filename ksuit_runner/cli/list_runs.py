"""The runs of an output folder as a table; those found killed are marked so with the tracker: ``list=``."""

from collections.abc import Sequence

from omegaconf import DictConfig

from ksuit_runner.config.compose import compose_config, with_trackers_beside
from ksuit_runner.config.overrides import allow_only
from ksuit_runner.delivery.recording import Recording
from ksuit_runner.errors import ConfigError, ResumeError, TrackerError
from ksuit_runner.paths import OutputPaths
from ksuit_runner.record.stored_run import no_run_in
from ksuit_runner.reports.facts import StoredRun, stored_runs
from ksuit_runner.resume.stored_tracker import tracker_factory
from ksuit_runner.system.recorder_lock import StoredRunLock
from ksuit_runner.system.run_lock import is_held
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.tracker.build import build_tracker
from ksuit_runner.ui.formats import SHORT_ID, format_duration, format_number, shortened
from ksuit_runner.ui.terminal import make_console, print_table

_LONGEST = 30  # of what is noted about a run
_LEFT_OUT = ("took", "notes", "age", "tags")  # of a narrow terminal, in this order
_LEAST = {"name": 14, "metric": 16, "tags": 12, "notes": 12}  # characters that cells are cut to there
_TAKES = ("output_dir", "tracker", "trust")


def list_runs(count: str, overrides: Sequence[str]) -> int:
    """Print the newest runs. Those whose process is gone without having said how they ended are marked as KILLED.

    Args:
        count: How many, or ``all``.
        overrides: The command line; besides the number it may say where runs are.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: The count is no number of at least 1, or another override is given.
    """
    if count != "all" and not (count.isdecimal() and int(count)):
        raise ConfigError(f"list={count}: a number of runs is needed, or all")
    allow_only(overrides, "list", *_TAKES)
    composed = compose_config(with_trackers_beside(overrides))
    outputs = OutputPaths(composed.output_dir)
    runs = stored_runs(outputs)
    if not runs:
        make_console().print(no_run_in(outputs), soft_wrap=True)
        return 0
    shown = runs if count == "all" else runs[: int(count)]
    heads: tuple[str, ...] = ("run", "name", "status", "metric", "best", "took", "age")
    rows = [_row(run, composed, overrides) for run in shown]
    told = [(run.tags, " ".join(run.notes.split())) for run in shown]
    for index, head in enumerate(("tags", "notes")):
        if any(cells[index] for cells in told):
            heads = (*heads, head)
            rows = [(*row, shortened(cells[index], _LONGEST)) for row, cells in zip(rows, told, strict=True)]
    optional = [[heads.index(head)] for head in _LEFT_OUT if head in heads]
    least = {heads.index(head): width for head, width in _LEAST.items() if head in heads}
    print_table(make_console(), heads, rows, status_column=heads.index("status"), optional=optional, least=least)
    return 0


def _row(run: StoredRun, composed: DictConfig, overrides: Sequence[str]) -> tuple[str, ...]:
    status = run.recorded_status or _mark_if_killed(run, composed, overrides)
    metric, best = run.judged
    times = ("" if time is None else format_duration(time.total_seconds()) for time in (run.took, run.age))
    judged = metric, "" if best is None else format_number(best)
    return run.paths.run_id[:SHORT_ID], run.name, status.lower(), *judged, *times


def _mark_if_killed(run: StoredRun, composed: DictConfig, overrides: Sequence[str]) -> str:
    """Return RUNNING for a run whose process is alive; else record it as KILLED, also with its tracker."""
    paths = run.paths
    lock = StoredRunLock(paths.lock, paths.recorder_lock)
    if is_held(paths.recorder_lock) and not is_held(paths.lock):
        return EndStatus.KILLED  # its recorder is delivering that
    try:
        lock.acquire(wait=False)
    except ResumeError:  # its process is alive, or on a host of which only the clock tells
        return run.status
    try:
        tracker = build_tracker(tracker_factory(paths, composed, overrides), paths)
        recording = Recording(tracker, paths, lock.check)
        recording.mark_if_killed()
        recording.deliver_status()
    except TrackerError:
        return "KILLED, which the tracker does not know yet"
    finally:
        lock.release()
    return EndStatus.KILLED
