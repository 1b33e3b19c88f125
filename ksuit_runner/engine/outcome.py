"""How a run has ended; imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from ksuit_runner.metric_property import Summary
from ksuit_runner.tracker.base import EndStatus


@dataclass
class RunOutcome:
    """How a run ended, for those who report it: the command line, a sweep, ``api.run``.

    Attributes:
        run_id: Its id.
        folder: Where its files are.
        status: FINISHED, FAILED or KILLED; FINISHED only once the run is complete.
        signal: Number of the signal that ended it, if one did.
        error: The error that it failed with, if any; it was reported already.
        summary: Last and best values of its metrics.
        is_refused: Whether it was refused before it began: a stored run is as it was.
    """

    run_id: str
    folder: Path
    status: EndStatus = EndStatus.FAILED
    signal: int | None = None
    error: BaseException | None = None
    summary: dict[str, Summary] = field(default_factory=dict)
    is_refused: bool = False

    @property
    def exit_status(self) -> int:
        """Exit status of a process for this run alone."""
        if self.signal is not None:
            return 128 + self.signal
        return getattr(self.error, "exit_status", 1) if self.error is not None else 0
