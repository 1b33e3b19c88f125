"""The errors that a user can cause, and the one signal that a callback can send."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class KsuitError(Exception):
    """Base of every error that is explained in a few lines instead of a traceback."""

    exit_status = 2


class ConfigError(KsuitError):
    """The configuration asks for something that does not exist or does not fit."""


class LossError(KsuitError):
    """A loss is no finite number: nobody's mistake in the config."""

    exit_status = 1


class ResumeError(KsuitError):
    """The run that should go on is unknown, ambiguous, still alive, or would have its past rewritten."""


class TakenOverError(ResumeError):
    """Another process has taken this run over, and it is that one's to write."""


class AliveError(ResumeError):
    """A process that is alive is at it."""


class CheckpointError(KsuitError):
    """A checkpoint is missing, damaged, or does not belong to what is being built."""


class TrackerError(KsuitError):
    """The tracking server or its store cannot be used."""


class LostRunError(TrackerError):
    """The tracker can be used, but does not have the run, or has it no longer."""


class StorageError(KsuitError):
    """Files cannot be read or written: a full disk, missing rights, too many open files, a server that is away."""


class StopTraining(Exception):  # a signal, not an error
    """Raised by a callback to end training after the current update; the run counts as finished."""


class Interrupted(Exception):  # a signal, not an error
    """Raised where a run waits for data while it is asked to end: nothing there has to be finished first."""


@contextmanager
def files_explained() -> Iterator[None]:
    """Explain what the file system refuses in a line, where only files of the runner are read and written.

    Raises:
        StorageError: It refused something.
    """
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        raise StorageError(f"{where}{error.strerror or error}") from error


def suggest(name: str, valid: Iterable[str]) -> str:
    """Say which of the valid names is nearest to the given one, or list them all if none is near."""
    names = sorted({str(item) for item in valid})
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{near[0]}'?"
    return f"Valid: {', '.join(names)}." if names else "There are none."


def nearest(name: str, valid: Iterable[str], longest: int = 12) -> str:
    """Name the nearest valid name; without one, list them all unless they are too many to help."""
    names = sorted({str(item) for item in valid})
    hint = suggest(name, names)
    return hint if hint.startswith("Did") or len(names) <= longest else ""
