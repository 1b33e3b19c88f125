"""The world of several ranks: exchanges that end in bounded time, whatever happens to the other ranks."""

import ctypes
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from ksuit_runner.distributed.notes import SUSPENDED_S, Failure, Notes
from ksuit_runner.distributed.peer_watch import PeerWatch
from ksuit_runner.distributed.world import World
from ksuit_runner.errors import Interrupted, KsuitError, PeerError

_LOGGER = logging.getLogger(__name__)
_STEP_S = 0.5  # how often a wait looks for notes
_STEP = timedelta(seconds=_STEP_S)
_SILENT_S = 15.0  # without a sign of life for so long, a rank does not answer
_SILENT_GPU_S = 60.0  # and while this rank may be waiting for a GPU, where it would notice nothing
_CUT_OFF_BEATS = 4.0  # and after so many beats if its connection is broken as well
_FIRST_BYTES = 1024  # of a value; the rest follows if there is more
_CPU = torch.device("cpu")
_LEAVE_S, _LEAVE_BROKEN_S = 10.0, 2.0
_MORE = 0.1  # of the time limit: how long a rank may be even later
_COLLECTIVES = ("gloo", "NCCL", "c10d", "process group")  # what the errors of torch's own exchanges speak of
# Torch 2.13 has renamed it.
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks(World):
    """The world of one of several ranks.

    An exchange that a rank has given up leaves the groups of torch unusable: all that follow fail as well, until
    ``recover`` has made new ones.

    Args:
        store: A store of torch for the groups.
        notes: The notes of this rank.
        rank: Number of this rank.
        size: Number of ranks.
        local_rank: Number of this rank on its machine.
        timeout_s: How long a rank waits for the others where they live, in seconds.
        backend: Backends of the groups, as ``torch.distributed.init_process_group`` takes them.
        holder: The rank that holds the store, and has to live as long as the others need it; None if none does.

    Attributes:
        timeout_s: How long this rank waits for the others where they live, in seconds.
    """

    def __init__(
        self,
        store: Any,
        notes: Notes,
        rank: int,
        size: int,
        local_rank: int,
        timeout_s: float,
        backend: str = "gloo",
        holder: int | None = None,
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store
        self._notes = notes
        self._peers = PeerWatch(notes, rank, holder)
        self.timeout_s = timeout_s
        self._backend = backend
        self._holder = holder
        self._meeting = 0
        self._broken: BaseException | None = None
        self._under_way = 0  # exchanges that were begun, and not finished
        self._meet()
        if "nccl" in backend:
            notes.after_look = self._free

    # Exchanges

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, see ``World.gather``."""
        return [msgspec.msgpack.decode(part) for part in self._gather_bytes(msgspec.msgpack.encode(value))]

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0, see ``World.broadcast``."""
        own = msgspec.msgpack.encode(value) if self.rank == 0 else b""
        return msgspec.msgpack.decode(self._gather_bytes(own)[0])

    def gather_tensors(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the tensors of all ranks, see ``World.gather_tensors``."""
        own = [tensor.detach().cpu().contiguous() for tensor in tensors]
        kinds = self.gather([(str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for tensor in own])
        data = torch.cat([torch.empty(0, dtype=torch.uint8), *(tensor.reshape(-1).view(torch.uint8) for tensor in own)])
        sizes = [sum(_byte_count(dtype, shape) for dtype, shape in each) for each in kinds]
        gathered: list[list[Tensor]] = []
        for described, part in zip(kinds, self._gather_padded(data, sizes), strict=True):
            found, start = [], 0
            for name, shape in described:
                stop = start + _byte_count(name, shape)
                # A copy, because an element has to begin at a multiple of its size.
                found.append(part[start:stop].clone().view(getattr(torch, name)).reshape(shape))
                start = stop
            gathered.append(found)
        return gathered

    def start(self, begin: Callable[[], Any]) -> Any:
        """Begin an exchange of torch in the groups of this world, and return its work.

        Raises:
            PeerError: As ``gather``.
        """
        if self._broken is not None:
            raise self._broken
        self._notes.exchanges += 1
        self._under_way += 1
        try:
            return begin()
        except RuntimeError as error:
            raise self._explain(error) from error

    def finish(self, work: Any, device: torch.device = _CPU) -> None:
        """Wait for an exchange that was begun; on a GPU, have what comes next on its stream wait.

        Args:
            work: What ``start`` has returned.
            device: Device of what is exchanged.

        Raises:
            PeerError: As ``gather``.
        """
        if device.type != "cpu":  # with a time limit, NCCL would block, and abort at the end of it
            work.wait()
            self._under_way -= 1
            return
        began = looked_at = time.monotonic()
        is_over = False
        while True:
            try:
                work.wait(_STEP)
                self._under_way -= 1
                return
            except RuntimeError as error:
                if is_over:
                    raise self._explain(error) from error
            is_over = work.is_completed()
            if is_over:  # maybe only since that wait has timed out: the next one says how it has ended
                continue
            now = time.monotonic()
            if now - looked_at > SUSPENDED_S:  # by a scheduler, with all ranks: what it has not heard says nothing
                self._notes.excuse()
                began = now
            else:
                self._check(began)
            looked_at = now

    def _gather_bytes(self, value: bytes) -> list[bytes]:
        first = bytearray(_FIRST_BYTES)
        first[:8] = len(value).to_bytes(8, "little")
        first[8 : 8 + len(value)] = value[: _FIRST_BYTES - 8]
        gathered = self._gather_equal(torch.frombuffer(first, dtype=torch.uint8)).numpy()
        sizes = [int.from_bytes(part[:8].tobytes(), "little") for part in gathered]
        if max(sizes) <= _FIRST_BYTES - 8:
            return [part[8 : 8 + size].tobytes() for part, size in zip(gathered, sizes, strict=True)]
        data = torch.frombuffer(bytearray(value or b" "), dtype=torch.uint8)[: len(value)]
        return [part.numpy().tobytes() for part in self._gather_padded(data, sizes)]

    def _gather_padded(self, data: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return the bytes of all ranks, of which each has the given number."""
        if not max(sizes):
            return [data.new_empty(0) for _ in sizes]
        padded = data.new_zeros(max(sizes))
        padded[: len(data)] = data
        return [part[:size] for part, size in zip(self._gather_equal(padded), sizes, strict=True)]

    def _gather_equal(self, data: Tensor) -> Tensor:
        """Return the bytes of all ranks, of which each has the same number; shape (ranks, bytes)."""
        output = data.new_empty(self.size * len(data))
        self.finish(self.start(lambda: all_gather(output, data, async_op=True)))
        return output.view(self.size, -1)

    # Notes

    def post(self, key: str, value: Any) -> None:
        """Leave a note for the other ranks, see ``World.post``."""
        try:
            self._notes.post(key, msgspec.msgpack.encode(value))
        except TimeoutError as error:
            raise PeerError(f"a note for the other ranks cannot be posted: {error}") from error

    def read(self, key: str, timeout_s: float) -> Any:
        """Return a note as soon as it is there, see ``World.read``."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                return msgspec.msgpack.decode(self._notes.read(key, max(0.0, min(left, _STEP_S))))
            except TimeoutError:
                if (failure := self._notes.failure or self._lost()) is not None:
                    raise failure.error from None
                if left <= _STEP_S:
                    raise PeerError(f"no rank has left the note '{key}' within {timeout_s:g} s") from None

    def forget(self, key: str) -> None:
        """Remove a note, see ``World.forget``."""
        with suppress(TimeoutError):  # it only takes memory
            self._notes.forget(key)

    # Failures

    def explain(self, error: BaseException) -> BaseException:
        """Return what is behind an error, see ``World.explain``."""
        if not isinstance(error, RuntimeError) or not any(name in str(error) for name in _COLLECTIVES):
            return error
        return self._broken or self._explain(error)

    def fail(self, error: BaseException) -> None:
        """Let the other ranks know that this one has failed, see ``World.fail``."""
        failure = self._notes.fail(Failure.of(self.explain(error), self.rank))
        self._give_up(failure, abandoned=self._under_way > 0)

    def recover(self) -> bool:
        """Meet the other ranks again, in new groups; see ``World.recover``."""
        self._give_up(Failure(self.rank, "the ranks meet again"), abandoned=True)
        self._meeting += 1
        try:
            self._notes.post(f"meeting/{self._meeting}/{self.rank}", b"")
            if self.rank == 0:
                is_complete = all(self._awaits(f"meeting/{self._meeting}/{rank}") for rank in range(self.size))
                self._notes.post(f"meeting/{self._meeting}", b"complete" if is_complete else b"")
            elif self._awaits(f"meeting/{self._meeting}"):
                is_complete = bool(self._notes.read(f"meeting/{self._meeting}", _STEP_S))
            else:
                is_complete = False
            if is_complete:
                self._meet()
        except (TimeoutError, RuntimeError, KsuitError) as error:
            _LOGGER.debug("the ranks do not meet again: %s", error)
            return False
        return is_complete

    def _awaits(self, key: str) -> bool:
        """Wait for a note, and return whether it has come: not if a rank is lost, or time is up."""
        was_late = self._notes.failure is not None and self._notes.failure.was_late
        deadline = time.monotonic() + self.timeout_s * (_MORE if was_late else 1.0)
        while time.monotonic() < deadline and self._lost() is None:
            with suppress(TimeoutError):
                self._notes.read(key, _STEP_S)
                return True
        return False

    def _meet(self) -> None:
        """Make new groups, together with all other ranks."""
        self._notes.meet(self._meeting)
        self._notes.exchanges = self._under_way = 0
        dist.init_process_group(
            self._backend,
            store=dist.PrefixStore(f"group/{self._meeting}", self._store),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=self.timeout_s),
        )
        self._broken = None

    def _check(self, began: float) -> None:
        """Raise an error if there is no point in waiting any longer for an exchange that began at this time."""
        failure = self._notes.failure or self._lost()
        waited = time.monotonic() - began
        if failure is None and waited > self.timeout_s:
            failure = self._peers.late(waited)
        if failure is not None:
            raise self._abandon(failure)

    def _explain(self, error: RuntimeError) -> BaseException:
        """Return why an exchange has ended early: another rank has left it, and usually says why."""
        deadline = time.monotonic() + (_CUT_OFF_BEATS + 1) * self._notes.beat_s
        failure = None
        while failure is None and time.monotonic() < deadline:
            self._notes.look(_STEP_S)
            failure = self._notes.failure or self._lost(_CUT_OFF_BEATS * self._notes.beat_s)
            if failure is None:
                time.sleep(0.05)
        if failure is None:
            failure = Failure(self.rank, f"the connection to another rank is broken: {str(error).splitlines()[0]}")
        return self._abandon(failure)

    def _lost(self, silent_s: float = _SILENT_S) -> Failure | None:
        """Return that another rank gives no signs of life, if so: after so many seconds, or half the time limit."""
        return self._peers.lost(min(silent_s, self.timeout_s / 2))

    def _abandon(self, failure: Failure) -> BaseException:
        """Give an exchange up, tell the others why, and return the error."""
        failure = self._notes.fail(failure)
        self._give_up(failure, abandoned=True)
        return failure.error

    def _give_up(self, failure: Failure, abandoned: bool) -> None:
        """Give the groups up.

        Their connections are closed, so that whoever waits for this rank notices it at once. If an exchange was
        abandoned they stay open, even at exit: to close them, gloo would wait for the exchange until its time is up,
        and stop all threads meanwhile.
        """
        if self._broken is not None:
            return
        self._broken = failure.error
        if abandoned:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
        with suppress(Exception):  # of groups that were never whole; without this the others notice it by the notes
            dist.distributed_c10d._abort_process_group()

    def _free(self) -> None:
        """Abort the exchanges of NCCL if another rank is lost: a thread that waits for a GPU cannot look for notes."""
        failure = self._notes.failure or self._lost(_SILENT_GPU_S)
        if failure is not None and self._broken is None:
            _LOGGER.debug("the exchanges between GPUs are aborted: %s", failure.text)
            self._give_up(failure, abandoned=True)

    def close(self) -> None:
        """Leave the other ranks, see ``World.close``."""
        if self._broken is None and self._under_way:
            self._abandon(Failure(self.rank, f"rank {self.rank} has left amid an exchange"))
        if self._broken is None:
            with suppress(PeerError, Interrupted):
                self._gather_bytes(b"")
        with suppress(TimeoutError):
            self._notes.post(f"left/{self.rank}", b"")
        if dist.is_initialized():
            with suppress(Exception):  # the process is about to end, with a status of its own
                dist.destroy_process_group()
        if self._holder == self.rank:
            self._wait_for_others()
        self._notes.close()

    def _wait_for_others(self) -> None:
        """Wait until no other rank needs the store any more; a lost one does not."""
        deadline = time.monotonic() + (_LEAVE_S if self._broken is None else _LEAVE_BROKEN_S)
        for rank in range(1, self.size):
            while time.monotonic() < deadline and not self._peers.is_silent(rank, _CUT_OFF_BEATS * self._notes.beat_s):
                with suppress(TimeoutError):
                    self._notes.read(f"left/{rank}", _STEP_S)
                    break


def _byte_count(dtype: str, shape: Sequence[int]) -> int:
    return int(getattr(torch, dtype).itemsize * torch.Size(shape).numel())
