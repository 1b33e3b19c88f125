"""The manifest of a checkpoint: its files with their sizes and checksums, and a checksum of the manifest."""

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ksuit_runner.system import lock_file
from ksuit_runner.system.untrusted_files import UnsafeFileError, check_file, conform, parse_json, read_text

FORMAT = 2
MANIFEST = "manifest.json"
Fingerprint = dict[str, int]
"""``size`` and ``crc32`` of a file."""
_OF_RANK = re.compile(r"rank-(0|[1-9]\d{0,5})\.(?:json|safetensors)")
_BLOCK = 4_000_000  # bytes of a file that are read at once
_SMALL, _MOST_JOINED = 1 << 16, 64  # bytes of a part that is written together with others, and how many at most


class _Fingerprint(msgspec.Struct, forbid_unknown_fields=True):
    size: Annotated[int, msgspec.Meta(ge=0)]
    crc32: int


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    name: str
    config_hash: str
    unfinished: bool
    keep_last: Annotated[int, msgspec.Meta(ge=1)]
    tags: list[str]
    versions: dict[str, Any]
    files: dict[str, _Fingerprint]
    kernel: str
    crc32: int


class Head(msgspec.Struct, frozen=True):
    """What decides what is to become of a checkpoint that was handed over; see ``manifest_text``."""

    keep_last: Annotated[int, msgspec.Meta(ge=1)]
    tags: list[str]
    kernel: str


def rank_file(rank: int, suffix: str) -> str:
    """Return the name of a file that only one rank writes."""
    return f"rank-{rank}.{suffix}"


def rank_of(file: str) -> int | None:
    """Return the rank whose file this is; None for one of all ranks together."""
    match = _OF_RANK.fullmatch(file)
    return int(match[1]) if match else None


def is_common(file: str) -> bool:
    """Whether this is no file of a single rank. Those may be many terabytes, and each rank has read back its own."""
    return rank_of(file) is None


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> Fingerprint:
    """Write a file part by part, and return its fingerprint, computed from memory: what a manifest says of it.

    Raises:
        OSError: It could not be written.
    """
    size = checksum = 0
    with open(path, "wb") as file:
        for block in _blocks(parts):
            file.write(block)
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"size": size, "crc32": checksum}


def _blocks(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Yield the same bytes, with small parts joined."""
    small: list[bytes | memoryview] = []
    for part in parts:
        if len(part) < _SMALL:
            small.append(part)
        if small and (len(part) >= _SMALL or len(small) == _MOST_JOINED):
            yield b"".join(small)
            small.clear()
        if len(part) >= _SMALL:
            yield part
    yield b"".join(small)


def manifest_text(
    files: Mapping[str, Fingerprint],
    name: str,
    config_hash: str,
    unfinished: bool,
    versions: Mapping[str, str],
    keep_last: int,
    tags: Sequence[str] = (),
) -> str:
    """Return the text of a manifest. It names the running kernel, which is another one after a power cut.

    Args:
        files: What was written: the fingerprint of every file by its name.
        name: Name of the checkpoint.
        config_hash: Hash of the config that it was written under.
        unfinished: Whether what follows the last update was half done.
        versions: Versions of the libraries that wrote it.
        keep_last: Number of newest checkpoints that the run keeps.
        tags: Tags that it was written for.
    """
    head = {"format": FORMAT, "name": name, "config_hash": config_hash, "unfinished": unfinished}
    body = {
        **head,
        "keep_last": keep_last,
        "tags": list(tags),
        "versions": dict(versions),
        "files": dict(sorted(files.items())),
        "kernel": lock_file.kernel(),
    }
    return _seal(body)


def read_manifest(folder: Path, root: Path, name: str | None = None) -> dict[str, Any]:
    """Read a manifest, and check every byte by its checksum and every value by its type.

    Args:
        folder: The checkpoint's folder.
        root: Folder of the run, which no link may leave.
        name: Name of the checkpoint; by default that of the folder.

    Raises:
        UnsafeFileError: It is damaged; the message names the file.
    """
    try:
        text = read_text(folder / MANIFEST, root)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{MANIFEST} {error}") from None
    return parse_manifest(text, name or folder.name)


def parse_manifest(text: str, name: str) -> dict[str, Any]:
    """Return what the text of a manifest says, after the same checks.

    Raises:
        UnsafeFileError: It is damaged, or of another checkpoint; the message names the file.
    """
    try:
        found = parse_json(text)
        _check(found, name)
        if text != _seal({key: value for key, value in found.items() if key != "crc32"}):
            raise UnsafeFileError("is not what was written")
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{MANIFEST} {error}") from None
    assert isinstance(found, dict)
    return found


def parse_head(text: str) -> Head:
    """Return the head of a manifest, without checking the rest: in a fortieth of the time.

    Raises:
        UnsafeFileError: It is damaged.
    """
    try:
        return msgspec.json.decode(text, type=Head)
    except (ValueError, RecursionError) as error:
        raise UnsafeFileError(f"{MANIFEST} is damaged ({error})") from None


def verify(
    folder: Path, root: Path, name: str | None = None, reads: Callable[[str], bool] = lambda file: True
) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest, which is returned.

    Args:
        folder: The checkpoint's folder.
        root: Folder of the run, which no link may leave.
        name: Name of the checkpoint; by default that of the folder.
        reads: Whether to read a file; of the others only the size is checked.

    Raises:
        UnsafeFileError: A file is missing, unexpected or damaged; the message names it.
    """
    manifest = read_manifest(folder, root, name)
    for file, expected in manifest["files"].items():
        try:
            # The size detects most damage without reading gigabytes.
            has_size = check_file(folder / file, folder) == expected["size"]
            if not has_size or (reads(file) and fingerprint(folder / file) != expected):
                raise UnsafeFileError("is not what was written")
        except UnsafeFileError as error:
            raise UnsafeFileError(f"{file} {error}") from None
        except OSError as error:
            raise UnsafeFileError(f"{file} cannot be read ({error.strerror})") from None
    # Hidden files are ignored: network file systems leave some behind.
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if unexpected := sorted(present - manifest["files"].keys() - {MANIFEST}):
        raise UnsafeFileError(f"{unexpected[0][:100]} is not among the files that were written")
    return manifest


def _check(found: Any, name: str) -> None:
    manifest = conform(_Manifest, found)
    if manifest.format != FORMAT:
        raise UnsafeFileError(f"has format {manifest.format}, and this version of ksuit_runner reads {FORMAT}"[:200])
    if manifest.name != name:
        raise UnsafeFileError("belongs to another checkpoint")
    if not all(map(_is_plain, manifest.files)):
        raise UnsafeFileError("names a file outside of its folder")


def _is_plain(name: str) -> bool:
    return 0 < len(name) <= 200 and name.isprintable() and not name.startswith(".") and not set(name) & set("/\\:")


def _seal(body: Mapping[str, Any]) -> str:
    """Return the text of a manifest, which ends with the checksum of everything before."""
    text = json.dumps(body)
    sealed = f'{text[:-1]}, "crc32": {zlib.crc32(text.encode())}}}'
    return msgspec.json.format(sealed, indent=2) + "\n"  # `json` indents in Python, which takes twice as long


def fingerprint_of(pieces: Iterable[bytes | memoryview]) -> Fingerprint:
    """Return the fingerprint of a file with this content."""
    size = checksum = 0
    for piece in pieces:
        size += len(piece)
        checksum = zlib.crc32(piece, checksum)
    return {"size": size, "crc32": checksum}


def fingerprint(path: Path) -> Fingerprint:
    """Return the fingerprint of a file, which is read."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return {"size": path.stat().st_size, "crc32": checksum}
