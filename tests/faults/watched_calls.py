"""Reports what this process is about to do below a folder: to a disk in this process, or to one in another process."""

import builtins
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, NamedTuple, Protocol

_DISK, _FOLDER = "KSUIT_TEST_DISK", "KSUIT_TEST_DISK_FOLDER"
_INJECTED = str(Path(__file__).with_name("injected"))

_CHANGES_NAMES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink")
_CHANGES_CONTENTS = ("write", "pwrite", "ftruncate")
_HAS_TARGET = ("rename", "replace", "link")
_NAMES = {"replace": "rename", "remove": "unlink", "pwrite": "write", "ftruncate": "truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR

Inode = tuple[int, int]


class Step(NamedTuple):
    """One operation: ``open`` to write, ``read``, ``write``, ``fsync``, ``rename``, ``unlink`` ..., on paths below the
    folder.

    Attributes:
        what: The kind.
        path: What it is done to.
        target: The new name.
        process: ``training`` or ``recorder``; empty for the process of the disk.
    """

    what: str
    path: str
    target: str = ""
    process: str = ""

    def __str__(self) -> str:
        by = self.process and f"{self.process}:"
        return " ".join(part for part in (by, self.what, self.path, self.target and f"to {self.target}") if part)


class Reporter(Protocol):
    """Who is told of every operation, and decides when it happens."""

    def operation(self, step: Step, inode: Inode | None = None) -> AbstractContextManager[None]:
        """Return the block in which the operation happens."""


class WatchedCalls:
    """Replaces the functions that change files in this process, while it is entered, but not in forked children.

    Args:
        folder: Where changes are reported.
        reporter: Who is told.
        process: Name of this process.
    """

    def __init__(self, folder: Path, reporter: Reporter, process: str = "") -> None:
        self._root = str(folder)
        self._reporter = reporter
        self._process = process
        self._pid = os.getpid()
        self._real: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        for name in _CHANGES_NAMES:
            self._replace(os, name, self._name_changer(name, getattr(os, name)))
        for name in _CHANGES_CONTENTS:
            self._replace(os, name, self._content_changer(name, getattr(os, name)))
        for name in ("fsync", "fdatasync"):
            self._replace(os, name, self._fsync(getattr(os, name)))
        self._replace(os, "open", self._os_opener(os.open))
        for module in (builtins, io):
            self._replace(module, "open", self._opener(io.open))

    def __exit__(self, *_: object) -> None:
        while self._real:
            setattr(*self._real.pop())

    def _replace(self, module: Any, name: str, function: Callable[..., Any]) -> None:
        self._real.append((module, name, getattr(module, name)))
        setattr(module, name, function)

    @contextmanager
    def _step(self, what: str, path: str | None, target: str = "", inode: Inode | None = None) -> Iterator[None]:
        if path is None:
            yield
            return
        with self._reporter.operation(Step(_NAMES.get(what, what), path, target, self._process), inode):
            yield

    def _inside(self, path: Any, folder: int | None = None) -> str | None:
        """Return a path below the folder, None for one elsewhere."""
        if os.getpid() != self._pid:
            return None
        if isinstance(path, int):
            with suppress(OSError):
                return self._inside(os.readlink(f"/proc/self/fd/{path}"))
            return None
        text = os.fsdecode(path)
        if not os.path.isabs(text):
            text = os.path.join(os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}"), text)
        text, root = os.path.normpath(text), self._root
        return text[len(root) + 1 :] if text == root or text.startswith(f"{root}/") else None

    def _name_changer(self, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *given: Any, dir_fd: int | None = None, **options: Any) -> Any:
            options |= {} if dir_fd is None else {"dir_fd": dir_fd}
            target = (self._inside(given[0]) or "") if what in _HAS_TARGET and given else ""
            with self._step(what, self._inside(path, dir_fd), target):
                return real(path, *given, **options)

        return call

    def _content_changer(self, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *given: Any) -> Any:
            with self._step(what, self._inside(descriptor)):
                return real(descriptor, *given)

        return call

    def _fsync(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any) -> None:
            descriptor = file if isinstance(file, int) else file.fileno()
            if (inside := self._inside(descriptor)) is None:
                real(descriptor)
                return
            found = os.fstat(descriptor)
            with self._step("fsync", inside, inode=(found.st_dev, found.st_ino)):
                pass  # the simulated disk keeps it

        return call

    def _os_opener(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *given: Any, dir_fd: int | None = None, **options: Any) -> int:
            options |= {} if dir_fd is None else {"dir_fd": dir_fd}
            with self._opening(path, bool(flags & _WRITES), dir_fd):
                return real(path, flags, *given, **options)

        return call

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *given: Any, **options: Any) -> Any:
            with self._opening(file, bool(set(mode) & set("wax+"))):
                return real(file, mode, *given, **options)

        return call

    def _opening(self, path: Any, is_written: bool, folder: int | None = None) -> AbstractContextManager[None]:
        inside = None if isinstance(path, int) else self._inside(path, folder)
        is_folder = inside is not None and os.path.isdir(os.path.join(self._root, inside))
        return self._step("open" if is_written else "read", None if is_folder else inside)


class _RemoteDisk:
    """A disk in another process."""

    def __init__(self, address: str, process: str) -> None:
        self._connection = Client(address)
        self._connection.send((os.getpid(), process))
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._connection.close)  # the disk waits for the last copy

    @contextmanager
    def operation(self, step: Step, inode: Inode | None = None) -> Iterator[None]:
        with self._lock:
            is_there = self._ask((step, inode))
            try:
                yield
            finally:
                if is_there:
                    self._tell(True)

    def _ask(self, message: object) -> bool:
        """Wait until the disk permits something; return whether it is there: the test may be over."""
        with suppress(EOFError):
            if self._tell(message):
                return bool(self._connection.recv())
        return False

    def _tell(self, message: object) -> bool:
        with suppress(OSError):
            self._connection.send(message)
            return True
        return False


def environment(address: str, folder: Path) -> dict[str, str]:
    """Return the environment variables with which a process of the command line joins a disk."""
    return {_DISK: address, _FOLDER: str(folder), "PYTHONPATH": os.pathsep.join([_INJECTED, *sys.path])}


def join(variables: Mapping[str, str], process: str) -> None:
    """Have this process, which has begun already, join a disk under a name."""
    os.environ.update(variables)
    _join(process)


def join_at_start() -> None:
    """Have this process join the disk that its environment names, if it is one of the command line."""
    processes = {"ksuit_runner": "training", "ksuit_runner.recorder": "recorder"}  # python -m ...
    if _DISK in os.environ and (found := processes.keys() & set(sys.orig_argv)):
        _join(processes[found.pop()])


def _join(process: str) -> None:
    WatchedCalls(Path(os.environ[_FOLDER]), _RemoteDisk(os.environ[_DISK], process), process).__enter__()
