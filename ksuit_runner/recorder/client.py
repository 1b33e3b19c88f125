"""The recorder as the training process uses it: its sessions survive its deaths."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

from ksuit_runner.errors import TrackerError
from ksuit_runner.recorder.life import Life, surroundings
from ksuit_runner.recorder.protocol import CheckpointEnd, ClosedError, LogLine, Message, Request
from ksuit_runner.recorder.session import Opening

_LOGGER = logging.getLogger(__name__)
_MOST_STARTS = 4  # for one request
_MOST_QUOTED = 4  # lines in the error, the last ones: they say what a traceback is about
_MOST_DEATHS, _DEATHS_S = 3, 60.0  # while it follows a run: so many within this time are too many
_EXIT_S = 2.0
_CONTINUES = (
    "Training continues, and everything stays in the run's folder; the end of the run, resume= or sync= sends it"
)


class Checkpoints(Protocol):
    """Learns what becomes of the checkpoints of a run that is recorded; called in threads of their own."""

    def ended(self, name: str, error: Exception | None) -> None:
        """A checkpoint was committed, or could not be."""

    def recorder_died(self) -> None:
        """The recorder has died, and is not started again yet."""

    def recorder_restarted(self) -> None:
        """It follows the folder again, and has finished what it was doing when it died."""

    def recorder_given_up(self) -> None:
        """No recorder follows the folder until one is told to again: it died too often, or could not any more."""


@dataclass
class _Session:
    """What a session is made from again when the recorder has died.

    Attributes:
        opening: What it was opened with.
        described: Answer to its first request, until that is read.
        run: The run that it is to record, as ``Session`` is told.
        checkpoints: Learns of its checkpoints.
        is_started: Whether its folder is to be followed.
        is_notified: Whether a notification is under way.
        has_news: Whether another one is due after it.
    """

    opening: Opening
    described: Future[Any] | None = None
    run: dict[str, Any] | None = None
    checkpoints: Checkpoints | None = None
    is_started: bool = False
    is_notified: bool = False
    has_news: bool = False


class RecorderClient:
    """The recorder of this process: started by the first session, and again when it has died.

    While it follows a run, it is started again at once. If it keeps dying, only when it is asked for something; and it
    follows that run no more.

    Args:
        in_place: Whether it runs in a thread of this process, as it does where no process can be started.

    Attributes:
        in_place: Whether it does.
    """

    def __init__(self, in_place: bool = False) -> None:
        self.in_place = in_place
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._life: Life | None = None
        self._deaths: deque[float] = deque(maxlen=_MOST_DEATHS)
        self._is_shut_down = self._is_used = False
        self._numbers = itertools.count(1)
        self._sessions: dict[int, _Session] = {}
        self._abandoned: deque[int] = deque()

    @property
    def is_own(self) -> bool:
        """Whether this process has started it, and not one that this process was forked from."""
        return os.getpid() == self._owner

    def is_outdated(self) -> bool:
        """Whether a file of the code that it has imported has changed since it was started."""
        with self._lock:
            if self._life is None or self._life.is_in_place:  # there, code is what this process has
                return False
            answer = self._life.ask(Request(next(self._numbers), 0, "is_outdated", {}))
        with suppress(ClosedError):
            return bool(answer.result())
        return False  # it has died, and is started again

    def retire(self) -> None:
        """Let it end if no session of it is in use any more; else it ends with this process."""
        with self._lock:
            in_use = self._sessions.keys() - self._abandoned
        if not in_use:
            self.shut_down()

    def follows(self, session: int) -> bool:
        """Whether it follows the run of a session, or is started again for it if it has just died."""
        return self._sessions[session].is_started

    def open(self, opening: Opening) -> int:
        """Open a session and return its number; does not wait for it."""
        with self._lock:
            while self._abandoned:
                self.close(self._abandoned.popleft())
            life, number = self._living(), next(self._numbers)
            self._sessions[number] = state = _Session(opening)
            self._open(life, number)
            state.described = life.ask(Request(next(self._numbers), number, "describe", {}))
        return number

    def describe(self, session: int) -> Any:
        """Return the ``Description`` of a session's tracker, which is built first of all; for errors see ``call``."""
        state = self._sessions[session]
        described, state.described = state.described, None
        if described is not None:
            with suppress(ClosedError):
                return described.result()
        return self.call(session, "describe", {})

    def close(self, session: int) -> None:
        """Close a session; in a forked child it stays open for the parent."""
        if not self.is_own:
            return
        with self._lock:
            self._sessions.pop(session)
            if self._life is not None:
                self._life.send(Request(0, session, "close", {}))

    def abandon(self, session: int) -> None:
        """Have a session closed when the next one is opened; takes no lock, so that a finalizer can call it."""
        self._abandoned.append(session)

    def bind(self, session: int, run_id: str) -> None:
        """Have the tracker of a session bound to a run again if the recorder dies."""
        state = self._sessions[session]
        state.opening = msgspec.structs.replace(state.opening, run_id=run_id)

    def warm_up(self, session: int) -> None:
        """Have imported what the tracker of a session will need; does not wait for it."""
        with self._lock:
            self._living().send(Request(0, session, "warm_up", {}))

    def record(self, session: int, run_id: str, token: str, checkpoints: Checkpoints) -> None:
        """Have a run recorded; see ``RecordedRun``."""
        state = self._sessions[session]
        state.run, state.checkpoints = {"run_id": run_id, "token": token}, checkpoints
        with self._undone_on_error(session):  # stored first: if it dies meanwhile or right after, its successor records
            self.call(session, "record", state.run)

    def start(self, session: int) -> None:
        """Have the folder of the run followed."""
        self._sessions[session].is_started = True
        with self._undone_on_error(session):
            self.call(session, "start", {})

    def notify(self, session: int) -> None:
        """Have the run's folder looked at now; does not wait, and never for a recorder that hangs."""
        state = self._sessions[session]
        with self._lock:
            state.has_news = state.is_notified
            if state.is_notified or self._life is None or not self.follows(session):
                return
            state.is_notified = True
            answer = self._life.ask(Request(next(self._numbers), session, "notify", {}))
        answer.add_done_callback(partial(self._notify_again, session))

    def _notify_again(self, session: int, _: Future[Any]) -> None:
        with self._lock:
            state = self._sessions.get(session)
            if state is not None:
                state.is_notified = False
        if state is not None and state.has_news:
            self.notify(session)

    def hurry(self, session: int) -> None:
        """Have the run's checkpoints committed without a pause; does not wait for that."""
        with self._lock:
            if self._life is not None and self.follows(session):
                self._life.send(Request(0, session, "hurry", {}))

    def close_run(self, session: int) -> None:
        """Have the run recorded no more; waits for a bounded time until nothing in its folder changes any more."""
        with suppress(ClosedError, TimeoutError):
            self._let_go_of_run(session).result(_EXIT_S)

    def _let_go_of_run(self, session: int) -> Future[Any]:
        with self._lock:
            state = self._sessions[session]
            state.run, state.is_started = None, False
            assert self._life is not None, "the session was opened in one"
            return self._life.ask(Request(next(self._numbers), session, "close_run", {}))

    @contextmanager
    def _undone_on_error(self, session: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._let_go_of_run(session)
            raise

    def call(
        self, session: int, method: str, arguments: Mapping[str, Any], again: Mapping[str, Any] = MappingProxyType({})
    ) -> Any:
        """Have a method called, and return its result; repeated if the recorder dies meanwhile.

        Args:
            session: Number of the session.
            method: Name of the method.
            arguments: Its arguments, by name.
            again: Arguments that a repetition has besides, or instead.

        Raises:
            TrackerError: It dies again and again.
            Exception: What the method has raised.
        """
        self._is_used = True
        for number in range(_MOST_STARTS):
            if number:
                arguments = {**arguments, **again}
            with self._lock:
                life = self._living()
                answer = life.ask(Request(next(self._numbers), session, method, dict(arguments)))
            with suppress(ClosedError):
                return answer.result()
        raise TrackerError(f"the recorder process has died {_MOST_STARTS} times{_quote(life.last_words, _MOST_QUOTED)}")

    def shut_down(self) -> None:
        """Let the recorder end, and wait for it for a short while if it has done anything."""
        if not self.is_own:  # nor may its lock be waited for, which another thread may have held at the fork
            return
        with self._lock:
            life, self._is_shut_down = self._life, True
        if life is not None:
            life.end(_EXIT_S if self._is_used else 0.0)

    def _living(self) -> Life:
        """Return the living recorder; start one if there is none."""
        if self._is_shut_down or not self.is_own:
            raise TrackerError("the recorder has ended, or is another process's")
        if self._life is None or self._life.is_over:
            for checkpoints in self._followed(*self._sessions).values():
                checkpoints.recorder_died()
            self._life = Life(self.in_place, self._take, self._restart)
            self.in_place = self._life.is_in_place
            for number in self._sessions:
                self._open(self._life, number)
        return self._life

    def _open(self, life: Life, number: int) -> None:
        state = self._sessions[number]
        values = {"opening": state.opening, "surroundings": surroundings()}
        life.send(Request(0, number, "open", msgspec.to_builtins(values, enc_hook=str)))
        if state.run is not None:
            recorded = life.ask(Request(next(self._numbers), number, "record", state.run))
            recorded.add_done_callback(partial(self._check_restart, number))
        if state.is_started:
            started = life.ask(Request(next(self._numbers), number, "start", {}))
            started.add_done_callback(partial(self._report_restart, number))

    def _take(self, message: Message) -> None:
        if isinstance(message, LogLine):
            logging.getLogger(message.logger).log(message.level, "%s", message.text)
        elif isinstance(message, CheckpointEnd):
            state = self._sessions.get(message.session)
            if state is not None and state.checkpoints is not None:
                state.checkpoints.ended(message.name, None if message.error is None else message.error.error())

    def _report_restart(self, session: int, started: Future[Any]) -> None:
        if self._check_restart(session, started):
            for checkpoints in self._followed(session).values():
                checkpoints.recorder_restarted()

    def _check_restart(self, session: int, answer: Future[Any]) -> bool:
        """Return whether a recorder that was started again has done a request, or give it up for that run."""
        error = answer.exception()
        if error is not None and not isinstance(error, ClosedError):  # else it is started again
            with self._lock:
                given_up = self._followed(session)
                if given_up:
                    self._let_go_of_run(session)
            for checkpoints in given_up.values():
                _LOGGER.error("the recorder process cannot follow the run any more: %s\n%s", error, _CONTINUES)
                checkpoints.recorder_given_up()
        return error is None

    def _followed(self, *sessions: int) -> dict[int, Checkpoints]:
        """Return those of the sessions whose run is followed, with who learns of its checkpoints."""
        states = [(session, self._sessions[session]) for session in sessions if session in self._sessions]
        return {session: state.checkpoints for session, state in states if state.is_started and state.checkpoints}

    def _restart(self, life: Life) -> None:
        """Start it again if it has died while it followed a run, and not too often."""
        with self._lock:
            followed = self._followed(*self._sessions)
            if self._is_shut_down or self._life is not life or not followed:
                return
            self._deaths.append(time.monotonic())
            is_given_up = len(self._deaths) == _MOST_DEATHS and self._deaths[-1] - self._deaths[0] < _DEATHS_S
            if not is_given_up:
                _LOGGER.warning("the recorder process has died and is started again%s", _quote(life.last_words))
                try:
                    self._living()
                    return
                except OSError as error:
                    _LOGGER.error("the recorder process cannot be started: %s", error)
            count = len(self._deaths)
            self._deaths.clear()
            for session in followed:
                self._let_go_of_run(session)
        _LOGGER.error("the recorder process has died %d times%s\n%s", count, _quote(life.last_words), _CONTINUES)
        for checkpoints in followed.values():
            checkpoints.recorder_given_up()


def _quote(last_words: str, most_lines: int = 0) -> str:
    """Return what a process printed at last, the end of it or all that is known."""
    return ". It printed at last:\n" + "\n".join(last_words.splitlines()[-most_lines:]) if last_words else ""
