"""A simulated disk: records the order in which processes change a folder, and what a power cut would leave of it.

POSIX promises little. What a file holds is safe once ``fsync`` has been called for it; that it has its name, once it
has been called for the folder. Whatever came after may survive as well, or not, or the name without the content. So a
``Disk`` has two views of every file and folder, its current state and that of its last ``fsync``, and derives what
would be found after a cut at this moment.
"""

import io
import itertools
import os
import signal
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any
from zlib import crc32

from watched_calls import Inode, Step, WatchedCalls, environment

Tree = dict[str, bytes | None]
"""What a folder holds: contents by path, None for a folder."""

Survival = Callable[[str, bool], float]
"""Maps a path, and whether it is a folder, to the share of unsynced changes that survives, from 0 to 1."""

SURVIVALS: Mapping[str, Survival] = {
    "only what was synced": lambda path, is_folder: 0,
    "names, not contents": lambda path, is_folder: is_folder,
    "contents, not names": lambda path, is_folder: not is_folder,
    "half of each": lambda path, is_folder: crc32(path.encode()) % 2 if is_folder else 0.5,
    "the other half of each": lambda path, is_folder: 1 - crc32(path.encode()) % 2 if is_folder else 0.5,
    "everything": lambda path, is_folder: 1,
}

_open, _close, _fstat, _io_open = os.open, os.close, os.fstat, io.open


class _Node:
    """An open file or folder: it can be moved, and its inode number is not reused."""

    def __init__(self, path: str | Path) -> None:
        self.descriptor = _open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.link = f"/proc/self/fd/{self.descriptor}"
        self.is_folder = stat.S_ISDIR(_fstat(self.descriptor).st_mode)
        self.synced: Any = {} if self.is_folder else b""


class Disk:
    """Watches what processes do below a folder: this one while it is entered, others that are started meanwhile.

    One operation happens at a time, in whatever process and thread. Real ``fsync`` calls are skipped, because this disk
    need not survive anything.

    Args:
        folder: What is there at the beginning counts as synced.
        before: Called before every operation with that; a cut here finds all operations before it.

    Attributes:
        log: The operations so far.
    """

    def __init__(self, folder: Path, before: Callable[[Step], None] = lambda step: None) -> None:
        self.folder = folder.resolve()
        self.before = before
        self.log: list[Step] = []
        self._nodes: dict[Inode, _Node] = {}
        self._lock = threading.RLock()
        self._is_busy = False
        self._calls = WatchedCalls(self.folder, self)
        self._processes: dict[int, str] = {}
        self._killed: tuple[str, ...] = ()
        self._is_off = False
        self._errors: list[BaseException] = []

    def __enter__(self) -> "Disk":
        self._sync_all(self._node(self.folder))
        self._calls.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.__exit__()
        self._close()

    @contextmanager
    def of_processes(self) -> Iterator[dict[str, str]]:
        """Watch all processes of the command line that are started with an environment, and their recorders.

        Returns:
            What the environment has to have.

        Raises:
            BaseException: What ``before`` has raised.
        """
        self._sync_all(self._node(self.folder))
        with Listener(family="AF_UNIX", backlog=16) as listener:
            serving: list[threading.Thread] = []
            accepting = threading.Thread(target=self._accept, args=(listener, serving), daemon=True)
            accepting.start()
            try:
                yield environment(str(listener.address), self.folder)
            except BaseException:
                self.switch_off()  # a test that fails has not waited for their end
                raise
            finally:
                with Client(listener.address) as last:
                    last.send(None)
                accepting.join()
                for thread in serving:
                    thread.join()
                self._close()
        if self._errors:
            raise self._errors[0]

    @contextmanager
    def operation(self, step: Step, inode: Inode | None = None) -> Iterator[None]:
        """Do an operation while the block runs.

        Args:
            step: The operation.
            inode: The open file or folder, for an ``fsync``.
        """
        with self._lock:
            if not self._is_busy:
                self._is_busy = True
                self._killed = ()
                try:
                    self.before(step)
                finally:
                    self._is_busy = False
                if not step.process or step.process not in self._killed:
                    self._begin(step, inode)
            yield

    def _begin(self, step: Step, inode: Inode | None) -> None:
        self.log.append(step)
        if step.what == "fsync":
            node = (inode and self._nodes.get(inode)) or self._node(self.folder / step.path)
            node.synced = self._entries(node) if node.is_folder else _content(node)

    def kill(self, *names: str) -> None:
        """Kill the other processes that are watched and have one of these names, before what they are about to do."""
        self._killed = names
        for pid, name in list(self._processes.items()):
            if name in names:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def switch_off(self) -> None:
        """Kill all other processes that are watched, also those that come later."""
        self._is_off = True
        self.kill("training", "recorder")

    def _accept(self, listener: Listener, serving: list[threading.Thread]) -> None:
        while True:
            connection = listener.accept()
            try:
                joins = connection.recv()
            except EOFError:  # it was killed at this moment
                continue
            if joins is None:
                break
            pid, name = joins
            self._processes[pid] = name
            if self._is_off:
                self.switch_off()
            serving.append(threading.Thread(target=self._serve, args=(connection, pid), daemon=True))
            serving[-1].start()

    def _serve(self, connection: Connection, pid: int) -> None:
        """Let a process do one operation after the other, until it has ended."""
        with connection, suppress(EOFError, ConnectionError):
            while True:
                step, inode = connection.recv()
                try:
                    with self.operation(step, inode):
                        connection.send(True)
                        connection.recv()
                except (EOFError, ConnectionError):
                    raise
                except BaseException as error:  # of a check: the test fails, the process need not
                    self._errors.append(error)
                    connection.send(True)
                    connection.recv()
        self._processes.pop(pid, None)

    def _close(self) -> None:
        for node in self._nodes.values():
            _close(node.descriptor)
        self._nodes.clear()

    def after_cut(self, survival: Survival) -> Tree:
        """Return what a power cut at this moment would leave."""
        return self._after_cut("", survival)

    def after_all_cuts(self) -> dict[str, Tree]:
        """Return what a power cut at this moment would leave, for each of ``SURVIVALS``."""
        return {name: self.after_cut(survival) for name, survival in SURVIVALS.items()}

    def unsynced(self, path: str = "") -> list[str]:
        """Return what a power cut at this moment could change of a file or below a folder, its own name apart."""
        now, synced = (self._after_cut(path, lambda path, is_folder, share=share: share) for share in (1, 0))
        return sorted(key for key in now.keys() | synced.keys() if now.get(key, 0) != synced.get(key, 0))

    def _after_cut(self, path: str, survival: Survival) -> Tree:
        with self._lock:
            was_busy, self._is_busy = self._is_busy, True
            try:
                node = self._node(self.folder / path)
                if node.is_folder:
                    return dict(self._below(node, path, survival))
                return {path: _torn(node.synced, _content(node), survival(path, False))}
            finally:
                self._is_busy = was_busy

    def _below(self, folder: _Node, prefix: str, survival: Survival) -> Iterator[tuple[str, bytes | None]]:
        entries = self._entries(folder) if survival(prefix, True) else folder.synced
        for name, node in sorted(entries.items()):
            path = f"{prefix}/{name}" if prefix else name
            if node.is_folder:
                yield path, None
                yield from self._below(node, path, survival)
            elif name.endswith(".db"):
                yield path, _committed(self.folder / path)
            elif not name.endswith((".db-journal", ".db-wal", ".db-shm")):
                yield path, _torn(node.synced, _content(node), survival(path, False))

    def _entries(self, folder: _Node) -> dict[str, _Node]:
        found = {}
        for entry in os.scandir(folder.link):
            if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError):  # another program's, such as SQLite's, comes and goes
                    found[entry.name] = self._node(f"{folder.link}/{entry.name}")
        return found

    def _node(self, path: str | Path) -> _Node:
        node = _Node(path)
        status = _fstat(node.descriptor)
        known = self._nodes.setdefault((status.st_dev, status.st_ino), node)
        if known is not node:
            _close(node.descriptor)
        return known

    def _sync_all(self, node: _Node) -> None:
        node.synced = self._entries(node) if node.is_folder else _content(node)
        for child in node.synced.values() if node.is_folder else ():
            self._sync_all(child)


def _content(node: _Node) -> bytes:
    with _io_open(node.link, "rb") as file:
        return file.read()


def _torn(synced: bytes, now: bytes, share: float) -> bytes:
    """Return a file's content if part of what was written since its last sync has reached the disk."""
    if not share:
        return synced
    start = len(synced) if now.startswith(synced) else 0
    return now[: start + int(share * (len(now) - start))]


def _committed(database: Path) -> bytes:
    """Return what SQLite has committed; it ensures itself that this is durable."""
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        return connection.serialize()


def write_tree(tree: Tree, folder: Path) -> None:
    """Write the content of a folder to another one."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir(exist_ok=True)
        else:
            (folder / path).write_bytes(content)


@contextmanager
def power_cuts(
    folder: Path, target: Path, at: Sequence[int], is_last: bool = False, kind: type[Disk] = Disk
) -> Iterator[tuple[Disk, dict[str, str]]]:
    """Write what power cuts during n-th operations of processes would leave, each with another survival.

    Args:
        folder: What the disk holds.
        target: Gets a folder ``n`` for each.
        at: The numbers n, from 0.
        is_last: Whether the first one ends the processes.
        kind: Class of the disk.

    Returns:
        The disk, and what the environment of the processes has to have.
    """
    ways, count = list(SURVIVALS.values()), itertools.count()

    def cut(step: Step) -> None:
        if (number := next(count)) in at:
            write_tree(disk.after_cut(ways[number % len(ways)]), target / str(number))
            if is_last:
                disk.switch_off()

    folder.mkdir(exist_ok=True)
    disk = kind(folder, cut)
    with disk.of_processes() as variables:
        yield disk, variables
