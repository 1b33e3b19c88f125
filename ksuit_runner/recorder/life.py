"""One life of the recorder, as the training process sees it: started as a process or a thread, until it ends."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import Pipe
from typing import IO, Any

from ksuit_runner.recorder.protocol import Answer, Channel, ClosedError, Message, Request
from ksuit_runner.recorder.server import Server, Surroundings
from ksuit_runner.system.detached_process import is_refused, start_detached

_LOGGER = logging.getLogger(__name__)
_LONGEST_OUTPUT, _MOST_OUTPUT = 2000, 1_000_000
_PING, _PING_S, _HANGS_S = -1, 10.0, 60.0


class Life:
    """Starts the recorder, sends it requests, and passes on what it sends until it ends.

    Args:
        in_place: Whether to start it in a thread of this process, as it is where no process can be started.
        on_message: Called, in a thread of its own, with whatever it sends besides answers.
        on_end: Called in that thread when it has ended.

    Attributes:
        is_in_place: Whether it runs in this process.
        is_over: Whether it has ended.
        last_words: The end of what it printed, once it has ended.
    """

    def __init__(self, in_place: bool, on_message: Callable[[Message], None], on_end: Callable[[Life], None]) -> None:
        self.is_in_place = in_place
        self.is_over = False
        self.last_words = ""
        self._on_message = on_message
        self._on_end = on_end
        self._waiting: dict[int, Future[Any]] = {}
        self._pinged: float | None = None
        self._lock = threading.Lock()
        ours, theirs = Pipe()
        self._channel = Channel(ours)
        self._output: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        if not in_place:
            try:
                self._output = _make_output()
                self._process = _start_process(theirs.fileno(), self._output)
                theirs.close()
            except OSError as error:
                if not is_refused(error):
                    raise
                _LOGGER.warning("no process can be started for the recorder, which runs in this one instead: %s", error)
                self.is_in_place = True
        if self.is_in_place:
            threading.Thread(target=Server(Channel(theirs)).serve, name="recorder", daemon=True).start()
        self._listener = threading.Thread(target=self._listen, name="recorder-client", daemon=True)
        self._listener.start()

    def ask(self, request: Request) -> Future[Any]:
        """Send a request, and return its answer; a ClosedError if the recorder ends before."""
        answer = Future[Any]()
        with self._lock:
            if self.is_over:
                answer.set_exception(ClosedError())
                return answer
            self._waiting[request.number] = answer
        with suppress(ClosedError):  # who listens notices
            self._channel.send(request)
        return answer

    def send(self, request: Request) -> None:
        """Send a request that needs no answer."""
        with suppress(ClosedError):
            self._channel.send(request)

    def end(self, timeout_s: float) -> None:
        """Close the channel, after which the recorder ends, and wait for that."""
        self._channel.close()
        self._listener.join(timeout_s)

    def _listen(self) -> None:
        with suppress(ClosedError):
            while True:
                message = self._channel.receive(_PING_S)
                self._limit_output()
                if isinstance(message, Answer) and message.number == _PING:
                    self._pinged = None
                elif isinstance(message, Answer):
                    _settle(self._waiting.pop(message.number), message)
                elif message is not None:
                    self._on_message(message)
                else:
                    self._ping()
        if self._process is not None:
            self._process.wait()
        if self._output is not None:
            self.last_words = _end_of(self._output)
            self._output.close()
        with self._lock:
            self.is_over = True
        for answer in self._waiting.values():
            answer.set_exception(ClosedError())
        self._on_end(self)

    def _ping(self) -> None:
        """Ask for a sign of life, and kill a recorder that has given none for long: it hangs, or is suspended."""
        if self._process is not None and self._process.poll() is not None:
            raise ClosedError  # a child of one of the two may have inherited its end, and keep it open
        now = time.monotonic()
        if self._pinged is None:
            self._pinged = now
            self._channel.send(Request(_PING, 0, "ping", {}))
        elif now - self._pinged > _HANGS_S and self._process is not None:
            _LOGGER.warning("the recorder process has not answered for %.0f s and is killed", now - self._pinged)
            self._process.kill()

    def _limit_output(self) -> None:
        """Drop what the recorder has printed once that is much: only the end is ever read."""
        if self._output is not None and os.fstat(self._output.fileno()).st_size > _MOST_OUTPUT:
            self._output.seek(0)  # the position is that of the recorder, too
            self._output.truncate()


def _make_output() -> IO[bytes] | None:
    with suppress(OSError):  # there is no folder for it: the recorder's last words stay unknown
        return tempfile.TemporaryFile()
    return None


def _start_process(descriptor: int, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise OSError(errno.ENOSYS, "this Python is part of another program")
    command = [sys.executable, "-P", "-m", "ksuit_runner.recorder", str(descriptor), str(os.getpid())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_import_path())}
    printed = subprocess.DEVNULL if output is None else output
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": printed, "stderr": printed}
    return start_detached(command, pass_fds=[descriptor], env=environment, **options)


def _settle(waiting: Future[Any], answer: Answer) -> None:
    if answer.error is None:
        waiting.set_result(answer.value)
    else:
        waiting.set_exception(answer.error.error())


def _end_of(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _LONGEST_OUTPUT))
    return output.read().decode(errors="replace").strip()


def surroundings() -> Surroundings:
    """Return what the recorder takes over from this process."""
    return Surroundings(dict(os.environ), _directory(), _import_path())


def _import_path() -> list[str]:
    """Return the import path of this process, for one that may have another working directory."""
    return [path or _directory() for path in sys.path if isinstance(path, str)]  # as the import system skips the others


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return os.sep
