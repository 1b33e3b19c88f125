"""A tiny checkpoint in one file, as it is handed over: a folder of files takes training several times as long.

It is the manifest, its length in front, and then the files one after the other, sorted by name: the manifest has their
sizes and checksums. Whoever commits the checkpoint makes the folder of it.
"""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ksuit_runner.checkpoint.manifest import MANIFEST, Head, parse_head, parse_manifest
from ksuit_runner.system.untrusted_files import SIZE_LIMIT, UnsafeFileError, check_inside, open_file, remove

_LENGTH = 8  # bytes of the manifest's length
_KINDS = (".json", ".safetensors")
_BLOCK = 1_000_000
_MOST_PIECES = 1000  # that one call of the system takes, at least


def write_packed(path: Path, manifest: str, files: Mapping[str, Sequence[bytes | memoryview]]) -> None:
    """Write a file that does not exist; nothing waits for the disk.

    Args:
        path: The file.
        manifest: Text of the manifest.
        files: Content of every file that it names, in pieces.

    Raises:
        OSError: It could not be written.
    """
    text = manifest.encode()
    pieces = [piece for name in sorted(files) for piece in files[name]]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # `open` adds 40 us
    try:
        _write(descriptor, [len(text).to_bytes(_LENGTH, "little") + text, *pieces])
    finally:
        os.close(descriptor)


def _write(descriptor: int, pieces: Sequence[bytes | memoryview]) -> None:
    """Write pieces from where they are: joined, they take new pages of memory, which cost several times as much."""
    left = [memoryview(piece) for piece in pieces if len(piece)]
    while left:
        size = os.writev(descriptor, left[:_MOST_PIECES])
        while left and size >= left[0].nbytes:
            size -= left.pop(0).nbytes
        if size:  # a full disk took a part
            left[0] = left[0][size:]


def read_packed_head(path: Path) -> Head:
    """Read the head of the manifest in a file; see ``parse_head``. Whether there is a link on the way is not checked.

    Raises:
        UnsafeFileError: It is damaged.
        OSError: It cannot be read.
    """
    with os.fdopen(open_file(path), "rb") as file:
        return parse_head(_read_text(file))


def unpack(path: Path, folder: Path, root: Path, name: str) -> dict[str, Any]:
    """Make the folder of a checkpoint, in place of what is there, and return its manifest.

    Args:
        path: The file.
        folder: The folder.
        root: Folder of the run, which no link may leave.
        name: Name of the checkpoint.

    Raises:
        UnsafeFileError: The file is damaged; the message names what is in it.
        OSError: It cannot be read, or the folder not be written.
    """
    with _opened(path, root) as file:
        text = _read_text(file)
        manifest = parse_manifest(text, name)
        files = manifest["files"]
        if unknown := [part for part in files if Path(part).suffix not in _KINDS or part == MANIFEST]:
            raise UnsafeFileError(f"it holds {unknown[0][:100]}, which is no file of a checkpoint")
        remove(folder)
        folder.mkdir()
        for part, expected in sorted(files.items()):
            if _copy(file, folder / part, expected["size"]) != expected["crc32"]:
                raise UnsafeFileError(f"{part} is not what was written")
        if file.read(1):
            raise UnsafeFileError("it is longer than its manifest says")
        (folder / MANIFEST).write_text(text)
    return manifest


@contextmanager
def _opened(path: Path, root: Path) -> Iterator[BinaryIO]:
    try:
        check_inside(path, root)
        file = os.fdopen(open_file(path), "rb")
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path.name} {error}") from None
    with file:
        yield file


def _read_text(file: BinaryIO) -> str:
    length = int.from_bytes(file.read(_LENGTH), "little")
    if length > SIZE_LIMIT:
        raise UnsafeFileError(f"{MANIFEST} has {length:,} bytes, more than the {SIZE_LIMIT:,} that are read")
    return file.read(length).decode(errors="replace")  # its own checksum finds what is damaged


def _copy(source: BinaryIO, path: Path, size: int) -> int:
    """Copy so many bytes to a new file, and return their checksum."""
    checksum = 0
    with open(path, "xb") as file:
        while size and (block := source.read(min(size, _BLOCK))):
            file.write(block)
            checksum = zlib.crc32(block, checksum)
            size -= len(block)
    if size:
        raise UnsafeFileError(f"{path.name} is cut off")
    return checksum
