"""What the ranks of a run tell each other beside their exchanges: notes in a store, failures, and signs of life."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from signal import SIGINT
from typing import Any, NamedTuple

import msgspec

from ksuit_runner.errors import Interrupted, PeerError

_LOGGER = logging.getLogger(__name__)
SUSPENDED_S = 3.0
"""A process in which nothing went on for so long, in seconds, was suspended itself, mostly together with all ranks."""
_BEAT_S = 1.0
_LOOK_S, _MOST_LOOK_S = 0.01, 0.05  # a wait for a note looks for it less and less often: it may take minutes
_ANSWER_S = 10.0  # for the store to do what it is asked
_DEAF_BEATS = 3.0  # without an answer for so long, the store is no longer waited for
_RANKS_PER_BEAT = 64  # a rank reads the signs of all others: more ranks beat less often


class Failure(msgspec.Struct, array_like=True, frozen=True):
    """Why the ranks cannot go on together.

    Attributes:
        rank: The rank that has failed, or that is lost.
        text: What happened, in one line.
        signal: Number of the signal that interrupted it, if one did.
        was_late: Whether the others have waited for it for as long as they may already.
    """

    rank: int
    text: str
    signal: int | None = None
    was_late: bool = False

    @classmethod
    def of(cls, error: BaseException, rank: int) -> "Failure":
        """Return that a rank has failed with an error, or was interrupted by a signal."""
        if isinstance(error, (Interrupted, KeyboardInterrupt)):
            number = error.number if isinstance(error, Interrupted) else SIGINT
            return cls(rank, f"rank {rank} was interrupted by signal {number}", number)
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        return cls(rank, f"rank {rank} has failed: {text}")

    @property
    def error(self) -> BaseException:
        """The error to raise on the other ranks."""
        return PeerError(self.text) if self.signal is None else Interrupted(self.signal)


class Sign(NamedTuple):
    """The last sign of life of a rank.

    Attributes:
        beat: Its number; a new one is a new sign.
        exchanges: How many exchanges the rank has entered.
        at: When this rank has seen it first, in seconds of the monotonic clock.
    """

    beat: int
    exchanges: int
    at: float


@dataclass
class _Wanted:
    key: str
    found: "Future[bytes]" = field(default_factory=Future)


@dataclass
class _Request:
    work: Callable[[], object]
    done: "Future[None]" = field(default_factory=Future)

    def do(self) -> None:
        try:
            self.work()
        except Exception as error:
            self.done.set_exception(TimeoutError(str(error)))
            raise
        self.done.set_result(None)


class Notes:
    """Reads and leaves notes in a store, and gives signs of life, in a thread of its own.

    No other thread uses the connection, so that none of them hangs when the process that holds the store does.

    Args:
        store: A store of torch, with a connection of its own.
        rank: Number of this rank.
        size: Number of ranks.

    Attributes:
        exchanges: How many exchanges this rank has entered, for its signs of life.
        answered_at: When the store has answered last, in seconds of the monotonic clock.
        is_cut_off: Whether the connection to the store is broken, which it then is for good.
        after_look: Called in the thread of the notes after each look at those of the others.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.exchanges = 0
        self.answered_at = time.monotonic()
        self.is_cut_off = False
        self.after_look: Callable[[], object] = bool
        self.beat_s = _BEAT_S * max(1.0, size / _RANKS_PER_BEAT)
        self._store = store
        self._scope: str | None = None
        self._rank = rank
        self._size = size
        self._meeting = 0
        self._has_all = False  # signs of life of all ranks
        self._failure: Failure | None = None
        self._signs: dict[int, Sign] = {}
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._wanted: list[_Wanted] = []
        self._thread = threading.Thread(target=self._run, name="notes", daemon=True)
        self._thread.start()

    # For any thread

    def enter(self, scope: str) -> None:
        """Leave and read notes under a common name from now on, begin the first meeting, and give signs of life.

        Raises:
            TimeoutError: The store does not answer.
        """
        self._ask(lambda: self._enter(scope))

    def post(self, key: str, value: bytes) -> None:
        """Leave a note.

        Raises:
            TimeoutError: The store does not answer.
        """
        self._ask(lambda: self._store.set(self._key("note", key), value))

    def read(self, key: str, timeout_s: float) -> bytes:
        """Return a note as soon as it is there.

        Raises:
            TimeoutError: It is not there in time.
        """
        wanted = _Wanted(self._key("note", key))
        self._requests.put(_Request(lambda: self._wanted.append(wanted)))
        try:
            return wanted.found.result(timeout_s)
        except FutureTimeoutError:
            wanted.found.cancel()
            raise TimeoutError from None

    def forget(self, key: str) -> None:
        """Remove a note.

        Raises:
            TimeoutError: The store does not answer.
        """
        self._ask(lambda: self._store.delete_key(self._key("note", key)))

    def fail(self, failure: Failure) -> Failure:
        """Post why this meeting of the ranks ends, and return what was posted first."""
        with suppress(TimeoutError):
            self._ask(lambda: self._post_failure(failure))
        return self._failure or failure

    def look(self, timeout_s: float) -> None:
        """Read failures and signs of life anew; give up in silence if the store does not answer."""
        with suppress(TimeoutError):
            self._ask(self._beat, timeout_s)

    @property
    def failure(self) -> Failure | None:
        """Why the ranks cannot go on together, as far as it was read."""
        return self._failure

    def signs(self) -> dict[int, Sign]:
        """Return the last signs of life of all ranks, as far as they were read."""
        return dict(self._signs)

    def excuse(self) -> None:
        """Take it that the store and the other ranks have just given a sign of life."""
        self.answered_at = now = time.monotonic()
        self._signs = {rank: sign._replace(at=now) for rank, sign in self._signs.items()}

    def meet(self, meeting: int) -> None:
        """Begin another meeting of the ranks, for which no failure was posted yet."""
        self._ask(lambda: self._begin(meeting))

    def close(self) -> None:
        """End the thread, unless it hangs."""
        self._requests.put(None)
        self._thread.join(self.beat_s)

    def _ask(self, work: Callable[[], object], timeout_s: float = _ANSWER_S) -> None:
        request = _Request(work)
        self._requests.put(request)
        if time.monotonic() - self.answered_at > _DEAF_BEATS * self.beat_s:
            timeout_s = min(timeout_s, self.beat_s)
        try:
            request.done.result(timeout_s)
        except FutureTimeoutError as error:
            raise TimeoutError(str(error) or "the store does not answer") from None

    # In the thread

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            _LOGGER.debug("the store of the ranks is out of reach: %s", error)
            self.is_cut_off = True
            while (request := self._requests.get()) is not None:
                request.done.set_exception(TimeoutError("the store is out of reach"))

    def _serve(self) -> None:
        next_beat, look_s = time.monotonic(), _LOOK_S
        while True:
            left = max(0.0, next_beat - time.monotonic()) if self._scope is not None else self.beat_s
            began = time.monotonic()
            with suppress(Empty):
                try:
                    request = self._requests.get(timeout=min(left, look_s) if self._wanted else left)
                finally:
                    if time.monotonic() - began > left + SUSPENDED_S:
                        self.excuse()
                if request is None:
                    return
                look_s = 0.0
                request.do()
                self.answered_at = time.monotonic()
            self._find()
            look_s = min(max(2 * look_s, _LOOK_S), _MOST_LOOK_S * self.beat_s)
            if self._scope is not None and time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self.beat_s
                self._beat()
                self.after_look()

    def _enter(self, scope: str) -> None:
        # Before the first sign: of a rank that has given one, the others read its word on failures, and would wait.
        self._scope = scope
        self._begin(self._meeting)
        self._beat()

    def _find(self) -> None:
        for wanted in list(self._wanted):
            if wanted.found.cancelled():
                self._wanted.remove(wanted)
            elif self._store.check([wanted.key]):
                value = self._store.get(wanted.key)
                self._wanted.remove(wanted)
                if wanted.found.set_running_or_notify_cancel():
                    wanted.found.set_result(value)

    def _beat(self) -> None:
        beat = self._signs[self._rank].beat + 1 if self._rank in self._signs else 1
        self._signs[self._rank] = Sign(beat, self.exchanges, time.monotonic())
        self._store.set(self._key("sign", self._rank), f"{beat} {self.exchanges}")
        others = [rank for rank in range(self._size) if rank != self._rank]
        if not self._has_all:  # reading what is not there would wait
            self._has_all = self._store.check([self._key("sign", rank) for rank in others])
            if not self._has_all:
                return
        *signs, failure = self._store.multi_get([*(self._key("sign", rank) for rank in others), self._failure_key])
        for rank, text in zip(others, signs, strict=True):
            found, exchanges = map(int, text.split())
            if rank not in self._signs or self._signs[rank].beat != found:
                self._signs[rank] = Sign(found, exchanges, time.monotonic())
        if failure and self._failure is None:
            self._failure = msgspec.msgpack.decode(failure, type=Failure)
        self.answered_at = time.monotonic()

    @property
    def _failure_key(self) -> str:
        return self._key("failure", self._meeting)

    def _key(self, kind: str, name: object) -> str:
        return f"{self._scope or ''}/{kind}/{name}"

    def _post_failure(self, failure: Failure) -> None:
        text = msgspec.msgpack.encode(failure)
        self._failure = msgspec.msgpack.decode(self._store.compare_set(self._failure_key, "", text), type=Failure)

    def _begin(self, meeting: int) -> None:
        self._meeting, self._failure = meeting, None
        self._store.compare_set(self._failure_key, "", "")
