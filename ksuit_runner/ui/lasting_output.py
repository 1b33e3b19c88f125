"""Standard output and error that never raise, so that a closed pipe or a full disk ends no training."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO


class LastingStream:
    """A text stream that drops what the underlying one does not accept, instead of raising an error.

    What is dropped is lost (the reader of a pipe is gone, the terminal was closed, the disk is full); later text is
    tried again. Characters that the encoding does not have are escaped.

    Args:
        stream: The stream that is written to; all else is looked up there.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text and return its length, whether or not it was accepted."""
        with suppress(OSError, ValueError):  # ValueError: the stream was closed
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what is buffered, as far as it is accepted."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def secure_output() -> None:
    """Make standard output and error of this process streams that never raise, also where they are closed.

    A descriptor that was closed (``>&-``) is replaced by ``os.devnull``, so that no file of a run gets its number: what
    a library or a child process prints would be written into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _open_devnull_as(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, LastingStream):
            setattr(sys, name, LastingStream(stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")))


def _open_devnull_as(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    os.set_inheritable(number, True)
