"""Reading files of a run as what they may be: changed, cut, made by somebody else, or not files at all."""

import json
import stat
from pathlib import Path
from typing import Any

SIZE_LIMIT = 1_000_000
"""Largest size of a config, of a manifest and the like, in bytes; the usual ones have a few thousand."""


class UnsafeFileError(Exception):
    """A file cannot be used; the message is the reason, without the file's name."""


def check_inside(path: Path, root: Path) -> None:
    """Check that nothing on the way from a folder down to a path is a link, which could lead anywhere.

    Args:
        path: File or folder below the root; it need not exist.
        root: Folder whose own place is the user's choice.

    Raises:
        UnsafeFileError: It is not below the root, or there is a link on the way.
    """
    if ".." in path.parts or not path.is_relative_to(root):
        raise UnsafeFileError(f"leaves {root}")
    for part in [path, *path.parents][: len(path.relative_to(root).parts)]:
        if part.is_symlink():
            raise UnsafeFileError("is a link" if part == path else f"is behind a link, {part}")


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
        raise UnsafeFileError("is no file")
    return found.st_size


def read_text(path: Path, root: Path) -> str:
    """Read a small text file below a root.

    Raises:
        UnsafeFileError: It is missing, not a file, larger than SIZE_LIMIT, or no text.
    """
    if (size := check_file(path, root)) > SIZE_LIMIT:
        raise UnsafeFileError(f"has {size:,} bytes, more than the {SIZE_LIMIT:,} that are read")
    try:
        return path.read_bytes().decode()  # not read_text, which would change the ends of lines
    except (OSError, ValueError) as error:
        raise UnsafeFileError(f"cannot be read ({error})") from None


def read_json(path: Path, root: Path) -> Any:
    """Read a small JSON file below a root.

    Raises:
        UnsafeFileError: It cannot be read, or is no JSON.
    """
    return parse_json(read_text(path, root))


def parse_json(text: str) -> Any:
    """Return what a JSON text says.

    Raises:
        UnsafeFileError: It is none, or is nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UnsafeFileError("is nested too deep") from None
    except ValueError as error:
        raise UnsafeFileError(f"is no JSON ({error})") from None
