"""Reads metric points back from a tracker, and writes those into a journal that it lacks."""

import logging
from collections.abc import Callable, Iterable
from itertools import groupby

from ksuit_runner.delivery.metric_sender import read_offset
from ksuit_runner.errors import TrackerError
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import Journal, is_damaged
from ksuit_runner.record.point import Point
from ksuit_runner.tracker.base import BaseTracker

_LOGGER = logging.getLogger(__name__)


def tracked_points(tracker: BaseTracker, run_id: str) -> list[Point]:
    """Return everything that was recorded of a run, in the order in which it was logged.

    Raises:
        TrackerError: It cannot be read.
    """
    points = [point for key in tracker.last_steps(run_id) for point in tracker.history(key, run_id)]
    return sorted(points, key=lambda point: (point.step, point.timestamp))


def write_points(journal: Journal, points: Iterable[Point]) -> None:
    """Append points that were logged elsewhere, in the given order, with their timestamps."""
    for (step, timestamp), group in groupby(points, key=lambda point: (point.step, point.timestamp)):
        journal.append(step, {point.key: point.value for point in group}, timestamp)


def open_journal(paths: PathProvider, tracker: BaseTracker, check_owner: Callable[[], None] = lambda: None) -> Journal:
    """Open the journal of a run that is resumed.

    What a lost, cut, damaged or outdated one lacks is taken from the tracker, before updates are computed again: they
    would be recorded a second time.

    Args:
        paths: Paths of the run.
        tracker: Tracker of the run.
        check_owner: As ``Journal`` takes it.

    Raises:
        TrackerError: The tracker is needed, and cannot be read.
    """
    is_missing = not paths.journal.exists()
    journal = Journal(paths.journal, check_owner)
    is_cut = read_offset(paths.journal_sent) > journal.size
    if is_missing or is_cut or journal.damaged or _is_outdated(journal, tracker, paths.run_id):
        try:
            recovered = _recover(journal, tracker, paths.run_id, None)
        except TrackerError as error:
            journal.close()
            raise TrackerError(
                f"{paths.journal} is damaged or lost, and cannot be completed from the tracker: {error}"
            ) from error
        if not is_missing:
            _LOGGER.warning("%d metric points that the journal lacked were read from the tracker", recovered)
    return journal


def _is_outdated(journal: Journal, tracker: BaseTracker, run_id: str) -> bool:
    """Whether a tracker that can be reached has later points: this may be an older copy of the run's folder."""
    try:
        tracked = tracker.last_steps(run_id)
    except TrackerError:
        return False
    if not tracked:
        return False
    known = {(point.key, point.step) for points, _ in journal.read() for point in points}
    return not known.issuperset(tracked.items())


def copy_history(parent: PathProvider, journal: Journal, tracker: BaseTracker, update: int) -> None:
    """Start a journal with another run's points up to an update; what its journal lacks is read from the tracker."""
    if parent.journal.exists():
        journal.copy_until(parent.journal, update)
    if is_damaged(parent.journal):
        try:
            _recover(journal, tracker, parent.run_id, update)
        except TrackerError as error:
            _LOGGER.warning("some metrics of run %s before the fork are missing: %s", parent.run_id, error)


def _recover(journal: Journal, tracker: BaseTracker, run_id: str, update: int | None) -> int:
    known = {(point.key, point.step) for points, _ in journal.read() for point in points}
    tracked = [point for point in tracked_points(tracker, run_id) if update is None or point.step <= update]
    missing = [point for point in tracked if (point.key, point.step) not in known]
    write_points(journal, missing)
    return len(missing)
