"""The journal of a run: every metric point, on disk before it is sent anywhere."""

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from ksuit_runner.durable_files import make_folder, sync
from ksuit_runner.stored_files import open_stored, open_to_read

_LOGGER = logging.getLogger(__name__)
_HEAD = len(b'{"c":"01234567",')  # a line starts with the checksum of what follows it


class Point(NamedTuple):
    """One value of one metric.

    Attributes:
        key: Name of the metric.
        value: Its value, NaN and infinities included.
        step: Update at which it was logged.
        timestamp: When it was first logged, in ms since 1970. It is part of the point's identity, so it never changes.
    """

    key: str
    value: float
    step: int
    timestamp: int


class Journal:
    """Append-only file of metric points: one checked line of JSON per flush.

    Opening an existing file cuts it after its last good line: what a killed process left half written is dropped
    (its update is computed again after a resume).

    What a full disk does not take stays in memory and is written, in its order, as soon as there is room again.

    Args:
        path: The file; it is created, with its folder, if it does not exist.

    Attributes:
        size: Size of the file in bytes, always at the end of a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)
        self._file = open_stored(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        sync(path.parent)
        self._unwritten: list[bytes] = []
        self._lock = threading.Lock()  # training appends, and the threads behind it wait for the disk
        self.size = self._repair()

    def append(self, step: int, metrics: Mapping[str, float], timestamp: int | None = None) -> None:
        """Write the metrics of one update.

        Args:
            step: The update.
            metrics: Values by key; with none, nothing is written.
            timestamp: In ms since 1970, for points that were first logged elsewhere; by default now.
        """
        if not metrics:
            return
        timestamp = time.time_ns() // 1_000_000 if timestamp is None else timestamp
        self._unwritten.append(_encode(step, timestamp, metrics))
        was_full = len(self._unwritten) > 1
        try:
            self._write()
        except OSError as error:
            if not was_full:
                _LOGGER.error("metrics cannot be written and are kept in memory meanwhile: %s: %s", self.path, error)
        else:
            if was_full:
                _LOGGER.warning("metrics can be written again, none is missing: %s", self.path)

    def sync(self) -> None:
        """Wait until everything appended is on the disk.

        Raises:
            OSError: It cannot be written.
        """
        self._write()
        os.fsync(self._file)

    def read(self, offset: int = 0) -> Iterator[tuple[list[Point], int]]:
        """Go through the lines from a position on: the points of a line, and the position after it.

        Args:
            offset: Position in bytes: 0 or one that this method returned.
        """
        return _read(self.path, offset, self.size)

    def load_after(self, step: int) -> dict[int, dict[str, Point]]:
        """Return all points of later steps, by step and key: what a run that resumes at ``step`` has logged."""
        found: dict[int, dict[str, Point]] = {}
        for points, _ in self.read():
            if points[0].step > step:
                found.setdefault(points[0].step, {}).update((point.key, point) for point in points)
        return found

    def copy_until(self, other: Path, step: int) -> None:
        """Append all points of another run's journal up to and including a step; that file is only read."""
        for points, _ in _read(other, 0, other.stat().st_size):
            if points[0].step <= step:
                self.append(points[0].step, {point.key: point.value for point in points}, points[0].timestamp)

    def is_boundary(self, offset: int) -> bool:
        """Whether a position is the start of a line, or the end of the file."""
        return offset == 0 or (0 < offset <= self.size and os.pread(self._file, 1, offset - 1) == b"\n")

    def close(self) -> None:
        """Close the file; what it holds can still be read."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self) -> None:
        with self._lock:
            while self._unwritten:
                line = self._unwritten[0]
                # A single write: another process that reads along sees whole lines, and a killed one leaves at most one
                # torn.
                written = os.write(self._file, line)
                if written != len(line):
                    os.ftruncate(self._file, self.size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.size += written
                del self._unwritten[0]

    def _repair(self) -> int:
        size = os.fstat(self._file).st_size
        good = 0
        with open_to_read(self.path) as file:
            for line in file:
                if not _is_good(line):
                    break
                good += len(line)
            torn = len(line) if good < size else 0
        if good < size:
            os.ftruncate(self._file, good)
            if good + torn < size:
                _LOGGER.warning("%s is damaged: the metrics after byte %d are dropped", self.path, good)
        return good


def read_points(path: Path) -> Iterator[Point]:
    """Yield the points of a journal, which may be another process's to write; it is only read."""
    for points, _ in _read(path, 0, path.stat().st_size):
        yield from points


def _encode(step: int, timestamp: int, metrics: Mapping[str, float]) -> bytes:
    payload = json.dumps({"s": step, "t": timestamp, "m": metrics}, separators=(",", ":")).encode()[1:]
    return b'{"c":"%08x",%s\n' % (crc32(payload), payload)


def _is_good(line: bytes) -> bool:
    return line.endswith(b"}\n") and line[:_HEAD] == b'{"c":"%08x",' % crc32(line[_HEAD:-1])


def _read(path: Path, offset: int, end: int) -> Iterator[tuple[list[Point], int]]:
    with open_to_read(path) as file:
        file.seek(offset)
        for line in file:
            offset += len(line)
            if offset > end or not _is_good(line):
                return
            entry: dict[str, Any] = json.loads(line)
            yield [Point(key, value, entry["s"], entry["t"]) for key, value in entry["m"].items()], offset
