"""A simulated disk: records the order in which a process changes a folder, and what a power cut would leave of it.

POSIX promises little. What a file holds is safe once ``fsync`` has been called for it; that it has its name, once it
has been called for the folder. Whatever came after may survive as well, or not, or the name without the content. So a
``Disk`` has two views of every file and folder, its current state and that of its last ``fsync``, and derives what
would be found after a cut at this moment.
"""

import builtins
import io
import itertools
import os
import signal
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from zlib import crc32

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

_open, _close, _fstat, _readlink = os.open, os.close, os.fstat, os.readlink
_CHANGES_NAMES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink")
_CHANGES_CONTENTS = ("write", "pwrite", "ftruncate")
_WRITES = os.O_WRONLY | os.O_RDWR


class Step(NamedTuple):
    """One operation: ``open`` to write, ``read``, ``write``, ``fsync``, ``rename``, ``unlink`` ..., on paths below the
    folder."""

    what: str
    path: str
    target: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.what, self.path, self.target and f"to {self.target}") if part)


class _Node:
    """An open file or folder: it can be moved, and its inode number is not reused."""

    def __init__(self, path: str | Path) -> None:
        self.descriptor = _open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.link = f"/proc/self/fd/{self.descriptor}"
        self.is_folder = stat.S_ISDIR(_fstat(self.descriptor).st_mode)
        self.synced: Any = {} if self.is_folder else b""


class Disk:
    """Watches what this process does below a folder, in all its threads, while it is entered.

    Real ``fsync`` calls are skipped, because this disk need not survive anything.

    Args:
        folder: What is there when it is entered counts as synced.
        before: Called before every operation with that; a cut here finds all operations before it.

    Attributes:
        log: The operations so far.
    """

    def __init__(self, folder: Path, before: Callable[[Step], None] = lambda step: None) -> None:
        self.folder = folder.resolve()
        self.before = before
        self.log: list[Step] = []
        self._nodes: dict[tuple[int, int], _Node] = {}
        self._lock = threading.RLock()
        self._is_busy = False
        self._pid = os.getpid()
        self._patches = ExitStack()

    def __enter__(self) -> "Disk":
        self._sync_all(self._node(self.folder))
        patch = self._patches.enter_context
        for name in _CHANGES_NAMES:
            patch(mock.patch.object(os, name, self._watch_name(name, getattr(os, name))))
        for name in _CHANGES_CONTENTS:
            patch(mock.patch.object(os, name, self._watch_descriptor(name, getattr(os, name))))
        patch(mock.patch.object(os, "fsync", self._fsync))
        patch(mock.patch.object(os, "fdatasync", self._fsync))
        patch(mock.patch.object(os, "open", self._watch_os_open))
        for module in (builtins, io):
            patch(mock.patch.object(module, "open", self._watch_open))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()
        for node in self._nodes.values():
            _close(node.descriptor)
        self._nodes.clear()

    def after_cut(self, survival: Survival) -> Tree:
        """Return what a power cut at this moment would leave."""
        with self._lock:
            was_busy, self._is_busy = self._is_busy, True
            try:
                return dict(self._below(self._node(self.folder), "", survival))
            finally:
                self._is_busy = was_busy

    def after_all_cuts(self) -> dict[str, Tree]:
        """Return what a power cut at this moment would leave, for each of ``SURVIVALS``."""
        return {name: self.after_cut(survival) for name, survival in SURVIVALS.items()}

    def unsynced(self, path: str = "") -> list[str]:
        """Return what a power cut at this moment could change, at or below a path."""
        now, synced = self.after_cut(lambda path, is_folder: 1), self.after_cut(lambda path, is_folder: 0)
        wrong = [key for key in now.keys() | synced.keys() if now.get(key, 0) != synced.get(key, 0)]
        return sorted(key for key in wrong if not path or key == path or key.startswith(f"{path}/"))

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

    def _step(self, what: str, path: str, target: str = "") -> None:
        step = Step(what, path, target)
        self._is_busy = True
        try:
            self.before(step)
            self.log.append(step)
        finally:
            self._is_busy = False

    def _inside(self, path: Any, folder: int | None = None) -> str | None:
        """Return a path below the folder, None for one elsewhere."""
        if isinstance(path, int):
            with suppress(OSError):
                return self._inside(_readlink(f"/proc/self/fd/{path}"))
            return None
        text = os.fsdecode(path)
        if not os.path.isabs(text):
            text = os.path.join(os.getcwd() if folder is None else _readlink(f"/proc/self/fd/{folder}"), text)
        text, root = os.path.normpath(text), str(self.folder)
        return text[len(root) + 1 :] if text == root or text.startswith(f"{root}/") else None

    def _is_watching(self) -> bool:
        return not self._is_busy and os.getpid() == self._pid

    def _watch_name(self, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *given: Any, dir_fd: int | None = None, **options: Any) -> Any:
            options |= {} if dir_fd is None else {"dir_fd": dir_fd}
            with self._lock:
                inside = self._inside(path, dir_fd) if self._is_watching() else None
                if inside is not None:
                    has_target = what in ("rename", "replace", "link") and given
                    self._step(_NAMES.get(what, what), inside, (self._inside(given[0]) or "") if has_target else "")
                return real(path, *given, **options)

        return call

    def _watch_descriptor(self, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *given: Any) -> Any:
            with self._lock:
                inside = self._inside(descriptor) if self._is_watching() else None
                if inside is not None:
                    self._step(_NAMES.get(what, what), inside)
                return real(descriptor, *given)

        return call

    def _fsync(self, file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        with self._lock:
            inside = self._inside(descriptor) if self._is_watching() else None
            if inside is not None:
                self._step("fsync", inside)
                node = self._node_of(descriptor)
                node.synced = self._entries(node) if node.is_folder else _content(node)

    def _node_of(self, descriptor: int) -> _Node:
        status = _fstat(descriptor)
        known = self._nodes.get((status.st_dev, status.st_ino))
        return known or self._node(_readlink(f"/proc/self/fd/{descriptor}"))

    def _watch_os_open(self, path: Any, flags: int, *given: Any, dir_fd: int | None = None, **options: Any) -> int:
        options |= {} if dir_fd is None else {"dir_fd": dir_fd}
        self._note_open(path, bool(flags & _WRITES), dir_fd)
        return _open(path, flags, *given, **options)

    def _watch_open(self, file: Any, mode: str = "r", *given: Any, **options: Any) -> Any:
        self._note_open(file, bool(set(mode) & set("wax+")))
        return _io_open(file, mode, *given, **options)

    def _note_open(self, path: Any, is_written: bool, folder: int | None = None) -> None:
        if isinstance(path, int):
            return
        with self._lock:
            inside = self._inside(path, folder) if self._is_watching() else None
            if inside is not None and not os.path.isdir(self.folder / inside):
                self._step("open" if is_written else "read", inside)


_NAMES = {"replace": "rename", "remove": "unlink", "pwrite": "write", "ftruncate": "truncate"}
_io_open = io.open


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


def cut_power(folder: Path, target: Path, at: Sequence[int], is_killed: bool = False) -> None:
    """Make this process write what power cuts during its n-th operations would leave, each with another survival.

    Args:
        folder: What the disk holds.
        target: Gets a folder ``n`` for each.
        at: The numbers n, from 0.
        is_killed: Whether the first one ends the process.
    """
    ways, count = list(SURVIVALS.values()), itertools.count()

    def cut(step: Step) -> None:
        if (number := next(count)) in at:
            write_tree(disk.after_cut(ways[number % len(ways)]), target / str(number))
            if is_killed:
                os.kill(os.getpid(), signal.SIGKILL)

    folder.mkdir(exist_ok=True)
    disk = Disk(folder, cut).__enter__()
