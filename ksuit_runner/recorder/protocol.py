"""What the training process and the recorder send each other: requests, their answers, and events."""

import inspect
import json
import socket
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from ksuit_runner import errors
from ksuit_runner.errors import KsuitError, TrackerError


class ClosedError(Exception):
    """The other side is gone."""


class UnsendableError(Exception):
    """A message cannot be sent, because of what is in it."""


class RemoteError(Exception):
    """The recorder raised an error that is nobody's mistake; the text has its traceback."""


class Request(msgspec.Struct, array_like=True, tag=True):
    """Calls a method of one of the recorder's sessions.

    Attributes:
        number: Number of the request, 0 if nobody waits for an answer.
        session: Number of the session.
        method: Name of the method.
        arguments: Its arguments, by name, as ``pack`` returns them.
    """

    number: int
    session: int
    method: str
    arguments: dict[str, Any]


class Answer(msgspec.Struct, array_like=True, tag=True):
    """Answers a request, with a value or an error."""

    number: int
    value: Any = None
    error: "Failure | None" = None


class CheckpointEnd(msgspec.Struct, array_like=True, tag=True):
    """Tells that a checkpoint was committed, or why not."""

    session: int
    name: str
    error: "Failure | None" = None


class LogLine(msgspec.Struct, array_like=True, tag=True):
    """Something that the recorder logs."""

    logger: str
    level: int
    text: str


class Failure(msgspec.Struct, array_like=True):
    """An error that crosses the channel.

    Attributes:
        kind: Name of its class.
        text: Its message.
        path: Config path of what is wrong.
        details: Number, reason and file of an OSError.
        trace: The traceback of an error that is not explained by its message.
    """

    kind: str
    text: str
    path: str | None = None
    details: tuple[int | None, str | None, str | None] | None = None
    trace: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Describe an error."""
        kind, text = type(error).__name__, str(error)
        if isinstance(error, KsuitError):
            return cls(kind, text, error.path)
        if isinstance(error, OSError):
            name = error.filename if isinstance(error.filename, str) else None
            return cls("OSError", text, details=(error.errno, error.strerror, name))
        return cls(kind, text, trace="".join(traceback.format_exception(error)))

    def error(self) -> Exception:
        """Return the error, as the caller of a method would have got it here."""
        if self.details is not None:
            number, reason, name = self.details
            return OSError(number, reason, name) if number is not None else OSError(self.text)
        known = getattr(errors, self.kind, None)
        if isinstance(known, type) and issubclass(known, KsuitError):
            error = known(self.text)
            error.path = self.path
            return error
        return RemoteError(f"{self.kind}: {self.text}\nin the recorder:\n{self.trace}")


Message = Request | Answer | CheckpointEnd | LogLine


class Channel:
    """One end of the connection between the two processes; several threads may send.

    Args:
        connection: The end.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            ClosedError: The other side is gone.
            UnsendableError: Something in it is nothing that a message can hold.
        """
        content = encode(message)
        with self._sending:
            try:
                self._connection.send_bytes(content)
            except OSError as error:
                raise ClosedError from error

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """Wait for a message; None if the time is up.

        Raises:
            ClosedError: The other side is gone.
        """
        try:
            if timeout_s is not None and not self._connection.poll(timeout_s):
                return None
            return _decode(self._connection.recv_bytes())
        except (OSError, EOFError) as error:
            raise ClosedError from error

    def close(self) -> None:
        """Close this end; a thread that waits for a message gets a ClosedError."""
        with suppress(OSError), socket.fromfd(self._connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.shutdown(socket.SHUT_RDWR)


def encode(value: Any) -> bytes:
    """Return a message, or a part of one, as bytes.

    Raises:
        UnsendableError: Something in it is nothing that a message can hold.
    """
    try:
        try:
            return msgspec.msgpack.encode(value, enc_hook=_to_text)
        except (
            UnicodeEncodeError
        ):  # a path, or a variable of the environment, that is no text; in Python's JSON it can be
            return json.dumps(msgspec.to_builtins(value, enc_hook=_to_text)).encode()
    except Exception as error:  # several types, and those of whatever a tracker of the user's has returned
        raise UnsendableError(str(error)) from error


def _decode(content: bytes) -> Message:
    if content.startswith(b"["):  # no message of msgpack begins so
        return msgspec.convert(json.loads(content), Message)  # type: ignore[no-any-return]
    return msgspec.msgpack.decode(content, type=Message)  # type: ignore[no-any-return]


def pack(method: Callable[..., Any], arguments: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, without ``self``, by their names.

    Raises:
        TypeError: The method does not take them.
    """
    given = dict(inspect.signature(method).bind(None, *arguments, **named).arguments)
    given.pop("self")
    return given


def unpack(method: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call as the types that the method's annotations name."""
    types = _types(method)
    return {name: _convert(value, types[name]) for name, value in arguments.items()}


def unpack_result(method: Callable[..., Any], value: Any) -> Any:
    """Return the result of a call as the type that the method's annotation names.

    Raises:
        TrackerError: It is something else.
    """
    try:
        return _convert(value, _types(method)["return"])
    except msgspec.ValidationError as error:
        raise TrackerError(f"what the tracker's {method.__name__} has returned is refused: {error}") from None


@cache
def _types(method: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(method)


def _convert(value: Any, kind: Any) -> Any:
    return msgspec.convert(value, kind, dec_hook=from_text)


def _to_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"an object of type {type(value).__name__} cannot be sent")


def from_text(kind: type, value: Any) -> Any:
    """Return what was sent as text because no message can hold it: a path."""
    if issubclass(kind, Path):
        return kind(value)
    raise NotImplementedError(kind)
