"""The log of a run: on the terminal, above its progress bar, and in a file of its folder."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ksuit_runner.errors import KsuitError
from ksuit_runner.security.masking import mask_text
from ksuit_runner.system.untrusted_files import open_stored
from ksuit_runner.ui.terminal import LEVEL_STYLES, make_console

_OF_ALL_RANKS = ("ksuit_runner.callbacks.", "ksuit_runner.trainer.")
OF_RANK = {"of_rank": True}
"""``extra`` of a warning of a callback or the trainer that is about this rank alone, as about its part of a batch."""


@contextmanager
def setup_logging(log_path: Path | None, console: Console, rank: int = 0) -> Iterator[logging.Logger]:
    """Send what the logger ``ksuit_runner`` gets to the console and to a file, and undo that at the end of the block.

    Args:
        log_path: File to append to, each line with its time; None for no file.
        console: Where the user follows the run; lines appear above a progress bar of this console.
        rank: Number of this process among the ranks of the run: those after the first one log errors, and to the file
            also warnings, without those of callbacks and the trainer, which say the same on all ranks: see ``OF_RANK``.

    Yields:
        The logger.
    """
    logger = logging.getLogger("ksuit_runner")
    before = (logger.handlers[:], logger.level, logger.propagate)
    prefix = f"rank {rank}: " if rank else ""
    handlers: list[logging.Handler] = [_ConsoleHandler(console, prefix)]
    if rank:
        handlers[0].setLevel(logging.ERROR)
    if log_path is not None:
        handlers.append(_file_handler(log_path, prefix))
        if rank:
            handlers[-1].addFilter(_is_of_rank)
    logger.handlers, logger.propagate = handlers, False
    logger.setLevel(logging.WARNING if rank else logger.level or logging.INFO)
    try:
        yield logger
    finally:
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)
        for handler in handlers:
            handler.close()


def _is_of_rank(record: logging.LogRecord) -> bool:
    """Whether a record says something that rank 0 does not."""
    is_alike = record.name.startswith(_OF_ALL_RANKS) and record.levelno < logging.ERROR
    return not is_alike or hasattr(record, "of_rank")


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append what the logger ``ksuit_runner`` gets in the block to a run's log, besides what it does with it."""
    logger, handler = logging.getLogger("ksuit_runner"), _file_handler(path)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def run_console() -> Console:
    """Return the console that the run's log goes to: log lines do not tear a progress bar drawn on it."""
    handlers = logging.getLogger("ksuit_runner").handlers
    return next((handler.console for handler in handlers if isinstance(handler, _ConsoleHandler)), make_console())


def _file_handler(path: Path, prefix: str = "") -> logging.FileHandler:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    handler = _FileHandler(path, encoding="utf-8", errors="backslashreplace", delay=True)
    handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)-7s %(name)s: {prefix}%(message)s"))
    return handler


class _Formatter(logging.Formatter):
    """Masks passwords, also in tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


class _FileHandler(logging.FileHandler):
    """Drops what a full disk does not accept: the terminal shows it, and the run continues."""

    def _open(self) -> Any:
        descriptor = open_stored(Path(self.baseFilename), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        return os.fdopen(descriptor, self.mode, encoding=self.encoding, errors=self.errors)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, KsuitError):  # of opening the file
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _ConsoleHandler(logging.Handler):
    """Prints records through a rich console, so that they do not tear its progress bar."""

    def __init__(self, console: Console, prefix: str = "") -> None:
        super().__init__()
        self.setFormatter(_Formatter(f"{prefix}%(message)s"))
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text: Any = Text(self.format(record), LEVEL_STYLES.get(record.levelname, ""))
            self.console.print(text, soft_wrap=True)
        except Exception:
            self.handleError(record)
