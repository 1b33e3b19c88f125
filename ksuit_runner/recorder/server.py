"""The recorder's side of the channel: serves requests until the training process is gone."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from ksuit_runner.errors import TrackerError
from ksuit_runner.recorder.protocol import (
    Answer,
    Channel,
    CheckpointEnd,
    ClosedError,
    Failure,
    LogLine,
    Request,
    UnsendableError,
    from_text,
)
from ksuit_runner.recorder.session import Opening, Session

_DRAIN_S = 1.0  # the training process waits for longer than that at its end


class Surroundings(msgspec.Struct, frozen=True):
    """What a process takes over from the one that it works for.

    Attributes:
        environment: The environment.
        directory: The working directory.
        path: The import path.
    """

    environment: dict[str, str]
    directory: str
    path: list[str]


class Server:
    """Serves one training process.

    Args:
        channel: The channel to it.
        adopt: Called before a session is opened, with the present surroundings of the training process and with what
            the session is opened with.
    """

    def __init__(
        self,
        channel: Channel,
        adopt: Callable[[Surroundings, Opening], None] = lambda surroundings, opening: None,
    ) -> None:
        self._channel = channel
        self._adopt = adopt
        self._sessions: dict[int, Session] = {}
        self._begun = time.time()

    def serve(self) -> None:
        """Serve until the channel is closed."""
        with suppress(ClosedError):
            while True:
                message = self._channel.receive()
                if isinstance(message, Request):
                    self._take(message)
        for session in self._sessions.values():
            session.drain(_DRAIN_S)

    @property
    def records_runs(self) -> bool:
        """Whether there are runs that were not closed."""
        return any(session.records_run for session in self._sessions.values())

    def end_dead(self, reason: str | None) -> None:
        """Record the end of all runs that were not closed: their process has died."""
        ends = [
            threading.Thread(target=session.end_dead, args=(reason,), daemon=True)
            for session in self._sessions.values()
        ]
        for end in ends:
            end.start()
        for end in ends:
            end.join()

    def _take(self, request: Request) -> None:
        if request.method == "open":
            opening = msgspec.convert(request.arguments["opening"], Opening, dec_hook=from_text)
            self._adopt(msgspec.convert(request.arguments["surroundings"], Surroundings), opening)
            self._sessions[request.session] = Session(opening, partial(self._report_checkpoint, request.session))
        elif request.method == "ping":
            self._channel.send(Answer(request.number))
        elif request.method == "is_outdated":
            self._channel.send(Answer(request.number, _has_changed_since(self._begun)))
        elif request.method == "close":
            self._sessions.pop(request.session).close()
        else:
            doing = self._sessions[request.session].submit(request.method, request.arguments)
            doing.add_done_callback(partial(self._answer, request))

    def _report_checkpoint(self, session: int, name: str, error: Exception | None) -> None:
        with suppress(ClosedError):
            self._channel.send(CheckpointEnd(session, name, None if error is None else Failure.of(error)))

    def _answer(self, request: Request, doing: Future[Any]) -> None:
        error = doing.exception()
        if request.number:
            with suppress(ClosedError):
                try:
                    failure = None if error is None else Failure.of(error)
                    self._channel.send(Answer(request.number, doing.result() if error is None else None, failure))
                except UnsendableError as unsendable:  # it is waited for
                    refused = TrackerError(f"what the tracker's {request.method} has returned is refused: {unsendable}")
                    self._channel.send(Answer(request.number, error=Failure.of(refused)))


def _has_changed_since(begun: float) -> bool:
    """Whether a file that a module of this process was imported from was written or replaced after a time."""
    files = [file for module in [*sys.modules.values()] if (file := getattr(module, "__file__", None))]
    for file in files:
        with suppress(OSError):  # in an archive, or gone: what is imported is all there is
            if os.stat(file).st_ctime > begun:
                return True
    return False


class ChannelHandler(logging.Handler):
    """Passes log records on to the training process, which shows them."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record."""
        with suppress(ClosedError):  # what is logged after the end of the training process goes into the run's log
            self._channel.send(LogLine(record.name, record.levelno, self.format(record)))
