"""Files and folders that are whole after a crash: as before or as written, never something between."""

import errno
import os
import shutil
from pathlib import Path
from typing import TextIO

from ksuit_runner.system.untrusted_files import open_stored, open_to_read


def write_text(path: Path, text: str) -> None:
    """Replace a small file: after a crash it has the old content or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open_new(temporary) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk it would take up room
        raise
    sync(path.parent)


def commit_folder(written: Path, folder: Path) -> None:
    """Give a folder its final name: after a crash it is there with everything in it, or not there.

    Args:
        written: The folder under another name, on the same disk.
        folder: Its final name, which nothing else has.
    """
    for place, _, files in os.walk(written):
        sync(*(Path(place) / name for name in files), Path(place))
    written.rename(folder)
    sync(folder.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, none of which a crash takes away again."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, in a single write, so that processes that do so at once do not mix theirs.

    It comes after an empty line: a line before it that a crash has torn stays alone. After a crash the new one is there
    or is torn, and what was there before is as it was.
    """
    content = f"\n{line}\n".encode()
    descriptor = open_stored(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync(path.parent)


def open_new(path: Path) -> TextIO:
    """Open a file that is there from now on, in place of whatever has its name; what that leads to is left alone."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.fdopen(os.open(path, flags, 0o644), "w")
    except FileExistsError:
        path.unlink()
        return os.fdopen(os.open(path, flags, 0o644), "w")


def renew(path: Path) -> None:
    """Put a copy in the place of a file: a process that has it open writes into one that nobody reads any more."""
    if path.exists():
        temporary = path.with_name(f".{path.name}.tmp")
        with open_to_read(path) as source, open_new(temporary) as copy:
            shutil.copyfileobj(source, copy.buffer)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


def sync(*paths: Path) -> None:
    """Wait until the content of files, and the entries of folders, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
