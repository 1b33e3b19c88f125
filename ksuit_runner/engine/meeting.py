"""How the ranks of a run come together after an error or a signal, and end with one report of one cause."""

import logging
import traceback
from typing import Any

from ksuit_runner.distributed.world import World
from ksuit_runner.errors import Interrupted, KsuitError, PeerError
from ksuit_runner.security.masking import mask_text

_LOGGER = logging.getLogger(__name__)
_ATTEMPTS = 3


class Meeting:
    """Brings the ranks of a run together after one of them has failed, or was interrupted while others go on.

    Every rank meets the others equally often: one that waits for a failed rank gets an error itself, and comes here
    with that.

    Args:
        world: The ranks.

    Attributes:
        world: The same.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._met: BaseException | None = None
        self._is_complete = True

    def after(self, error: BaseException) -> bool:
        """Have the ranks meet after an error, once for each, and return whether all are there and can exchange again.

        Args:
            error: What this rank has caught: its own, or that of another one that it was waiting for.
        """
        if self.world.size > 1 and error is not self._met:
            self._met = error
            self.world.fail(error)
            self._is_complete = self.world.recover()
        return self._is_complete

    def again(self) -> None:
        """Let the ranks meet once more at the next chance, because something else has gone wrong since."""
        self._met = None

    def settle(self, error: BaseException | None) -> BaseException | None:
        """Return what this rank ends with, so that only one of all errors is reported; every rank calls it at its end.

        The error that is reported is that of the first rank which has an error of its own. Rank 0 reports it; if a rank
        is lost, each rank with an error of its own does.

        Args:
            error: What this rank has failed with, if it has.
        """
        if self.world.size == 1:
            return error
        if isinstance(error, KeyboardInterrupt):  # at once
            self.world.fail(error)
            return error
        cause = error
        for _ in range(_ATTEMPTS):
            if cause is not None and not self.after(cause):
                break
            try:
                return self._reported(error, self.world.exchange("the end", _describe(error)))
            except (PeerError, Interrupted) as another:
                cause = another
        if isinstance(error or cause, PeerError) and not self.world.records:
            return _silent(error or cause)
        return error or cause

    def _reported(self, error: BaseException | None, found: list[Any]) -> BaseException | None:
        failed = [rank for rank, item in enumerate(found) if item is not None]
        if not failed:
            return None
        rank = next((rank for rank in failed if found[rank]["is_own"]), failed[0])
        text, trace, status = (found[rank][key] for key in ("text", "trace", "exit_status"))
        if rank == self.world.rank:
            assert error is not None
            return error if self.world.records else _silent(PeerError(text), status)
        if not self.world.records:
            return _silent(PeerError(f"rank {rank}: {text}"), status)
        if trace is None:
            return _with_status(PeerError(f"rank {rank}: {text}"), status)
        _LOGGER.error("rank %d has failed: %s", rank, trace)
        return _silent(PeerError(f"rank {rank}: {text}"), status)


def _describe(error: BaseException | None) -> dict[str, Any] | None:
    if error is None:
        return None
    is_explained = isinstance(error, KsuitError)
    return {
        "is_own": not isinstance(error, PeerError),
        "text": mask_text(str(error) if is_explained else "".join(traceback.format_exception_only(error)).strip()),
        "trace": None if is_explained else mask_text("".join(traceback.format_exception(error))),
        "exit_status": getattr(error, "exit_status", 1),
    }


def _silent(error: Any, status: int = PeerError.exit_status) -> PeerError:
    error = error if isinstance(error, PeerError) else PeerError(str(error))
    error.is_reported = True
    return _with_status(error, status)


def _with_status(error: PeerError, status: int) -> PeerError:
    error.exit_status = status
    return error
