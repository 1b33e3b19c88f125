"""Atomic and durable writes of files and folders: after a crash they are as before or as written."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ksuit_runner.system.untrusted_files import open_stored, open_to_read


def write_text(path: Path, text: str) -> None:
    """Replace a small file: after a crash it has the old content or the new one."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file that people may read as well: after a crash it has the old content or the new one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_texts(texts: Mapping[Path, str]) -> None:
    """Replace small files, one after the other: after a crash each of them has the old content or the new one."""
    for path, text in texts.items():
        _replace(path, text.encode())
    sync(*{path.parent: None for path in texts})


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file: after a crash it has the old content or the new one."""
    _replace(path, content)
    sync(path.parent)


def write_unsynced(path: Path, text: str) -> None:
    """Replace a small file without waiting for the disk: a power cut may leave anything there, or nothing."""
    _replace(path, text.encode(), is_durable=False)


def _replace(path: Path, content: bytes, is_durable: bool = True) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open_new(temporary) as file:
            file.buffer.write(content)
            if is_durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # on a full disk it would take space
        _name_file(error, path)
        raise


def _name_file(error: BaseException, path: Path) -> None:
    """Have an error of the file system name the file, which it does not if a write has failed."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def commit_folder(written: Path, folder: Path) -> None:
    """Give a folder its final name: after a crash it is complete, or does not exist.

    Args:
        written: The folder under another name, on the same disk.
        folder: Its final name, which must be free.
    """
    for folder_path, _, files in os.walk(written):
        sync(*(Path(folder_path) / name for name in files), Path(folder_path))
    written.rename(folder)
    sync(folder.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Provide a folder to write into, which then gets its final name: after a crash it is complete, or does not exist.

    Args:
        folder: Its final name; a folder that has it is replaced.

    Yields:
        The folder, empty, under a hidden name.
    """
    written = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        yield written
        shutil.rmtree(folder, ignore_errors=True)
        commit_folder(written, folder)
    except BaseException as error:
        shutil.rmtree(written, ignore_errors=True)  # on a full disk it would take space
        _name_file(error, folder)
        raise


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """Provide a file to write to by its path, and files beside it; see ``new_folder``.

    Args:
        file: Its final path, which must be free, as those of the files beside it.

    Yields:
        The path of a file that does not exist, of the same name, in a hidden folder.

    Raises:
        FileExistsError: One of the paths is taken; nothing was written.
    """
    with new_folder(file.with_name(f".{file.name}.whole")) as folder:
        yield folder / file.name
        for path in sorted(folder.iterdir()):
            if os.path.lexists(taken := file.with_name(path.name)):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(taken))
    whole = file.with_name(f".{file.name}.whole")
    for path in sorted(whole.iterdir(), key=lambda path: path.name == file.name):  # those that it refers to are first
        path.rename(file.with_name(path.name))
    whole.rmdir()
    sync(file.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, durably."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file in a single write, so that lines of several processes do not mix.

    It comes after an empty line, so that it is not joined to a line that a crash has torn. After a crash the new line
    is complete, torn or missing, and everything before it is unchanged.
    """
    content = f"\n{line}\n".encode()
    descriptor = open_stored(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError as error:
        _name_file(error, path)
        raise
    finally:
        os.close(descriptor)
    sync(path.parent)


def open_new(path: Path) -> TextIO:
    """Create a file and open it, in place of whatever has its name; the target of a link is not touched."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.fdopen(os.open(path, flags, 0o644), "w")
    except FileExistsError:
        path.unlink()
        return os.fdopen(os.open(path, flags, 0o644), "w")


def renew(path: Path) -> None:
    """Replace a file by a copy: a process that has it open then writes into one that nobody reads any more."""
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
