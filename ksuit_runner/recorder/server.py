"""The recorder's side of the channel: serves requests until the training process is gone."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from ksuit_runner.recorder.protocol import Answer, Channel, ClosedError, Failure, Request, from_text
from ksuit_runner.recorder.session import Opening, Session

_LOOK_S = 0.5  # between two looks at whether the training process is alive


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
        is_alive: Returns whether it is alive: a child of its may have inherited its end of the channel.
        adopt: Called with the present surroundings of the training process before a session is opened.
    """

    def __init__(
        self,
        channel: Channel,
        is_alive: Callable[[], bool] = lambda: True,
        adopt: Callable[[Surroundings], None] = lambda surroundings: None,
    ) -> None:
        self._channel = channel
        self._is_alive = is_alive
        self._adopt = adopt
        self._sessions: dict[int, Session] = {}

    def serve(self) -> None:
        """Serve until the training process closes its end, or is gone."""
        with suppress(ClosedError):
            while True:
                message = self._channel.receive(_LOOK_S)
                if isinstance(message, Request):
                    self._take(message)
                elif not self._is_alive():
                    break

    def _take(self, request: Request) -> None:
        if request.method == "open":
            self._adopt(msgspec.convert(request.arguments["surroundings"], Surroundings))
            opening = msgspec.convert(request.arguments["opening"], Opening, dec_hook=from_text)
            self._sessions[request.session] = Session(opening)
        elif request.method == "close":
            self._sessions.pop(request.session).close()
        else:
            doing = self._sessions[request.session].submit(request.method, request.arguments)
            doing.add_done_callback(partial(self._answer, request.number))

    def _answer(self, number: int, doing: Future[Any]) -> None:
        error = doing.exception()
        answer = Answer(number, doing.result()) if error is None else Answer(number, error=Failure.of(error))
        if number:
            with suppress(ClosedError):
                self._channel.send(answer)
