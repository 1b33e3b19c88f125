"""The journal of a run: every metric point is on disk before it is sent anywhere."""

import errno
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from ksuit_runner.record.point import Point, now
from ksuit_runner.system.atomic_files import make_folder, sync
from ksuit_runner.system.untrusted_files import open_stored, open_to_read

_LOGGER = logging.getLogger(__name__)
_HEAD = len(b'{"c":"01234567",')  # a line starts with the checksum of what follows it
_HEAD_PATTERN = re.compile(rb'\{"c":"[0-9a-f]{8}",')
_LONGEST_LINE = 1 << 26  # in bytes; anything longer is not a line of a journal
_INTEGER_LIMIT = 1 << 63
_CHUNK = 1 << 16  # in bytes, of what is read at once to look for the last line


class JournalReader:
    """Reads a journal that another process may be writing to; the file is never repaired, cut or held open.

    Args:
        path: The file. It may be replaced by a copy at any time, as whoever takes a run over does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Position after the last whole line that the file has now, in bytes; 0 if there is no file."""
        try:
            with open_to_read(self.path) as file:
                return _end_of_last_line(file)
        except FileNotFoundError:
            return 0

    def sync(self) -> None:
        """Wait until everything that is in the file is on the disk.

        Raises:
            OSError: It cannot be written.
        """
        with suppress(FileNotFoundError), open_to_read(self.path) as file:  # nothing was logged yet
            os.fsync(file)

    def read(self, offset: int = 0, end: int | None = None) -> Iterator[tuple[list[Point], int]]:
        """Yield the points of each whole line from a position on, with the position after it.

        Args:
            offset: Position in bytes: 0 or one that this method returned.
            end: A ``size``, where reading ends; by default what it is now.
        """
        end = self.size if end is None else end
        return _read(self.path, offset, end) if offset < end else iter(())

    def is_boundary(self, offset: int) -> bool:
        """Whether a position is the start of a line, or the end of the last whole one."""
        size = self.size
        if not 0 < offset < size:
            return offset in (0, size)
        with open_to_read(self.path) as file:
            return os.pread(file.fileno(), 1, offset - 1) == b"\n"


class Journal(JournalReader):
    """Append-only file of metric points: one checked line of JSON per flush.

    Opening an existing file cuts off a last line that a killed process left half written (its update is computed again
    after a resume). A damaged line is skipped; all others are read.

    What a full disk does not take stays in memory and is written, in order, as soon as there is room again.

    Args:
        path: The file; it is created, with its folder, if it does not exist.
        check_owner: Raises an error if the run is no longer this process's to write; called before every write.

    Attributes:
        damaged: Number of damaged lines that were found when it was opened.
    """

    def __init__(self, path: Path, check_owner: Callable[[], None] = lambda: None) -> None:
        super().__init__(path)
        self.check_owner = check_owner
        make_folder(path.parent)
        self._file = open_stored(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        sync(path.parent)
        self._unwritten: list[bytes] = []
        self._lock = threading.Lock()  # training appends, and the threads behind it wait for the disk
        self._end, self.damaged = self._repair()

    def append(self, step: int, metrics: Mapping[str, float], timestamp: int | None = None) -> None:
        """Write the metrics of one update.

        Args:
            step: The update.
            metrics: Values by key; if empty, nothing is written.
            timestamp: In ms since 1970, for points that were first logged elsewhere; by default now.
        """
        if not metrics:
            return
        timestamp = now() if timestamp is None else timestamp
        self._unwritten.append(_encode(step, timestamp, metrics))
        was_full = len(self._unwritten) > 1
        try:
            self.write_rest()
        except OSError as error:
            if not was_full:
                _LOGGER.error("metrics cannot be written, and stay in memory for now: %s: %s", self.path, error)
        else:
            if was_full:
                _LOGGER.warning("metrics can be written again, and none is missing: %s", self.path)

    def write_rest(self) -> None:
        """Write what a full disk did not take, without waiting until it is on the disk.

        Raises:
            OSError: It cannot be written.
        """
        with self._lock:
            if self._unwritten:
                self.check_owner()
            while self._unwritten:
                line = self._unwritten[0]
                # A single write: another process that is reading sees whole lines, and a killed one leaves at most one
                # torn line.
                written = os.write(self._file, line)
                if written != len(line):
                    os.ftruncate(self._file, self._end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._end += written
                del self._unwritten[0]

    def sync(self) -> None:
        """Wait until everything appended is on the disk.

        Raises:
            OSError: It cannot be written.
        """
        self.write_rest()
        os.fsync(self._file)

    def load_after(self, step: int) -> dict[int, dict[str, Point]]:
        """Return all points of later steps, by step and key: what a run that resumes at ``step`` has logged."""
        found: dict[int, dict[str, Point]] = {}
        for points, _ in self.read():
            if (at := points[0].step) > step:
                found.setdefault(at, {}).update((point.key, point) for point in points)
        return found

    def copy_until(self, other: Path, step: int) -> None:
        """Append all points of another run's journal up to and including a step; that file is only read."""
        for points, _ in _read(other, 0, other.stat().st_size):
            _, _, at, timestamp = points[0]
            if at <= step:
                self.append(at, {point.key: point.value for point in points}, timestamp)

    def close(self) -> None:
        """Close the file; what it holds can still be read."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _repair(self) -> tuple[int, int]:
        whole, damaged = _scan(self.path)
        if whole < os.fstat(self._file).st_size:
            os.ftruncate(self._file, whole)
        if damaged:
            _LOGGER.warning("%s: damaged lines: %d, the first at byte %d", self.path, len(damaged), damaged[0])
        return whole, len(damaged)


def read_points(path: Path) -> Iterator[Point]:
    """Yield the points of a journal, which may be another process's to write; it is only read."""
    for points, _ in _read(path, 0, path.stat().st_size):
        yield from points


def _encode(step: int, timestamp: int, metrics: Mapping[str, float]) -> bytes:
    payload = json.dumps({"s": step, "t": timestamp, "m": metrics}, separators=(",", ":")).encode()[1:]
    return b'{"c":"%08x",%s\n' % (crc32(payload), payload)


def is_damaged(path: Path) -> bool:
    """Whether a journal, which may be another process's to write, is missing or has damaged lines; it is only read."""
    return not path.exists() or bool(_scan(path)[1])


def _scan(path: Path) -> tuple[int, list[int]]:
    """Return where a journal's last whole line ends, and where its damaged lines begin."""
    whole, damaged = 0, []
    with open_to_read(path) as file:
        for line in _lines(file):
            is_good = _is_good(line) and bool(_points(line))
            if not line.endswith(b"\n") and not is_good:
                break  # torn
            if not (is_good and line.endswith(b"\n")):
                damaged.append(whole)
            whole += len(line)
    return whole, damaged


def _end_of_last_line(file: BinaryIO) -> int:
    """Return where the last whole line ends; one whose newline alone is damaged is whole, as for ``_scan``."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _CHUNK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.seek(end)
        rest = file.read(min(size - end, _LONGEST_LINE))
        if _is_good(rest) and _points(rest):
            return end + len(rest)
    return end


def _read(path: Path, offset: int, end: int) -> Iterator[tuple[list[Point], int]]:
    with open_to_read(path) as file:
        file.seek(offset)
        for line in _lines(file):
            start, offset = offset, offset + len(line)
            if offset > end:
                return
            *first, last = _decode(line) or [[]]
            yield from ((points, start) for points in first)  # the position advances when all of the line is sent
            if last:
                yield last, offset


def _lines(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.readline(_LONGEST_LINE), b"")


def _decode(line: bytes) -> list[list[Point]]:
    """Return the points of a line. A damaged one may be two lines, the newline between them damaged."""
    starts = [0] if _is_good(line) else [match.start() for match in _HEAD_PATTERN.finditer(line)]
    parts = [line[start:end] for start, end in pairwise([*starts, len(line)])]
    return [points for part in parts if _is_good(part) and (points := _points(part))]


def _is_good(line: bytes) -> bool:
    return line[:_HEAD] == b'{"c":"%08x",' % crc32(line[_HEAD:-1])


def _points(line: bytes) -> list[Point]:
    """Return the points of a line whose checksum is right, which anybody can compute: none if they are invalid."""
    try:
        entry: Any = json.loads(line[:-1])
        step, timestamp, metrics = entry["s"], entry["t"], entry["m"]
        points = [Point(key, float(value), step, timestamp) for key, value in metrics.items()]
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return []
    is_sensible = all(type(number) is int and abs(number) < _INTEGER_LIMIT for number in (step, timestamp))
    return points if is_sensible and all(type(value) in (float, int) for value in metrics.values()) else []
