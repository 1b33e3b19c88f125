"""The journal of a run: everything that is logged is on disk before it is sent anywhere."""

import errno
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import msgspec

from ksuit_runner.record.point import LoggedFile, Point, now
from ksuit_runner.system.atomic_files import make_folder, sync, write_bytes
from ksuit_runner.system.untrusted_files import is_below, open_stored, open_to_read

_LOGGER = logging.getLogger(__name__)
_QUICK = msgspec.json.Encoder()  # not for infinities, NaN and halves of surrogate pairs
_JSON = json.JSONEncoder(separators=(",", ":"))
_HEAD = len(b'{"c":"01234567",')  # a line starts with the checksum of what follows it
_HEAD_PATTERN = re.compile(rb'\{"c":"[0-9a-f]{8}",')
_LONGEST_LINE = 1 << 26  # in bytes; anything longer is not a line of a journal
_INTEGER_LIMIT = 1 << 63
_CHUNK = 1 << 16  # in bytes, of what is read at once to look for the last line


class Line(NamedTuple):
    """What a line of a journal holds: what was logged at one update, at least one point or file."""

    step: int
    points: list[Point]
    files: list[LoggedFile]


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
        """Yield the points of each whole line from a position on, with the position after it; see ``lines``."""
        return ((line.points, position) for line, position in self.lines(offset, end))

    def lines(self, offset: int = 0, end: int | None = None) -> Iterator[tuple[Line, int]]:
        """Yield each whole line from a position on, with the position after it.

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
    """Append-only file of metric points and of the names of logged files: one checked line of JSON per flush.

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
        self._unwritten: list[tuple[Mapping[Path, bytes], bytes]] = []
        self._lock = threading.Lock()  # training appends, and the threads behind it wait for the disk
        self._end, self.damaged = self._repair()

    def append(
        self,
        step: int,
        metrics: Mapping[str, float],
        timestamp: int | None = None,
        files: Mapping[str, str] | None = None,
        contents: Mapping[Path, bytes] | None = None,
    ) -> None:
        """Write what was logged at one update.

        Args:
            step: The update.
            metrics: Values by key. If there are neither metrics nor contents, nothing is written.
            timestamp: In ms since 1970, for points that were first logged elsewhere; by default now.
            files: Paths of logged files by key, as ``LoggedFile`` has them.
            contents: What is written before the line, and is on the disk then: the contents of files.
        """
        if not (metrics or files or contents):
            return
        timestamp = now() if timestamp is None else timestamp
        line = _encode(step, timestamp, metrics, files or {}) if metrics or files else b""
        self._unwritten.append((contents or {}, line))
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
                contents, line = self._unwritten[0]
                for path, content in contents.items():
                    make_folder(path.parent)
                    write_bytes(path, content)
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

    def load_after(self, step: int) -> dict[int, dict[str, Point | LoggedFile]]:
        """Return what a run that resumes at ``step`` has logged at later ones: by step, and by key or path of file."""
        found: dict[int, dict[str, Point | LoggedFile]] = {}
        for line, _ in self.lines():
            if line.step > step:
                known = found.setdefault(line.step, {})
                known.update((point.key, point) for point in line.points)
                known.update((file.path, file) for file in line.files)
        return found

    def copy_until(self, other: Path, step: int) -> None:
        """Append all points of another run's journal up to and including a step; that file is only read."""
        for line, _ in _read(other, 0, other.stat().st_size):
            if line.points and line.step <= step:
                self.append(line.step, {point.key: point.value for point in line.points}, line.points[0].timestamp)

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


class SilentJournal(Journal):
    """The journal of a run that another rank records: it can be read, and what is appended is recorded there."""

    def __init__(self, path: Path) -> None:
        JournalReader.__init__(self, path)

    def append(
        self,
        step: int,
        metrics: Mapping[str, float],
        timestamp: int | None = None,
        files: Mapping[str, str] | None = None,
        contents: Mapping[Path, bytes] | None = None,
    ) -> None:
        """Do nothing."""

    def write_rest(self) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def load_after(self, step: int) -> dict[int, dict[str, Point | LoggedFile]]:
        """Return nothing: only who writes has to know what is written already."""
        return {}

    def close(self) -> None:
        """Do nothing."""


def read_points(path: Path) -> Iterator[Point]:
    """Yield the points of a journal, which may be another process's to write; it is only read."""
    for line, _ in _read(path, 0, path.stat().st_size):
        yield from line.points


def last_logged(path: Path) -> int | None:
    """Return when training last logged something into a journal, in ms since 1970; None if it never has.

    What an evaluation has added since is of that update or an earlier one. The file is only read: it may be a copy,
    whose own time says nothing.
    """
    lines = _read(path, 0, path.stat().st_size) if path.is_file() else ()
    logged = ((line.step, (line.points or line.files)[0].timestamp) for line, _ in lines)
    last = max(logged, key=lambda when: (when[0], -when[1]), default=None)
    return None if last is None else last[1]


def _encode(step: int, timestamp: int, metrics: Mapping[str, float], files: Mapping[str, str]) -> bytes:
    entry = {"s": step, "t": timestamp, "m": metrics, **({"f": files} if files else {})}
    payload = b""
    if all(map(isfinite, metrics.values())):
        with suppress(UnicodeEncodeError):
            payload = _QUICK.encode(entry)[1:]
    payload = payload or _JSON.encode(entry).encode()[1:]
    return b'{"c":"%08x",%s\n' % (crc32(payload), payload)


def is_damaged(path: Path) -> bool:
    """Whether a journal, which may be another process's to write, is missing or has damaged lines; it is only read."""
    return not path.exists() or bool(_scan(path)[1])


def _scan(path: Path) -> tuple[int, list[int]]:
    """Return where a journal's last whole line ends, and where its damaged lines begin."""
    whole, damaged = 0, []
    with open_to_read(path) as file:
        for line in _lines(file):
            is_good = _is_good(line) and _content(line) is not None
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
        if _is_good(rest) and _content(rest) is not None:
            return end + len(rest)
    return end


def _read(path: Path, offset: int, end: int) -> Iterator[tuple[Line, int]]:
    with open_to_read(path) as file:
        file.seek(offset)
        for line in _lines(file):
            start, offset = offset, offset + len(line)
            if offset > end:
                return
            parts = _decode(line)
            yield from ((part, start) for part in parts[:-1])  # the position advances when all of the line is sent
            yield from ((part, offset) for part in parts[-1:])


def _lines(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.readline(_LONGEST_LINE), b"")


def _decode(line: bytes) -> list[Line]:
    """Return what a line holds. A damaged one may be two lines, the newline between them damaged."""
    starts = [0] if _is_good(line) else [match.start() for match in _HEAD_PATTERN.finditer(line)]
    parts = [line[start:end] for start, end in pairwise([*starts, len(line)])]
    return [content for part in parts if _is_good(part) and (content := _content(part))]


def _is_good(line: bytes) -> bool:
    return line[:_HEAD] == b'{"c":"%08x",' % crc32(line[_HEAD:-1])


def _content(line: bytes) -> Line | None:
    """Return the content of a line whose checksum is right, which anybody can compute: none if it is invalid."""
    try:
        entry: Any = json.loads(line[:-1])
        step, timestamp, metrics, paths = entry["s"], entry["t"], entry["m"], entry.get("f", {})
        points = [Point(key, float(value), step, timestamp) for key, value in metrics.items()]
        files = [LoggedFile(key, path, step, timestamp) for key, path in paths.items()]
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return None
    is_sensible = (
        all(type(number) is int and abs(number) < _INTEGER_LIMIT for number in (step, timestamp))
        and all(type(value) in (float, int) for value in metrics.values())
        and all(isinstance(file.path, str) and is_below(file.path) for file in files)
    )
    return Line(step, points, files) if is_sensible and (points or files) else None
