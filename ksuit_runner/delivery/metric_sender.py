"""Sends metric points from the journal to the tracker in the background."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from ksuit_runner.errors import TrackerError
from ksuit_runner.record.journal import JournalReader
from ksuit_runner.record.point import LoggedFile, Point
from ksuit_runner.system.atomic_files import write_unsynced
from ksuit_runner.system.background import Background
from ksuit_runner.system.untrusted_files import UnsafeFileError, read_text

_LOGGER = logging.getLogger(__name__)
_BATCH_SIZE = 1000


class TakesPoints(Protocol):
    """What metric points are sent to."""

    def log_points(self, points: Sequence[Point]) -> None:
        """Record points, at most 1000, before it returns; one that is recorded already changes nothing."""

    def log_files(self, files: Sequence[LoggedFile]) -> None:
        """Show logged files; one that is recorded already changes nothing."""


class Receiver(TakesPoints, Protocol):
    """What a run is delivered to; see ``Binding``."""

    def check_owner(self) -> None:
        """Raise an error if the run is no longer this process's to record."""

    def deliver(self) -> None:
        """Deliver everything but the points and the end of the run."""

    def deliver_end(self) -> None:
        """Deliver how the run ended, if it has."""

    @property
    def is_behind(self) -> bool:
        """Whether something is not delivered yet, apart from the points."""


class Shipment:
    """Sends the journal's points and files to the tracker in order, in batches, and stores how far it came.

    That is a position in the journal, always between two lines. After a crash the points of the last
    batch may be sent once more, with the same timestamps, which changes nothing.

    Points are sent only once they are on the disk: had they been recorded and then lost with the power, the resumed
    run would record them a second time under another timestamp.

    Args:
        journal: Journal of the run, which another process may be writing.
        sent_path: File that holds how far the journal has been sent.
        tracker: Takes the points, as a tracker does that is bound to the run.
        check_owner: Raises an error if the run is no longer this process's to record; called before every write.

    Attributes:
        offset: Everything before this position has been sent.
        is_cancelled: Set to end a ``send`` before its next batch.
    """

    def __init__(
        self,
        journal: JournalReader,
        sent_path: Path,
        tracker: TakesPoints,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self._journal = journal
        self._sent_path = sent_path
        self._tracker = tracker
        self._check_owner = check_owner
        self.is_cancelled = threading.Event()
        self._advance(self._load_offset())

    @property
    def is_complete(self) -> bool:
        """Whether everything has been sent."""
        return self.offset >= self._journal.size

    def pending(self) -> int:
        """Number of points and files that are in the journal and not sent yet."""
        return sum(len(line.points) + len(line.files) for line, _ in self._journal.lines(self.offset))

    def send(self) -> int:
        """Send what is left, and return how many points that were.

        Raises:
            TrackerError: They could not be sent, or not all of them.
        """
        whole = self._journal.size
        if self.offset >= whole:
            if not self._is_stored:
                self._advance(self.offset)
            return 0
        self._journal.sync()  # what is appended from now on is sent another time
        count = 0
        for points, files, end in self._batches(whole):
            if self.is_cancelled.is_set():
                return count
            if points:
                self._tracker.log_points(points)
            if files:
                self._tracker.log_files(files)
            self._advance(end)
            count += len(points)
        self._advance(max(whole, self.offset))  # past damaged lines at its end
        return count

    def _batches(self, whole: int) -> Iterator[tuple[list[Point], list[LoggedFile], int]]:
        """Yield the unsent points and files in batches, each with the position that is reached when it is sent."""
        batch: list[Point] = []
        files: list[LoggedFile] = []
        start = self.offset
        for line, end in self._journal.lines(start, whole):
            points = line.points
            if batch and len(batch) + len(points) > _BATCH_SIZE:
                yield batch, files, start
                batch, files = [], []
            while len(points) > _BATCH_SIZE:  # a single line with more: its position counts when all of it is sent
                yield points[:_BATCH_SIZE], [], start
                points = points[_BATCH_SIZE:]
            batch.extend(points)
            files.extend(line.files)
            start = end
        if batch or files:
            yield batch, files, start

    def _load_offset(self) -> int:
        # The journal may have been cut to its last good line since, and then gone on.
        offset = min(read_offset(self._sent_path), self._journal.size)
        return offset if self._journal.is_boundary(offset) else 0

    def _advance(self, offset: int) -> None:
        self._check_owner()
        self.offset = offset
        try:
            write_unsynced(self._sent_path, str(offset))
            self._is_stored = True
        except OSError:  # of a full disk, which is no reason not to send: it is written with the next points, or alone
            self._is_stored = False


def read_offset(sent_path: Path) -> int:
    """Return the position up to which a journal is marked as sent, whether it has that or not; 0 if none is."""
    try:
        return int(read_text(sent_path, sent_path.parent))
    except (UnsafeFileError, ValueError):
        return 0  # sending everything again changes nothing


class MetricSender(Background):
    """Thread that delivers a run to its tracker: what is stored for it, then the journal's points, at last the end.

    Args:
        journal: Journal of the run, which another process may be writing.
        sent_path: File that holds how far the journal has been sent.
        receiver: What it is delivered to.
        on_recovered: Called, in the thread, when the tracker can be reached again.
        interval_s: How often to check the journal, in seconds.
    """

    def __init__(
        self,
        journal: JournalReader,
        sent_path: Path,
        receiver: Receiver,
        on_recovered: Callable[[], None] = lambda: None,
        interval_s: float = 1.0,
    ) -> None:
        super().__init__("metric-sender", interval_s)
        self._on_recovered = on_recovered
        self._journal = journal
        self._receiver = receiver
        self._shipment = Shipment(journal, sent_path, receiver, receiver.check_owner)
        self._has_delivered = False  # once since the thread began
        self._is_ending = False
        self._thread.start()

    def pending(self) -> int:
        """Number of points that are in the journal and not sent yet."""
        return self._shipment.pending()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything that was recorded up to now is sent; return whether it is."""
        end = self._journal.size
        return self._wait_for(lambda: self._has_delivered and self._shipment.offset >= end, timeout_s)

    def finish(self, timeout_s: float) -> bool:
        """Deliver how the run ended, after everything else; return whether that is done."""
        self._is_ending = True
        return self._wait_for(lambda: self._shipment.is_complete and not self._receiver.is_behind, timeout_s)

    def close(self) -> None:
        """End the thread, without waiting for a batch in progress; what is not sent stays in the journal."""
        self._shipment.is_cancelled.set()
        self._stop()

    def _work(self) -> None:
        self._receiver.deliver()
        self._has_delivered = True
        self._shipment.send()
        if self._is_ending and self._shipment.is_complete:
            self._receiver.deliver_end()
        self._progressed()

    def _log_failing(self, error: BaseException) -> None:
        reason = str(error) if isinstance(error, TrackerError) else repr(error)
        _LOGGER.warning("Metrics cannot be sent for now (they are in the journal, training continues): %s", reason)

    def _log_recovered(self) -> None:
        _LOGGER.warning("The tracker can be reached again, and all metrics are sent")
        self._on_recovered()
