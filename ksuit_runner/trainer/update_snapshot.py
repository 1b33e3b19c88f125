"""What an update changes before its step, to be restored if it fails or is skipped."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from ksuit_runner.checkpoint.state_types import copy_state
from ksuit_runner.distributed.strategy import Strategy
from ksuit_runner.trainer.buffer_snapshot import BufferSnapshot


class CarriesState(Protocol):
    """Carries a state of its own from update to update."""

    def extra_state(self) -> Any:
        """Return the state."""

    def load_extra_state(self, state: Any) -> None:
        """Restore a state."""


class UpdateSnapshot:
    """Holds the buffers of modules and the extra state of a trainer as they were before an update.

    Args:
        modules: The modules.
        carrier: Has an extra state; None if nothing has.
        strategy: How the ranks of the run share its training.

    Attributes:
        buffers: The snapshot of the modules' buffers.
    """

    def __init__(self, modules: Sequence[nn.Module], carrier: CarriesState | None, strategy: Strategy) -> None:
        self.buffers = BufferSnapshot(nn.ModuleList(modules))
        self._carrier, self._strategy = carrier, strategy
        self._extra: Any = None

    def take(self) -> None:
        """Take the snapshot anew."""
        self.buffers.take()
        if self._carrier is not None:
            self._extra = copy_state("trainer: extra_state()", self._carrier.extra_state())

    def restore(self) -> None:
        """Put everything back as it was."""
        self._strategy.reset()
        self.buffers.restore()
        if self._carrier is not None:
            self._carrier.load_extra_state(self._extra)
