"""Opens files of a run as untrusted: they may be changed, cut, made by somebody else, or not files at all."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import msgspec

from ksuit_runner.errors import ResumeError

Stored = TypeVar("Stored")

SIZE_LIMIT = 1_000_000
"""Largest size of a config, a manifest and the like, in bytes; usually they have a few thousand."""


_CAREFULLY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WRITES = os.O_WRONLY | os.O_RDWR
_HARD_LINK = "is a hard link: what is written to it would change another file"


class UnsafeFileError(Exception):
    """A file cannot be used; the message is the reason, without the file's name."""


class MissingFileError(UnsafeFileError):
    """There is no such file."""


def open_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file without following a link or waiting, and return its descriptor.

    The checks are made on the opened file, not on its name before or after. A file that is written in place must have
    no second name: a hard link would write into another file.

    Args:
        path: The file.
        flags: As ``os.open`` takes them, without ``O_TRUNC``, which would come before the check.

    Raises:
        UnsafeFileError: It is missing, a link, a pipe, a device, a folder, or is to be written and has a second name.
        OSError: It cannot be opened.
    """
    assert not flags & os.O_TRUNC
    try:
        descriptor = os.open(path, flags | _CAREFULLY, 0o644)
    except FileNotFoundError:
        raise MissingFileError("is missing") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeFileError("is a link") from None
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a pipe without reader, a socket; a folder
            raise UnsafeFileError("is not a file") from None
        raise
    found = os.fstat(descriptor)
    problem = None if stat.S_ISREG(found.st_mode) else "is not a file"
    if problem is None and flags & _WRITES and found.st_nlink > 1:
        problem = _HARD_LINK
    if problem is not None:
        os.close(descriptor)
        raise UnsafeFileError(problem)
    return descriptor


def open_stored(path: Path, flags: int) -> int:
    """Open a file of a run as ``open_file`` does, with an error that names it.

    Raises:
        FileNotFoundError: It is missing.
        ResumeError: It is not a file that a run would have left.
        OSError: It cannot be opened.
    """
    try:
        return open_file(path, flags)
    except MissingFileError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except UnsafeFileError as error:
        raise ResumeError(f"{path} {error}") from None


def open_to_read(path: Path) -> BinaryIO:
    """Open a file of a run for reading; see ``open_stored``."""
    return os.fdopen(open_stored(path, os.O_RDONLY), "rb")


def check_folder(folder: Path) -> None:
    """Check that a folder holds files and folders only, and no link that leaves it: what resumes a run writes into it.

    Files that lie in it directly are written in place, and so may have no second name elsewhere.

    Raises:
        ResumeError: It is a link itself, or something in it is one or is neither file nor folder.
    """
    found = [folder, *(Path(above) / name for above, *below in os.walk(folder) for part in below for name in part)]
    for path in found:
        try:
            status = path.lstat()
        except FileNotFoundError:  # removed meanwhile
            continue
        mode = status.st_mode
        if stat.S_ISLNK(mode) and (path == folder or not path.resolve().is_relative_to(folder.resolve())):
            raise ResumeError(f"{path} is a link that leaves the folder of {folder.name}")
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
            raise ResumeError(f"{path} is neither a file nor a folder")
        if stat.S_ISREG(mode) and status.st_nlink > 1 and path.parent == folder:
            raise ResumeError(f"{path} {_HARD_LINK}")


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content; what cannot be removed is left."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def is_below(path: str) -> bool:
    """Whether a path in the record of a run stays below the folder that it is meant for."""
    pure = PurePosixPath(path)
    return path.isprintable() and bool(pure.parts) and not pure.is_absolute() and not {"..", "~"} & {*pure.parts}


def check_inside(path: Path, root: Path) -> None:
    """Check that nothing on the way from a folder down to a path is a link, which could lead anywhere.

    Args:
        path: File or folder below the root; it need not exist.
        root: Folder whose own location is the user's choice.

    Raises:
        UnsafeFileError: It is not below the root, or there is a link on the way.
    """
    if ".." in path.parts or not path.is_relative_to(root):
        raise UnsafeFileError(f"leaves {root}")
    part = path
    while part != root:
        if part.is_symlink():
            raise UnsafeFileError("is a link" if part == path else f"is behind a link, {part}")
        part = part.parent


def is_behind_link(path: Path, root: Path) -> bool:
    """Whether a path below a root is a link, or has one on the way; see ``check_inside``."""
    try:
        check_inside(path, root)
    except UnsafeFileError:
        return True
    return False


def check_file(path: Path, root: Path) -> int:
    """Check that a path below a root is a file, with no link on the way, and return its size in bytes.

    Raises:
        UnsafeFileError: It is something else, or missing.
    """
    check_inside(path, root)
    try:
        found = path.lstat()
    except OSError:
        raise UnsafeFileError("is missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise UnsafeFileError("is not a file")
    return found.st_size


def read_text(path: Path, root: Path, limit: int = SIZE_LIMIT) -> str:
    """Read a small text file below a root.

    Args:
        path: The file.
        root: Folder whose own location is the user's choice; no link is allowed below it.
        limit: Largest size, in bytes.

    Raises:
        UnsafeFileError: It is missing, not a file, larger than the limit, or not text.
    """
    check_inside(path, root)
    try:
        with os.fdopen(open_file(path), "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > limit:
                raise UnsafeFileError(f"has {size:,} bytes, more than the {limit:,} that are read")
            return file.read(limit).decode()  # not in text mode, which would change line endings
    except (OSError, ValueError) as error:
        raise UnsafeFileError(f"cannot be read ({error})") from None


def read_json(path: Path, root: Path, limit: int = SIZE_LIMIT) -> Any:
    """Read a small JSON file below a root; see ``read_text``.

    Raises:
        UnsafeFileError: It cannot be read, or is not JSON.
    """
    return parse_json(read_text(path, root, limit))


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        UnsafeFileError: It is not JSON, or is nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UnsafeFileError("is nested too deep") from None
    except ValueError as error:
        raise UnsafeFileError(f"is not JSON ({error})") from None


def conform(kind: type[Stored], value: Any) -> Stored:
    """Convert a JSON value to a type, if everything in it has the type that it must have.

    Args:
        kind: Type that is expected, as msgspec knows it: a dataclass, a ``Struct``, or one of JSON's types.
        value: The value, as it was parsed.

    Raises:
        UnsafeFileError: Something in it is not; names the key.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UnsafeFileError(f"does not fit its schema: {str(error)[:300]}") from None
