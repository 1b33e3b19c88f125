"""Commits checkpoints: what was handed over as written becomes durable, is read back, named, and replaces older ones.

A checkpoint is written to ``.NAME.tmp``, and handed over by renaming that to ``.NAME.ready``; until then nothing waits
for the disk. From there on it is the committer's, which may work in another process: this module imports no torch. A
tiny one is handed over as one file, which the committer unpacks to ``.NAME.unpacked``, and which stays until the
checkpoint is committed.
"""

import errno
import json
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import msgspec
from safetensors import SafetensorError, safe_open

from ksuit_runner.checkpoint.folders import (
    PARTIAL,
    READY,
    REPLACED,
    UNPACKED,
    beside,
    damage,
    has_folder,
    hidden,
    names,
    read_tags,
    root_of,
    tagged,
    update_of,
)
from ksuit_runner.checkpoint.hold import removing
from ksuit_runner.checkpoint.manifest import MANIFEST, Head, is_common, parse_head, read_manifest, verify
from ksuit_runner.checkpoint.packed import read_packed_head, unpack
from ksuit_runner.errors import KsuitError
from ksuit_runner.paths import PathProvider
from ksuit_runner.system import lock_file
from ksuit_runner.system.atomic_files import sync, write_text
from ksuit_runner.system.untrusted_files import UnsafeFileError, read_text, remove

_LOGGER = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or a share of one, that is full."""
OnCheckpoint = Callable[[str, Exception | None], None]
"""Called with the name of a checkpoint, or ``EVERY``, once it is committed or dropped, or with its error."""
EVERY = "*"
"""Name that stands for every checkpoint that waits, where an error keeps them from being found."""
_P = ParamSpec("_P")
_R = TypeVar("_R")


class HandOver(Protocol):
    """Where the process that trains hands its checkpoints over; whoever commits them may be another process."""

    def submit(self, name: str) -> "Future[None]":
        """Take over the checkpoint that is written to ``.NAME.tmp``, without waiting for it.

        Args:
            name: Its position. The next one of the same position is submitted after this one is done.

        Returns:
            Done once it is committed. Its error is an ``OSError``, with the ``errno`` of the disk, if it could not be,
            or a ``KsuitError`` if another process owns the run.

        Raises:
            OSError: It cannot be taken over; it is dropped.
        """

    def hurry(self) -> None:
        """Commit without a pause what was submitted: it is waited for."""

    def restore_tags(self, name: str, tags: Sequence[str]) -> None:
        """Restore the tags of a committed checkpoint, which a kill right after its commit may have lost."""

    def close(self) -> None:
        """Take over no more checkpoints; those that were submitted are still committed."""


def _one_at_a_time(
    method: Callable[Concatenate["Committer", _P], _R],
) -> Callable[Concatenate["Committer", _P], _R]:
    """Let a thread that calls a committer's method wait until no other thread is in one."""

    @wraps(method)
    def locked(self: "Committer", /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class Committer:
    """Commits the checkpoints of a run, and removes old ones.

    How many are kept is in the manifest of each: it is needed when the process that knows it is gone. Several threads
    may use it: when the process that trains has died, one recovers what it has left while another may still commit.

    Args:
        paths: Paths of the run.
        check_owner: Raises an error if the run is not this process's to record; called before every change.
        sync_journal: Makes the metrics up to a checkpoint durable, before it is.
        on_committed: Called once checkpoints are committed, and what they replace is removed.

    Attributes:
        paths: Paths of the run.
    """

    def __init__(
        self,
        paths: PathProvider,
        check_owner: Callable[[], None] = lambda: None,
        sync_journal: Callable[[], None] = lambda: None,
        on_committed: Callable[[], None] = lambda: None,
    ) -> None:
        self.paths = paths
        self._check_owner = check_owner
        self._sync_journal = sync_journal
        self._on_committed = on_committed
        self._lock = threading.RLock()
        self._tags: dict[str, str] | None = None  # read before the first checkpoint is committed

    @_one_at_a_time
    def commit(self, name: str) -> None:
        """Commit a checkpoint: afterwards it survives a power cut, and is the newest one.

        An intact checkpoint of this position that would hold the same stays; any other is replaced, and lost only
        after the new one was read back.

        Raises:
            OSError: It could not be committed; it is dropped, and what was committed before is as it was.
            KsuitError: The run is not this process's to record; its names and older checkpoints are as they were.
        """
        self._prune(name, self._commit(name))
        self._on_committed()

    @_one_at_a_time
    def commit_waiting(self, on_end: OnCheckpoint = lambda name, error: None) -> dict[str, Exception | None]:
        """Commit all checkpoints that wait: those with tags in their order, then the newest one, which is waited for.

        Older ones follow for as long as they are among those that are kept: of many that pile up, only the last ones
        count, and the others are dropped. Whether one is dropped depends on newer ones that are committed by then, and
        not on those that were to be. What is removed is removed last; or before, if the disk is full.

        Args:
            on_end: Called with each as soon as it is safe, or is known to be dropped, or with its error.

        Returns:
            The error of each, by name, in that order; None for one that was committed or dropped.

        Raises:
            OSError: Their folder cannot be read; ``on_end`` was called with ``EVERY``.
        """
        try:
            waiting = _Waiting(self.paths)
        except OSError as error:
            on_end(EVERY, error)  # who waits for one would wait for ever
            raise
        results: dict[str, Exception | None] = {}
        newest, keep_last = "", 0
        for name in waiting.in_order():
            try:
                if waiting.is_superseded(name):
                    waiting.dropped.add(name)
                else:
                    kept = self._commit(name, waiting.make_room, is_newest=not waiting.newer_than(name))
                    waiting.committed.add(name)
                    if not newest or update_of(name) > update_of(newest):
                        newest, keep_last = name, kept
                results[name] = None
            except Exception as error:
                waiting.failed.add(name)
                results[name] = error
            on_end(name, results[name])
        with suppress(KsuitError):  # of a run that is another process's by now, which drops them itself
            self._check_owner()
            for name in waiting.dropped:
                _drop(self.paths.checkpoints_dir / name)
            if newest:
                self._prune(newest, keep_last)
                self._on_committed()
        return results

    @_one_at_a_time
    def recover(self) -> None:
        """Finish what a dead process has left: commit what is whole, and remove what is half written.

        Only for a process that owns the run, before it reads or writes a checkpoint, or once nobody writes any more.
        """
        self.finish_interrupted()
        self._drop_unsynced()
        for name, error in self.commit_waiting().items():
            if isinstance(error, OSError):
                _LOGGER.warning("checkpoint %s of a process that died is dropped: %s", name, error)
            elif error is not None:
                raise error
        _remove_all(self.paths, PARTIAL, UNPACKED)

    @_one_at_a_time
    def finish_interrupted(self) -> None:
        """Finish what a dead committer was doing: what it was replacing, and the names of what it had committed."""
        for name in hidden(self.paths, REPLACED):
            self._check_owner()
            _finish_replacement(self.paths.checkpoints_dir / name)
        for name in names(self.paths)[:1]:
            folder = self.paths.checkpoints_dir / name
            with suppress(UnsafeFileError, OSError):  # a damaged one is found when it is read
                tags = read_manifest(folder, root_of(folder), name)["tags"]
                if not self._is_named(name, tags):
                    self._check_owner()
                    self._name(name, tags)

    @_one_at_a_time
    def restore_tags(self, name: str, tags: Sequence[str]) -> None:
        """Restore the tags of the checkpoint that is resumed from; a kill right after its commit may have lost them."""
        before = read_tags(self.paths)
        if (all_tags := {**before, **tagged(tags, name)}) != before:
            self._check_owner()
            self._write_tags(all_tags)

    def _commit(self, name: str, make_room: Callable[[], bool] = lambda: False, is_newest: bool = True) -> int:
        """Commit a checkpoint, and return how many are to be kept.

        Args:
            name: Its name.
            make_room: Called if the disk is full; returns whether that may have changed.
            is_newest: Whether none of those that are committed is newer.
        """
        folder = self.paths.checkpoints_dir / name
        while True:
            self._check_owner()
            try:
                manifest = self._put_in_place(folder)
                break
            except OSError as error:
                if error.errno not in FULL or not beside(folder, READY).exists() or not make_room():
                    _drop(folder)
                    raise
        self._check_owner()
        _drop(folder)
        self._name(name, manifest["tags"], is_newest)
        shutil.rmtree(beside(folder, REPLACED), ignore_errors=True)
        keep_last: int = manifest["keep_last"]
        return keep_last

    def _put_in_place(self, folder: Path) -> dict[str, Any]:
        """Make a checkpoint that was handed over durable under its name, and return its manifest."""
        written, manifest = _verified(folder)
        self._sync_journal()
        if not _is_same(folder, manifest):
            self._replace(folder, written)
        return manifest

    def _drop_unsynced(self) -> None:
        """Drop what was handed over under another kernel: a power cut may have left it whole, and the journal not."""
        for name in hidden(self.paths, READY):
            folder = self.paths.checkpoints_dir / name
            with suppress(UnsafeFileError, OSError):  # a damaged one is dropped where it is to be committed
                if _head_of_ready(folder).kernel != lock_file.kernel():
                    self._check_owner()
                    _drop(folder)

    def _replace(self, folder: Path, written: Path) -> None:
        """Give a verified checkpoint its name, and read it back; if that fails, what had the name before has it."""
        replaced = beside(folder, REPLACED)
        _finish_replacement(folder)
        sync(*(path for path in written.iterdir() if not path.name.startswith(".")), written)
        if self._tags is None:  # whoever wrote it waited for no disk
            sync(*self.paths.checkpoints_dir.parents[:4])
        try:
            if folder.exists():
                folder.rename(replaced)  # if the process is killed before the next rename, `recover` undoes this one
            written.rename(folder)
            sync(folder.parent)
            _read_back(folder)
        except OSError:
            if not written.exists():
                shutil.rmtree(folder, ignore_errors=True)
            _finish_replacement(folder)
            raise

    def _is_named(self, name: str, tags: Sequence[str]) -> bool:
        is_latest = self.paths.latest.is_file() and read_text(self.paths.latest, self.paths.runs_dir) == f"{name}\n"
        return is_latest and tagged(tags, name).items() <= read_tags(self.paths).items()

    def _name(self, name: str, tags: Sequence[str], is_newest: bool = True) -> None:
        if tags or self._tags is None:
            before = read_tags(self.paths) if self._tags is None else self._tags
            self._write_tags({**before, **tagged(tags, name)})
        if is_newest:
            write_text(self.paths.latest, f"{name}\n")

    def _write_tags(self, tags: dict[str, str]) -> None:
        write_text(self.paths.tags, json.dumps(tags, indent=2) + "\n")
        self._tags = tags

    def _prune(self, newest: str, keep_last: int) -> None:
        assert self._tags is not None
        existing = names(self.paths)
        past = existing[existing.index(newest) :]  # later ones are damaged, and will be written again
        old = [name for name in past[keep_last:] if name not in self._tags.values()]
        for name in old:
            with removing(self.paths.checkpoints_dir / name) as is_free:
                if is_free:  # or else after a later checkpoint
                    shutil.rmtree(self.paths.checkpoints_dir / name, ignore_errors=True)
        if old:
            with suppress(OSError):  # what a power cut brings back is removed again after the next one
                sync(self.paths.checkpoints_dir)


class _Waiting:
    """The checkpoints of a run that wait to be committed, and what has become of them.

    Args:
        paths: Paths of the run.

    Attributes:
        committed: Those that are committed by now.
        failed: Those that could not be.
        dropped: Those that need not be, because of newer ones.
    """

    def __init__(self, paths: PathProvider) -> None:
        self._paths = paths
        self._names = hidden(paths, READY)  # newest first
        self._heads = {name: _head_or_none(paths.checkpoints_dir / name) for name in self._names}
        self._others = names(paths) if self._names else []
        self._is_intact = cache(lambda name: damage(paths.checkpoints_dir / name) is None)
        self.committed: set[str] = set()
        self.failed: set[str] = set()
        self.dropped: set[str] = set()

    def in_order(self) -> list[str]:
        """Return their names: first those with tags, oldest first, as each takes tags from older ones; then the others.

        One that says nothing of itself may have tags as well.
        """
        first = [name for name in reversed(self._names) if (head := self._heads[name]) is None or head.tags]
        return first + [name for name in self._names if name not in first]

    def newer_than(self, name: str) -> list[str]:
        """Return the newer ones that are committed, from now or from before.

        Whoever committed those may have died before it dropped this one. All of their files are read, as by a resume:
        if it has passed over a damaged one, this one is written after it.
        """
        update, others = update_of(name), (other for other in self._others if other not in self.committed)
        found = [other for other in others if update_of(other) > update and self._is_intact(other)]
        return found + [other for other in self.committed if update_of(other) > update]

    def is_superseded(self, name: str) -> bool:
        """Whether a checkpoint would be removed again, because of newer ones that are committed."""
        return name in self.dropped or self._is_behind(name, len(self.newer_than(name)))

    def make_room(self) -> bool:
        """Drop the oldest that is superseded once all newer ones are committed; return whether there is one."""
        for number, name in reversed([*enumerate(self._names)]):
            newer = {*self._names[:number], *self.newer_than(name)} - self.failed - self.dropped
            is_pending = name not in self.committed | self.failed | self.dropped
            if is_pending and self._is_behind(name, len(newer)):
                self.dropped.add(name)
                _drop(self._paths.checkpoints_dir / name)
                return True
        return False

    def _is_behind(self, name: str, newer: int) -> bool:
        head = self._heads[name]
        return head is not None and not head.tags and newer >= head.keep_last


class InPlace:
    """Commits every checkpoint in the thread that hands it over.

    Args:
        committer: Committer of the run.
    """

    def __init__(self, committer: Committer) -> None:
        self._committer = committer
        self.restore_tags = committer.restore_tags

    def submit(self, name: str) -> "Future[None]":
        """Commit a checkpoint; see ``HandOver``."""
        hand_over(self._committer.paths, name)
        done = Future[None]()
        try:
            self._committer.commit(name)
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)
        return done

    def hurry(self) -> None:
        """Do nothing: everything is committed."""

    def close(self) -> None:
        """Do nothing: everything is committed."""


def hand_over(paths: PathProvider, name: str) -> None:
    """Hand a checkpoint that is written over to the committer: ``.NAME.ready`` is whole, or does not exist.

    A kill of the process that has written it leaves it whole; a power cut may leave anything.

    Raises:
        OSError: It cannot be renamed, and is dropped.
    """
    folder = paths.checkpoints_dir / name
    partial, ready = beside(folder, PARTIAL), beside(folder, READY)
    try:
        try:
            partial.rename(ready)
        except OSError:  # a folder that an earlier process has handed over has that name
            remove(ready)
            partial.rename(ready)
    except OSError:
        remove(partial)
        raise


def remove_partial(paths: PathProvider) -> None:
    """Remove what a dead process has half written. Only the process that writes checkpoints may call this."""
    _remove_all(paths, PARTIAL)


def _remove_all(paths: PathProvider, *suffixes: str) -> None:
    """Remove what is hidden of all checkpoints; other files, such as that of ``latest``, may be written right now."""
    for suffix in suffixes:
        for path in paths.checkpoints_dir.glob(f".E*{suffix}") if has_folder(paths) else ():
            remove(path)


def _verified(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return where the files of a checkpoint are that was handed over, unpacked and verified, and their manifest."""
    written, root = beside(folder, READY), root_of(folder)
    try:
        if written.is_file():
            packed, written = written, beside(folder, UNPACKED)
            return written, unpack(packed, written, root, folder.name)
        return written, verify(written, root, folder.name, is_common)
    except UnsafeFileError as error:
        raise OSError(errno.EIO, f"what was written is damaged, {error}") from None


def _head_of_ready(folder: Path) -> Head:
    """Return what a checkpoint that was handed over says of itself; whether it is whole shows when it is committed."""
    ready = beside(folder, READY)
    return read_packed_head(ready) if ready.is_file() else parse_head(read_text(ready / MANIFEST, root_of(folder)))


def _head_or_none(folder: Path) -> Head | None:
    """Return the same; None if it says nothing, which is found to be damaged where it is to be committed."""
    with suppress(UnsafeFileError, OSError):
        return _head_of_ready(folder)
    return None


def _drop(folder: Path) -> None:
    """Remove what was handed over of a checkpoint."""
    remove(beside(folder, UNPACKED))
    remove(beside(folder, READY))


def _is_same(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether a checkpoint is intact, and is what one with this manifest would be.

    Under another config it holds other states; and what followed an update may have been half done when it was written.
    One of several ranks is replaced: it would take long to find out.
    """
    if not all(map(is_common, manifest["files"])):
        return False
    try:
        found = verify(folder, root_of(folder)) if folder.exists() else None
    except (UnsafeFileError, OSError):
        return False
    return found is not None and all(found[key] == manifest[key] for key in ("config_hash", "unfinished"))


def _read_back(folder: Path) -> None:
    """Check that a checkpoint is as it was written, and that every file in it can be opened.

    Raises:
        OSError: It is not, or one cannot be.
    """
    if (problem := damage(folder, reads=is_common)) is not None:
        raise OSError(errno.EIO, f"read back, {problem}")
    for path in folder.iterdir():
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "np"):
                    pass
            elif path.suffix == ".json":
                msgspec.json.decode(path.read_bytes())
        except (SafetensorError, ValueError, RecursionError) as error:
            raise OSError(errno.EIO, f"read back, {path.name} cannot be read ({error})") from None


def _finish_replacement(folder: Path) -> None:
    """Remove the checkpoint that was moved aside, if its successor is whole; otherwise move it back."""
    replaced = beside(folder, REPLACED)
    if not replaced.exists():
        return
    # What cannot be read for now, as when no more files can be opened, looks damaged: then both do.
    if folder.exists() and damage(folder, None, is_common) and not damage(replaced, folder.name, is_common):
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        replaced.rename(folder)
