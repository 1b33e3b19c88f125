"""Keeps a checkpoint from being removed by its run, which is going on, while another process reads it."""

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ksuit_runner.system.lock_file import try_lock

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class Hold:
    """A lock on the folder of a checkpoint, which ends with this object or this process; several may hold one.

    Where the file system has no locks, nothing is held.

    Args:
        folder: The folder.

    Attributes:
        release: Ends it.
    """

    def __init__(self, folder: Path) -> None:
        file = _open(folder)
        self.release = weakref.finalize(self, _close, file)
        if file is not None:
            with suppress(OSError):
                try_lock(file, fcntl.LOCK_SH)


@contextmanager
def removing(folder: Path) -> Iterator[bool]:
    """Yield whether nobody holds a checkpoint; nobody can until the end of the block, in which it may be removed."""
    file = _open(folder)
    try:
        is_free = True
        with suppress(OSError):
            is_free = file is None or try_lock(file)
        yield is_free
    finally:
        _close(file)


def _open(folder: Path) -> int | None:
    try:
        return os.open(folder, _FOLDER)
    except OSError:  # it is gone
        return None


def _close(file: int | None) -> None:
    if file is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # also for processes that were forked meanwhile
        os.close(file)
