"""The checkpoint writer: when checkpoints are written, which are kept, and the thread that writes them."""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter, sleep
from typing import Any, Literal
from uuid import uuid4

from torch import Tensor

from ksuit_runner.checkpoint.base_weights import without_base
from ksuit_runner.checkpoint.commit import FULL, Committer, HandOver, InPlace, remove_partial
from ksuit_runner.checkpoint.folders import read_tags, tagged
from ksuit_runner.checkpoint.format import (
    RESERVED,
    Checkpoint,
    Content,
    pack_state,
    read_newest,
    write_files,
    write_head,
    write_partial,
)
from ksuit_runner.checkpoint.host_buffers import HostBuffers
from ksuit_runner.checkpoint.joint_write import JointWrite
from ksuit_runner.checkpoint.lost_checkpoints import LostCheckpoints
from ksuit_runner.checkpoint.manifest import rank_of
from ksuit_runner.checkpoint.shards import find_flaw
from ksuit_runner.config.types import NonNegativeFloat, PositiveFloat, PositiveInt, check_numbers
from ksuit_runner.counter import Interval, UpdateCounter
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import CheckpointError, ConfigError, PeerError
from ksuit_runner.paths import PathProvider

_LOGGER = logging.getLogger(__name__)
TINY = 1_000_000
"""Size in bytes up to which a state is handed over as one file, and written without a thread, if that is quick."""
_QUICK_S = 0.01
_ROOM_POLL_S = 0.5
_OWNER_S = 1.0  # how often who waits for a commit looks whether the run is still this process's
_NONE: Mapping[str, Tensor] = {}
_SMALL = 32_000_000  # bytes of a state of which several copies may be on their way
_MOST_ON_THEIR_WAY, _MOST_COPIES = 64, 4  # checkpoints; how many of the largest that are small fit into their memory


@dataclass(frozen=True)
class _Saving:
    """A checkpoint on its way.

    Attributes:
        written: Done once its files are written and handed over, with what says when it is committed.
        buffers: Hold its tensors; None if it was written at once.
    """

    written: Future[Future[None]]
    buffers: HostBuffers | None = None

    @property
    def is_done(self) -> bool:
        return self.written.done() and (self.written.exception() is not None or self.written.result().done())


class CheckpointWriter:
    """Writes the checkpoints of a run, and hands them over to be committed.

    A checkpoint is written at the given interval, when a callback requests one, at the end, and when the run is
    interrupted. The last ones are kept, every n-th, and those with a tag.

    Of several ranks, all have a writer, which is asked for the same. Rank 0 writes what all of them have, and hands the
    checkpoints over; the others write what they alone have, if there is any (``JointWrite``).

    Args:
        path_provider: Paths of the run.
        every_n_epochs: Write one after every n-th epoch.
        every_n_updates: Write one after every n-th update.
        every_n_samples: Write one after the update with which another n samples have been seen.
        keep_last: Number of newest checkpoints that are kept.
        keep_every: Keep every n-th of the interval's checkpoints for good; None keeps none of them.
        content: ``trained`` leaves out the weights that are frozen for the whole run and have not changed: a resume, a
            fork or an evaluation takes them from where the run has them from. ``all`` stores everything.
        room_timeout_s: How long the last checkpoint of a run waits for room on a full disk, in seconds.
        peer_timeout_s: How long the ranks may take to write their parts of a checkpoint, in seconds.
        config_hash: Hash of the run's config, stored with each checkpoint.
        is_urgent: Whether the run is asked to end soon, and so cannot wait for room on a full disk.
        check_owner: Raises an error if another process has taken the run over; called before every write.
        hand_over: Commits what was written; by default in the thread that has written it.
        world: The ranks of the run; by default one.
    """

    def __init__(
        self,
        path_provider: PathProvider,
        every_n_epochs: PositiveInt | None = None,
        every_n_updates: PositiveInt | None = None,
        every_n_samples: PositiveInt | None = None,
        keep_last: PositiveInt = 2,
        keep_every: PositiveInt | None = None,
        content: Literal["all", "trained"] = "all",
        room_timeout_s: NonNegativeFloat = 30.0,
        peer_timeout_s: PositiveFloat = 600.0,
        config_hash: str = "",
        check_owner: Callable[[], None] = lambda: None,
        is_urgent: Callable[[], bool] = lambda: False,
        hand_over: HandOver | None = None,
        world: World | None = None,
    ) -> None:
        check_numbers("PositiveInt", keep_last=keep_last, keep_every=keep_every)
        check_numbers("NonNegativeFloat", room_timeout_s=room_timeout_s)
        check_numbers("PositiveFloat", peer_timeout_s=peer_timeout_s)
        if content not in ("all", "trained"):
            raise ConfigError(f"all or trained is needed, not {content!r}", path="checkpoint.content")
        given = (every_n_epochs, every_n_updates, every_n_samples)
        self.content = content
        self.path_provider = path_provider
        self.config_hash = config_hash
        self.check_owner = check_owner
        self.is_urgent = is_urgent
        has_interval = any(n is not None for n in given)
        self._interval = Interval(every_n_epochs, every_n_updates, every_n_samples) if has_interval else None
        self._milestones = self._interval.times(keep_every) if keep_every and self._interval else None
        self._keep_last = keep_last
        self._room_timeout_s = room_timeout_s
        self._peer_timeout_s = peer_timeout_s
        self._world = world or World()
        self._providers: dict[str, Callable[[], Mapping[str, Tensor]]] = {}
        self._of_model = {"model"}
        self._requested: set[str] = set()
        self._hand_over = hand_over or InPlace(Committer(path_provider, check_owner))
        self._submitted: tuple[str, Future[None]] | None = None  # the last one
        self._took_s: deque[float] = deque(maxlen=100)
        self._spare: list[HostBuffers] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._saving: deque[_Saving] = deque()
        self._lost = LostCheckpoints(path_provider.checkpoints_dir)

    def add_tensors(self, name: str, provider: Callable[[], Mapping[str, Tensor]], of_model: bool = False) -> None:
        """Write tensors to a file of their own, ``NAME.safetensors``, in every checkpoint.

        Args:
            name: Name of the file without its suffix.
            provider: Returns the tensors by name; called for every checkpoint.
            of_model: Whether these are weights by their names in the model. Those that are the model's own may then be
                missing in the file: with ``content: trained``, those that are frozen.
        """
        if name in self._providers or name in RESERVED or rank_of(f"{name}.safetensors") is not None:
            raise ConfigError(f"two of them write '{name}.safetensors' into the checkpoints", path="callbacks")
        self._providers[name] = provider
        self._of_model |= {name} if of_model else set()

    def request(self, tag: str, checkpoint: str | None = None) -> None:
        """Request a checkpoint at the end of this update, with a tag, which moves there from an earlier one.

        Args:
            tag: The tag.
            checkpoint: Name of an older checkpoint that gets the tag instead, together with those of the new one.
        """
        self._requested.add(tag if checkpoint is None else f"{tag}={checkpoint}")

    def restore_tags(self, name: str, tags: Sequence[str]) -> None:
        """Restore the tags of the checkpoint that is resumed from; a kill right after its commit may have lost them."""
        if self._world.records:
            self._hand_over.restore_tags(name, tags)

    def take_requests(self) -> list[str]:
        """Return the requested tags and clear them: the next checkpoint does not get them."""
        requested, self._requested = sorted(self._requested), set()
        return requested

    @property
    def requested(self) -> list[str]:
        """The tags for which a checkpoint is requested now."""
        return sorted(self._requested)

    @property
    def is_requested(self) -> bool:
        """Whether a callback requests a checkpoint now."""
        return bool(self._requested)

    def check_interval(self, update_counter: UpdateCounter) -> None:
        """Check that the interval can ever be due.

        Raises:
            ConfigError: It counts in epochs, and the run has none.
        """
        if self._interval is not None:
            self._interval.check(update_counter, "checkpoint")

    def is_requested_as(self, tag: str) -> bool:
        """Whether a checkpoint with this tag is requested for the present state."""
        return tag in self._requested

    def name_of(self, tag: str) -> str | None:
        """Return the name of the earlier checkpoint that has a tag, also one that is to get it; None if none has."""
        moved = {key: name for key, name in tagged(self._requested, "").items() if name}
        return {**read_tags(self.path_provider), **moved}.get(tag)

    def read_tagged(self, tag: str) -> Checkpoint | None:
        """Return the checkpoint that a tag names, once it is committed; None if there is none, or it is damaged."""
        self.wait()
        name = self._world.broadcast(self.name_of(tag))
        try:
            return None if name is None else read_newest(self.path_provider, name, self._world)
        except CheckpointError as error:
            _LOGGER.error("%s", error)
            return None

    def is_due(self, update_counter: UpdateCounter) -> bool:
        """Whether the interval or a callback requires a checkpoint now."""
        return self.is_requested or (self._interval is not None and self._interval.is_due(update_counter))

    def check(self, model: Mapping[str, Any], state: Mapping[str, Any], base: Mapping[str, Tensor] = _NONE) -> None:
        """Check that a checkpoint of these can be resumed from, without writing it.

        Raises:
            CheckpointError: Something cannot be stored; the message names it.
        """
        content = pack_state(self._files(model, base), state)
        if content.shard and (problem := find_flaw(self._world.gather(content.shard.outline()))):
            raise CheckpointError(problem)

    def save(
        self,
        update_counter: UpdateCounter,
        model: Mapping[str, Any],
        state: Mapping[str, Any],
        before: Callable[[], None] = lambda: None,
        wait: bool = False,
        base: Mapping[str, Tensor] = _NONE,
    ) -> None:
        """Take a snapshot and write it in the background.

        While a large state is being written, the next one waits for it: memory has room for one copy. Small ones queue:
        whoever commits them drops those that newer ones replace, so that a slow disk does not slow training down.
        Tiny ones are written at once, as long as that is quick: handing them to another thread takes longer. What the
        ranks write together never is: that would let training wait for all of them.

        Args:
            update_counter: Position of the run.
            model: What the model's ``state_dict`` holds.
            state: State of trainer and callbacks.
            before: Writes what has to be there before the checkpoint, such as the metrics up to it.
            wait: Return only when it is on the disk; earlier ones may still be on their way.
            base: Weights that are left out, by name.

        Raises:
            CheckpointError: Something cannot be stored; or, with ``wait``, it could not be written.
        """
        content = pack_state(self._files(model, base), state)
        tags = self.take_requests()
        if self._milestones is not None and self._milestones.is_due(update_counter):
            tags.append(f"update-{update_counter.update}")
        name, joint = str(update_counter.progress), None
        if content.shard:
            folder, key = self.path_provider.checkpoints_dir / name, self._world.broadcast(uuid4().hex)
            joint = JointWrite(self._world, folder, key, self._peer_timeout_s)
        if joint is None and not self._world.records:
            return
        buffers = self._unused_buffers()
        content = content.copied(buffers, with_files=self._world.records)
        is_tiny = buffers.size <= TINY
        write = partial(self._write, name, content, is_tiny, tags, before, joint)
        if wait:
            write = partial(self._write_with_patience, write)
        if joint is not None:
            write = partial(joint.lead, write) if self._world.records else partial(_followed, joint, content)
        is_free = joint is None and all(saving.written.done() for saving in self._saving)
        if is_tiny and self._is_quick and is_free:
            self._saving.append(_Saving(self._write_now(write)))
            self._spare.append(buffers)
        else:
            self._saving.append(_Saving(self._thread.submit(write), buffers))
        if wait:
            self._finish_done(but=1)
            self._finish(self._saving.pop(), is_last=True)

    def wait(self, is_last: bool = False) -> None:
        """Wait until all checkpoints are written; a failure is an error for the last one, else a warning."""
        while self._saving:
            self._finish(self._saving.popleft(), is_last and not self._saving)

    def _files(self, model: Mapping[str, Any], base: Mapping[str, Tensor]) -> dict[str, Mapping[str, Any]]:
        files = {"model": model, **{name: provider() for name, provider in self._providers.items()}}
        if base:
            files |= without_base({name: files[name] for name in sorted(self._of_model)}, base, self._world)
        return files

    def _unused_buffers(self) -> HostBuffers:
        """Return buffers that are not being written, as soon as there are some."""
        self._finish_done()
        while self._saving and self._is_full:
            self._finish(self._saving.popleft())
            self._finish_done()
        return self._spare.pop() if self._spare else HostBuffers()

    @property
    def _is_full(self) -> bool:
        """Whether there is no room for another checkpoint, of the size of the last one, beside those on their way."""
        held = [saving.buffers.size for saving in self._saving if saving.buffers is not None]
        last = held[-1] if held else 0
        return len(self._saving) == _MOST_ON_THEIR_WAY or last > _SMALL or sum(held) + last > _MOST_COPIES * _SMALL

    def _write_now(self, write: Callable[[], Future[None]]) -> Future[Future[None]]:
        written, start = Future[Future[None]](), perf_counter()
        try:
            written.set_result(write())
        except Exception as error:
            written.set_exception(error)
        self._took_s.append(perf_counter() - start)
        return written

    def _write_with_patience(self, write: Callable[[], Future[None]]) -> Future[None]:
        """Write the last checkpoint, and wait until it is committed; while the disk is full, try again."""
        deadline, has_warned = monotonic() + self._room_timeout_s, False
        while True:
            try:
                committed = write()
                self._wait_for(committed)
                committed.result()
                return committed
            except OSError as error:
                if error.errno not in FULL or self.is_urgent() or monotonic() > deadline:
                    raise
                if not has_warned:
                    _LOGGER.warning("the last checkpoint waits for room, up to %g s: %s", self._room_timeout_s, error)
                has_warned = True
            sleep(_ROOM_POLL_S)

    @property
    def _is_quick(self) -> bool:
        return len(self._took_s) < 2 or min(self._took_s) < _QUICK_S  # the first one is never quick

    def _finish_done(self, but: int = 0) -> None:
        """Take note of what has become of the first ones on their way, but for the last ones, without waiting."""
        while len(self._saving) > but and self._saving[0].is_done:
            self._finish(self._saving.popleft())

    def _finish(self, saving: _Saving, is_last: bool = False) -> None:
        try:
            committed = saving.written.result()
            self._wait_for(committed)
            committed.result()
        except OSError as error:
            if is_last:
                raise CheckpointError(self._lost.message(error)) from error
            self._lost.add(error)
        except PeerError as error:
            if is_last:
                raise
            _LOGGER.debug("a checkpoint was not written: %s", error)  # which rank 0 says
        else:
            self._lost.end()
        finally:
            if saving.buffers is not None:
                self._spare.append(saving.buffers)

    def _wait_for(self, committed: Future[None]) -> None:
        """Wait until a checkpoint is committed, or could not be; once the run is taken over, nobody commits it."""
        if not committed.done():
            self._hand_over.hurry()
        while not futures.wait([committed], _OWNER_S).done:
            self.check_owner()

    def close(self) -> None:
        """Wait until all checkpoints are committed, and end the thread."""
        self._lost.are_last = True
        try:
            self.wait()
        finally:  # also if the run was taken over
            self._lost.close()
            self._thread.shutdown()
            self._hand_over.close()

    def _write(
        self,
        name: str,
        content: Content,
        is_tiny: bool,
        tags: list[str],
        before: Callable[[], None],
        joint: JointWrite | None,
    ) -> Future[None]:
        self.check_owner()
        before()
        if self._submitted is None or joint is not None:  # a rank that was late may have left something
            remove_partial(self.path_provider)
        if self._submitted is not None and self._submitted[0] == name:
            self._wait_for(self._submitted[1])  # until its folder is free
        folder, head = self.path_provider.checkpoints_dir / name, (self.config_hash, self._keep_last, tags)
        if joint is None:
            write_partial(folder, content, *head, is_packed=is_tiny)
        else:
            joint.write(content.shard, partial(write_files, content), partial(write_head, content, name, *head))
        committed = self._hand_over.submit(name)
        self._submitted = name, committed
        return committed


def _followed(joint: JointWrite, content: Content) -> Future[None]:
    """Write this rank's part of a checkpoint; it is committed elsewhere."""
    joint.follow(content.shard)
    done = Future[None]()
    done.set_result(None)
    return done
