"""The end of a run: one report of what has ended it, and a record with a true status."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ksuit_runner.engine.meeting import Meeting
from ksuit_runner.engine.outcome import RunOutcome
from ksuit_runner.engine.silent_record import SilentRecord
from ksuit_runner.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    KsuitError,
    PeerError,
    ResumeError,
    afterwards,
)
from ksuit_runner.recorder.protocol import RemoteError
from ksuit_runner.tracker.base import EndStatus
from ksuit_runner.trainer.sgd import SgdTrainer

_LOGGER = logging.getLogger(__name__)
_REFUSALS = (ConfigError, ResumeError, CheckpointError)
"""Errors of what a run was asked to do or to start from: repeated, it would be refused again."""


class RefusedError(Exception):
    """A run could not be assembled, for the reason that is its cause: a stored one keeps its status."""


@contextmanager
def closing(record: SilentRecord, trainer: SgdTrainer, outcome: RunOutcome, meeting: Meeting) -> Iterator[None]:
    """Close a run's record with a true status, whatever the block raises, on this rank or another one.

    Args:
        record: Its record.
        trainer: Its trainer, whose data is closed as well.
        outcome: Gets the status and the error, which is reported.
        meeting: Has the ranks of the run come together.
    """
    error: BaseException | None = None
    failed, never_began = EndStatus.FAILED, False
    try:
        try:
            with afterwards(trainer.data_container.close):
                yield
        except RefusedError as refused:
            error, failed, outcome.is_refused = refused.__cause__, record.status_before, True
            never_began = isinstance(error, _REFUSALS)
        except BaseException as caught:  # SystemExit as well, which a callback or a library may raise
            error = meeting.world.explain(caught)
        reported = meeting.settle(error)
        if isinstance(reported, KeyboardInterrupt | Interrupted):  # the second Ctrl-C, on this rank or another one
            outcome.status, outcome.signal = EndStatus.KILLED, getattr(reported, "number", signal.SIGINT)
        elif reported is not None:
            is_own = error is not None and not isinstance(error, PeerError)
            outcome.status, outcome.error = failed, error if is_own else reported
            _report(reported)
    finally:
        _close(record, outcome.status, never_began)


def _report(error: BaseException) -> None:
    if isinstance(error, PeerError) and error.is_reported:
        _LOGGER.debug("%s", error)
    elif isinstance(error, KsuitError):
        _LOGGER.error("error: %s", error)
    else:
        problem = error if isinstance(error, Exception) else repr(error)
        _LOGGER.error("the run failed: %s", problem, exc_info=error)


def _close(record: SilentRecord, status: EndStatus, never_began: bool) -> None:
    try:
        record.close(status, never_began)
    except (KsuitError, RemoteError, OSError) as error:  # the run has ended as it has, all the same
        _LOGGER.error("the record could not be delivered to the tracker, sync= will do it: %s", error)
