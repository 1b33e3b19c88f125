"""The training process's side of the channel: starts the recorder, sends requests, and starts it again if it dies."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from typing import IO, Any

import msgspec

from ksuit_runner.errors import TrackerError
from ksuit_runner.recorder.protocol import Answer, Channel, ClosedError, Request
from ksuit_runner.recorder.server import Server, Surroundings
from ksuit_runner.recorder.session import Opening

_LOGGER = logging.getLogger(__name__)
_MOST_STARTS = 4  # for one request
_EXIT_S = 2.0
_LONGEST_OUTPUT = 2000


@dataclass
class _Life:
    """The recorder from one start to its end, as a process or, where none can be started, as a thread.

    Attributes:
        channel: The channel to it.
        process: The process; None for a thread.
        output: What it prints, such as why it dies.
        waiting: Requests that wait for an answer.
        listener: The thread that takes its answers, and ends with it.
        is_over: Whether it has ended.
        last_words: The end of what it printed, once it has ended.
    """

    channel: Channel
    process: subprocess.Popen[bytes] | None
    output: IO[bytes] | None = None
    waiting: dict[int, Future[Any]] = field(default_factory=dict)
    listener: threading.Thread = field(init=False)
    is_over: bool = False
    last_words: str = ""


class Recorder:
    """The recorder of this process: started by the first session, and again when it has died.

    Attributes:
        in_place: Whether it runs in a thread of this process.
    """

    def __init__(self, in_place: bool = False) -> None:
        self.in_place = in_place
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._life: _Life | None = None
        self._is_shut_down = False
        self._numbers = itertools.count(1)
        self._openings: dict[int, Opening] = {}

    @property
    def is_own(self) -> bool:
        """Whether this process has started it, and not one that this process was forked from."""
        return os.getpid() == self._owner

    def open(self, opening: Opening) -> int:
        """Open a session and return its number; does not wait for it."""
        session = next(self._numbers)
        with self._lock:
            life = self._living()
            self._openings[session] = opening
            self._send_opening(life, session)
        return session

    def bind(self, session: int, run_id: str) -> None:
        """Have the tracker of a session bound to a run again if the recorder dies."""
        self._openings[session] = msgspec.structs.replace(self._openings[session], run_id=run_id)

    def close(self, session: int) -> None:
        """Close a session."""
        with self._lock:
            self._openings.pop(session, None)
            if self._life is not None and not self._life.is_over:
                self._send(self._life, Request(0, session, "close", {}))

    def send(self, session: int, method: str) -> None:
        """Have a method called, without waiting for it."""
        with self._lock:
            self._send(self._living(), Request(0, session, method, {}))

    def call(self, session: int, method: str, arguments: Mapping[str, Any]) -> Any:
        """Have a method called, and return its result; repeated if the recorder dies meanwhile.

        Raises:
            TrackerError: It dies again and again.
            Exception: What the method has raised.
        """
        for _ in range(_MOST_STARTS):
            answer = Future[Any]()
            with self._lock:
                life, number = self._living(), next(self._numbers)
                life.waiting[number] = answer
                self._send(life, Request(number, session, method, dict(arguments)))
            with suppress(ClosedError):
                return answer.result()
        said = f". It printed at last:\n{life.last_words}" if life.last_words else ""
        raise TrackerError(f"the recorder process has died {_MOST_STARTS} times{said}")

    def shut_down(self) -> None:
        """Let the recorder end, and wait for it for a short while."""
        with self._lock:
            life, self._is_shut_down = self._life, True
        if life is not None and self.is_own:
            life.channel.close()
            life.listener.join(_EXIT_S)

    def _living(self) -> _Life:
        """Return the living recorder; start one if there is none."""
        if self._is_shut_down:
            raise TrackerError("the recorder of this process has ended")
        if self._life is None or self._life.is_over:
            self._life = self._start_process() if not self.in_place else self._start_thread()
            self._life.listener = threading.Thread(
                target=self._listen, args=(self._life,), name="recorder-client", daemon=True
            )
            self._life.listener.start()
            for session in self._openings:
                self._send_opening(self._life, session)
        return self._life

    def _send_opening(self, life: _Life, session: int) -> None:
        values = {"opening": self._openings[session], "surroundings": _surroundings()}
        self._send(life, Request(0, session, "open", msgspec.to_builtins(values, enc_hook=str)))

    def _send(self, life: _Life, request: Request) -> None:
        with suppress(ClosedError):  # who listens to it notices, and knows what was waiting
            life.channel.send(request)

    def _start_process(self) -> _Life:
        ours, theirs = Pipe()
        output = tempfile.TemporaryFile()  # noqa: SIM115 - read when it has died
        command = [sys.executable, "-P", "-m", "ksuit_runner.recorder", str(theirs.fileno()), str(os.getpid())]
        try:
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_path())},
                start_new_session=True,
            )
        except OSError as error:
            _LOGGER.warning("no process can be started for the recorder, which runs in this one instead: %s", error)
            ours.close()
            output.close()
            self.in_place = True
            return self._start_thread()
        finally:
            theirs.close()
        return _Life(Channel(ours), process, output)

    def _start_thread(self) -> _Life:
        ours, theirs = Pipe()
        server = Server(Channel(theirs))
        threading.Thread(target=server.serve, name="recorder", daemon=True).start()
        return _Life(Channel(ours), None)

    def _listen(self, life: _Life) -> None:
        """Pass on what the recorder sends, until it is gone."""
        with suppress(ClosedError):
            while True:
                message = life.channel.receive()
                if isinstance(message, Answer) and (waiting := life.waiting.pop(message.number, None)):
                    if message.error is None:
                        waiting.set_result(message.value)
                    else:
                        waiting.set_exception(message.error.error())
        with self._lock:
            life.is_over = True
        if life.process is not None and life.output is not None:
            life.process.wait()
            life.last_words = _end_of(life.output)
            life.output.close()
        for answer in life.waiting.values():
            answer.set_exception(ClosedError())


def _import_path() -> list[str]:
    """Return the import path of this process, for one that may have another working directory."""
    return [path or os.getcwd() for path in sys.path]


def _end_of(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _LONGEST_OUTPUT))
    return output.read().decode(errors="replace").strip()


def _surroundings() -> Surroundings:
    try:
        directory = os.getcwd()
    except OSError:  # it was removed
        directory = os.sep
    return Surroundings(dict(os.environ), directory, _import_path())
