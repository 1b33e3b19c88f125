"""Ships metric points from the journal to the tracker, behind training."""

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from ksuit_runner.errors import TrackerError
from ksuit_runner.journal import Journal, Point
from ksuit_runner.tracker.base import BaseTracker

_LOGGER = logging.getLogger(__name__)
_BATCH_SIZE = 1000
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.5, 30.0


class MetricSender:
    """A thread that sends the journal's points in order, in batches of at most 1000, and remembers how far it came.

    It never raises into training: while the tracker cannot be reached it tries again after 0.5 s, 1 s, ... 30 s. How
    far it came is a position in the journal, always between two lines. After a crash the points of the last batch may
    be sent once more, with the same timestamps, which changes nothing.

    Points are sent only once they are on the disk: had they been recorded and then lost with the power, the resumed
    run would record them a second time under another timestamp.

    Args:
        journal: Journal of the run; only this process appends to it.
        sent_path: File that holds how far the journal has been sent.
        tracker: Tracker, bound to the run.
        interval_s: How often the journal is looked at, in seconds.
    """

    def __init__(self, journal: Journal, sent_path: Path, tracker: BaseTracker, interval_s: float = 1.0) -> None:
        self._journal = journal
        self._sent_path = sent_path
        self._tracker = tracker
        self._interval_s = interval_s
        self._offset = 0
        self._delay_s = 0.0  # 0 while the tracker can be reached
        self._is_stopped = False
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._advance(self._load_offset())
        self._thread = threading.Thread(target=self._run, name="metric-sender", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Send now instead of at the next interval, and try again at once if the tracker could not be reached."""
        self._wake.set()

    def pending(self) -> int:
        """Number of points that are in the journal and not sent yet."""
        return sum(len(points) for points, _ in self._journal.read(self._offset))

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything that is in the journal now is sent; return whether it is."""
        end = self._journal.size
        with self._changed:
            self._delay_s = min(self._delay_s, _FIRST_DELAY_S)  # someone waits: try more often
            self.notify()
            return self._changed.wait_for(lambda: self._offset >= end, timeout_s)

    def close(self, timeout_s: float) -> int:
        """Send what is left, within the given time, and end the thread.

        Returns:
            Number of points that could not be sent; they stay in the journal for the next start.
        """
        self.flush(timeout_s)
        self._is_stopped = True
        self.notify()
        if self._offset >= self._journal.size:
            self._thread.join(timeout_s)
        return self.pending()

    def _run(self) -> None:
        while True:
            self._wake.wait(self._delay_s or self._interval_s)
            self._wake.clear()
            if self._is_stopped:
                return
            try:
                self._send()
            except Exception as error:  # whatever a tracker raises, training goes on
                self._fail(error)

    def _send(self) -> None:
        if self._offset >= self._journal.size:
            return
        self._journal.sync()
        for points, end in self._batches():
            if self._is_stopped:
                return
            self._tracker.log_points(points)
            self._advance(end)
        if self._delay_s:
            self._delay_s = 0.0
            _LOGGER.warning("The tracker can be reached again, all metrics have been sent")

    def _batches(self) -> Iterator[tuple[list[Point], int]]:
        """Yield the unsent points in batches, each with the position that is reached when it is sent."""
        batch: list[Point] = []
        start = self._offset
        for points, end in self._journal.read(start):
            if batch and len(batch) + len(points) > _BATCH_SIZE:
                yield batch, start
                batch = []
            while len(points) > _BATCH_SIZE:  # a single line with more: its position counts when all of it is sent
                yield points[:_BATCH_SIZE], start
                points = points[_BATCH_SIZE:]
            batch.extend(points)
            start = end
        if batch:
            yield batch, start

    def _fail(self, error: Exception) -> None:
        if not self._delay_s and not self._is_stopped:
            reason = str(error) if isinstance(error, TrackerError) else repr(error)
            _LOGGER.warning("Metrics cannot be sent (they are kept in the journal, training goes on): %s", reason)
        self._delay_s = min(2 * self._delay_s or _FIRST_DELAY_S, _LONGEST_DELAY_S)

    def _load_offset(self) -> int:
        try:
            offset = int(self._sent_path.read_text())
        except (FileNotFoundError, ValueError):
            return 0  # sending everything again changes nothing
        # The journal may have been cut to its last good line since, and then gone on.
        offset = min(offset, self._journal.size)
        return offset if self._journal.is_boundary(offset) else 0

    def _advance(self, offset: int) -> None:
        temporary = self._sent_path.with_name(self._sent_path.name + ".tmp")
        temporary.write_text(str(offset))
        os.replace(temporary, self._sent_path)
        with self._changed:
            self._offset = offset
            self._changed.notify_all()
