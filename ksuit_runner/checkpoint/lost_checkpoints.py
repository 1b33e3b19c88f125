"""What is said of checkpoints that could not be written: on a full disk, a run of short epochs loses many a second."""

import logging
from pathlib import Path
from time import monotonic

from ksuit_runner.errors import counted

_LOGGER = logging.getLogger(__name__)
_PAUSE_S = 10.0


class LostCheckpoints:
    """Logs the first lost checkpoint at once, then how many there are, a line at intervals, and when it works again.

    Args:
        folder: Where they are written.

    Attributes:
        are_last: Whether the run has ended, so that no later ones follow.
    """

    def __init__(self, folder: Path) -> None:
        self.are_last = False
        self._folder = folder
        self._unsaid, self._is_said = 0, False
        self._next_time = 0.0  # not of a period of losses: a disk may be full every other time

    def add(self, error: OSError) -> None:
        """Take note that a checkpoint was lost."""
        self._unsaid += 1
        if monotonic() >= self._next_time:
            more = "; the run continues with the last good one, and tries again at the next interval"
            _LOGGER.error("%s%s", self.message(error, self._unsaid), "" if self.are_last else more)
            self._unsaid, self._is_said, self._next_time = 0, True, monotonic() + _PAUSE_S

    def end(self) -> None:
        """Take note that a checkpoint was written."""
        if self._is_said:
            more = f", after {self._unsaid} more were lost" if self._unsaid else ""
            _LOGGER.warning("checkpoints can be written again%s: %s", more, self._folder)
            self._unsaid, self._is_said = 0, False

    def close(self) -> None:
        """Log how many were lost of which nothing was said yet."""
        if self._unsaid:
            _LOGGER.error("%s could not be written to %s", counted(self._unsaid, "more checkpoint"), self._folder)
            self._unsaid = 0

    def message(self, error: OSError, count: int = 1) -> str:
        """Return what is said of one or more checkpoints that were lost."""
        what = "the checkpoint" if count == 1 else f"{count} checkpoints"
        return f"{what} could not be written to {self._folder}: {error}"
