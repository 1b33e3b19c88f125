"""Base class of callbacks that add up what they find in the update after which they act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.trainer.sums import PartSums, Sums


class PartSumsCallback(PeriodicCallback):
    """A periodic callback that adds up what it finds in the update after which it acts, for each part of the batch.

    A hook before the optimizer's step adds to ``self.sums[update_counter.accumulation_step]``, if
    ``self.follows(update_counter)``. In ``_periodic_callback``, ``self.sums.take()`` returns the sums over all parts
    and ranks. A checkpoint has the sums that are not logged yet.

    Args:
        **kwargs: Passed on to PeriodicCallback.

    Attributes:
        sums: The sums of each part.
    """

    merges_states: ClassVar[bool] = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sums = PartSums(Sums, self.data_container.world, self.trainer.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of an update that is done and not logged yet."""
        return self.sums.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore them."""
        self.sums.load_state_dict(state_dict, self.trainer.accumulation_steps)

    def merge_state_dicts(self, state_dicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the sums of the parts of all ranks; anything else is the same on all of them."""
        return {**state_dicts[0], **PartSums.merged(state_dicts)}
