"""The errors that a user can cause, the signals that end training, and the words that messages have in common."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from signal import SIGINT
from typing import Any

MOST_LISTED = 12
"""Names that a message lists; of more it has a few."""
_FEW = 6


class KsuitError(Exception):
    """Base of every error that is explained in a few lines instead of a traceback.

    Args:
        message: What is wrong, and what to write instead.
        path: Config path of what is wrong, with which the text of the error begins.
    """

    exit_status = 2

    def __init__(self, message: str = "", path: str | None = None) -> None:
        super().__init__(message if path is None else f"{path}: {message}")
        self.path = path

    def locate(self, path: str) -> None:
        """Give this error a config path, unless it was raised with a more precise one."""
        if self.path is None:
            self.path, self.args = path, (f"{path}: {self}",)

    def move(self, start: str, instead: str) -> None:
        """Give this error another config path, where it begins so."""
        if self.path is not None and self.path.split(".")[0] == start != instead:
            moved = instead + self.path.removeprefix(start)
            self.path, self.args = moved, (moved + str(self).removeprefix(self.path),)

    def add(self, others: Iterable["KsuitError"]) -> None:
        """Say in this error what others say, a line for each."""
        self.args = ("\n".join(map(str, [self, *others])),)


class ConfigError(KsuitError):
    """The configuration asks for something that does not exist or does not fit."""


class LossError(KsuitError):
    """A loss is non-finite, which is not a mistake in the config."""

    exit_status = 1


class ResumeError(KsuitError):
    """The stored run is unknown, ambiguous, still alive, or would have its past rewritten."""


class TakenOverError(KsuitError):
    """Another process has taken this run over and owns its files now; nothing that was asked for is wrong."""


class AliveError(ResumeError):
    """A process that is alive holds the run."""


class CheckpointError(KsuitError):
    """A checkpoint is missing, damaged, or does not belong to what is being built."""


class TrackerError(KsuitError):
    """The tracking server or its store cannot be used."""


class LostRunError(TrackerError):
    """The tracker can be used, but does not have the run, or no longer has it."""


class StorageError(KsuitError):
    """Files cannot be read or written: a full disk, missing rights, too many open files, a server that is away."""


class PeerError(KsuitError):
    """Another rank of the run has failed, is lost, or does not answer.

    Attributes:
        is_reported: Whether the cause is reported by another rank, or was reported before.
    """

    exit_status = 1
    is_reported = False


class LostRankError(KsuitError):
    """A rank was killed or is stuck, and the ranks are not started again.

    Args:
        message: Which one, and how the run is resumed.
        exit_status: Exit status of the command.
    """

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class StopTraining(Exception):  # a signal, not an error
    """Raised by a callback to end training after the current update; the run counts as finished."""


class Interrupted(Exception):  # a signal, not an error
    """Raised where a run waits for data when a signal asks it to end: nothing has to be finished first.

    Args:
        number: Number of the signal, which may have reached another rank of the run.
    """

    def __init__(self, number: int = SIGINT) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def located(path: str) -> Iterator[None]:
    """Give a KsuitError that is raised in the block a config path, unless it has a more precise one."""
    try:
        yield
    except KsuitError as error:
        error.locate(path)
        raise


@contextmanager
def files_explained(file: Any = None) -> Iterator[None]:
    """Turn an OSError into a StorageError of one line, where only files of the runner are read and written.

    Args:
        file: The file that is named if the error does not name one, as that of a write on a full disk.

    Raises:
        StorageError: The file system refused something.
    """
    try:
        yield
    except OSError as error:
        name = file if error.filename is None else error.filename
        where = "" if name is None else f"{name}: "
        raise StorageError(f"{where}{error.strerror or error}") from error


@contextmanager
def afterwards(*steps: Callable[[], object]) -> Iterator[None]:
    """Run a block, and then all steps, whatever fails: the first error is raised, and those after it are its notes."""
    first: BaseException | None = None
    try:
        yield
    except BaseException as error:
        first = error
    for step in steps:
        try:
            step()
        except BaseException as error:
            if first is None:
                first = error
            else:
                first.add_note(f"and afterwards: {error!r}")
    if first is not None:
        raise first


def suggest(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid name that is nearest to the given one, or None if none is near."""
    by_lower = {str(item).lower(): str(item) for item in sorted(map(str, valid), reverse=True)}
    near = get_close_matches(name.lower(), sorted(by_lower), n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None


def did_you_mean(name: str, valid: Iterable[str], longest: int | None = None) -> str:
    """Return a sentence that helps after a name that is not valid: the nearest valid one, or else what there is.

    Args:
        name: What was written.
        valid: What could have been written; of many, the sentence has a few that are like it, or the first ones.
        longest: If there are more valid names than this, and none is near, the sentence is empty.
    """
    names = sorted({str(item) for item in valid})
    if near := suggest(name, names):
        return f"Did you mean '{near}'?"
    if longest is not None and len(names) > longest:
        return ""
    if len(names) > MOST_LISTED:
        if alike := _alike(name, names):
            return f"Similar: {', '.join(alike)}."
        return f"Valid: {', '.join(names[:_FEW])}, and {len(names) - _FEW} more."
    return f"Valid: {', '.join(names)}." if names else "There are none."


def is_misspelling(name: str, valid: Iterable[str]) -> bool:
    """Whether a name is so near to a valid one, and so little longer or shorter, that it is hardly meant to be new."""
    near = suggest(name, valid)
    is_alike = near is not None and SequenceMatcher(None, name.lower(), near.lower()).ratio() >= 0.75
    return near is not None and is_alike and abs(len(name) - len(near)) <= 2


def _alike(name: str, names: Iterable[str]) -> list[str]:
    """Return the names that contain a text, and then those that are somewhat like it, a few at most."""
    text = name.lower()
    likeness = {
        item: 1.0 if text in item.lower() else SequenceMatcher(None, text, item.lower()).ratio() for item in names
    }
    return sorted((item for item in names if likeness[item] >= 0.4), key=lambda item: -likeness[item])[:_FEW]


def counted(number: int, noun: str) -> str:
    """Return a number with what it counts, such as ``1 rank`` or ``2 ranks``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def with_article(name: str) -> str:
    """Return the name of a class with its indefinite article, such as ``an int`` or ``a Tensor``."""
    return f"{'an' if name[:1].lower() in 'aeio' and name[:1] else 'a'} {name}"


def named_type(value: Any) -> str:
    """Return what a value is, as a message says it: ``an int``, ``a Tensor``, or ``None``."""
    return "None" if value is None else with_article(type(value).__name__)


def short(value: Any) -> str:
    """Return the repr of a value for an error message, cut to 60 characters."""
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 70 else f"{text[:60]}…"
