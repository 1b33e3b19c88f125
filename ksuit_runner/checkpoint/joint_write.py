"""A checkpoint that all ranks write together, each in a thread of its own: nothing here waits for training.

Rank 0 makes a folder for every attempt. Each rank writes its files into it, waits until they are on the disk, and
leaves a note with their sizes and checksums. When all notes are there, rank 0 checks that the files make a whole, and
writes the manifest last. Another attempt has another folder, so that a rank that is late writes into none but its own.
"""

import errno
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar

import msgspec

from ksuit_runner.checkpoint.folders import PARTIAL, beside
from ksuit_runner.checkpoint.manifest import Fingerprint, rank_of
from ksuit_runner.checkpoint.shards import Shard, Shards
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import Interrupted, PeerError
from ksuit_runner.system.untrusted_files import UnsafeFileError

Result = TypeVar("Result")
Note = TypeVar("Note")
_GRACE_S, _POLL_S = 5.0, 0.1  # after a failure the ranks may meet again, and what they were writing is still good


class _Turn(msgspec.Struct, frozen=True, omit_defaults=True):
    """What rank 0 has decided: another attempt in a folder, or, without one, that there is none any more.

    Attributes:
        folder: Name of the attempt's folder.
        error: Why the last attempt was none, if no other follows.
    """

    folder: str | None = None
    error: str | None = None


class _Written(msgspec.Struct, frozen=True, omit_defaults=True):
    """What has become of a rank's part of an attempt."""

    files: dict[str, Fingerprint] = {}
    errno: int = 0
    error: str | None = None


class JointWrite:
    """A checkpoint on its way, as one of the ranks sees it.

    Args:
        world: The ranks that write it.
        folder: Its final path; its name is the position.
        key: Distinguishes it from every other one that the ranks ever write; the same on all of them.
        timeout_s: How long an attempt may take, in seconds.
    """

    def __init__(self, world: World, folder: Path, key: str, timeout_s: float) -> None:
        self._world = world
        self._folder = folder
        self._key = key
        self._timeout_s = timeout_s
        self._attempt = -1

    # Rank 0

    def lead(self, write: Callable[[], Result]) -> Result:
        """Let the others follow while this rank writes, with one or more calls of ``write``.

        Raises:
            Exception: What ``write`` raises, which the others get to know.
        """
        failure = "rank 0 was interrupted"
        try:
            result = write()
            failure = ""
            return result
        except Exception as error:
            failure = str(error) or type(error).__name__
            raise
        finally:
            self._attempt += 1
            with suppress(PeerError):  # they see for themselves that this rank is lost to them
                self._post_turn(_Turn(error=failure or None))

    def write(
        self, shard: Shard, write_files: Callable[[Path], dict[str, Fingerprint]], seal: Callable[[Path, Any], None]
    ) -> None:
        """Write ``.NAME.tmp`` together with the others.

        Args:
            shard: What this rank alone has.
            write_files: Writes what all ranks have in common, to a folder, and returns the fingerprints of its files.
            seal: Writes the manifest of a folder, from the fingerprints of all files.

        Raises:
            OSError: One of the ranks could not write its part, or has not done so in time; everything is removed.
        """
        self._attempt += 1
        deadline = monotonic() + self._timeout_s
        folder = self._folder.with_name(f".{self._folder.name}.{self._key}-{self._attempt}{PARTIAL}")
        folder.mkdir(parents=True)
        try:
            self._post_turn(_Turn(folder.name))
            written = write_files(folder)
            written |= shard.write(folder, self._folder.name, 0, self._world.size)
            for rank in range(1, self._world.size):
                written |= self._written_by(rank, deadline)
            self._check(folder, written)
            seal(folder, written)
            partial = beside(self._folder, PARTIAL)
            shutil.rmtree(partial, ignore_errors=True)
            folder.rename(partial)
        except PeerError as error:
            raise OSError(errno.ETIMEDOUT, str(error)) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _written_by(self, rank: int, deadline: float) -> dict[str, Fingerprint]:
        note = self._read(f"written-{rank}", _Written, deadline)
        self._world.forget(self._note(f"written-{rank}"))
        if note.error is not None:
            raise OSError(note.errno, f"rank {rank}: {note.error}")
        assert all(rank_of(file) == rank for file in note.files), "a rank writes its own files only"
        return note.files

    def _check(self, folder: Path, written: Mapping[str, Fingerprint]) -> None:
        try:
            for file, expected in written.items():
                if (folder / file).stat().st_size != expected["size"]:
                    raise UnsafeFileError(f"{file} is not as large here as its rank has written it")
            Shards(folder, written, self._folder.name)
        except FileNotFoundError as error:
            problem = f"{error.filename} is not there: all ranks of a run need the same output_dir"
            raise OSError(errno.ENOENT, problem) from None
        except UnsafeFileError as error:
            raise OSError(errno.EIO, f"what the ranks have written is no checkpoint: {error}") from None

    # The others

    def follow(self, shard: Shard) -> None:
        """Write this rank's part, as often as rank 0 asks for it.

        Raises:
            PeerError: The checkpoint was not handed over, or rank 0 does not say what becomes of it.
        """
        folder: Path | None = None
        for self._attempt in count():
            # Rank 0 may still be at a checkpoint before this one, or wait for another rank as long.
            turn = self._read("turn", _Turn, monotonic() + 2 * self._timeout_s)
            if folder is not None:  # rank 0 could not remove what was still being written
                shutil.rmtree(folder, ignore_errors=True)
            if turn.folder is None:
                break
            folder = self._folder.with_name(Path(turn.folder).name)
            self._world.post(self._note(f"written-{self._world.rank}"), msgspec.to_builtins(self._part(folder, shard)))
        if turn.error is not None:
            raise PeerError(f"rank 0: {turn.error}")

    def _part(self, folder: Path, shard: Shard) -> _Written:
        try:
            return _Written(shard.write(folder, self._folder.name, self._world.rank, self._world.size))
        except OSError as error:
            return _Written(errno=error.errno or errno.EIO, error=str(error))

    # Both

    def _read(self, what: str, kind: type[Note], deadline: float) -> Note:
        first: float | None = None
        while True:
            try:
                left = max(0.0, deadline - monotonic())
                return msgspec.convert(self._world.read(self._note(what), left), kind)
            except (PeerError, Interrupted) as error:
                first = first or monotonic()
                if monotonic() > min(deadline, first + _GRACE_S):
                    # An interruption ends what training waits for, and not a thread.
                    raise error if isinstance(error, PeerError) else PeerError("a rank was interrupted") from None
            sleep(_POLL_S)

    def _post_turn(self, turn: _Turn) -> None:
        self._world.post(self._note("turn"), msgspec.to_builtins(turn))

    def _note(self, what: str) -> str:
        return f"checkpoint/{self._key}/{self._attempt}/{what}"
