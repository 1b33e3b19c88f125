"""The losses of training, added up over its updates for those who ask for them."""

from __future__ import annotations

from ksuit_runner.trainer.losses import Count, Losses, add_losses
from ksuit_runner.trainer.sums import PartSums, Sums


class RunningLosses:
    """Adds the losses of each part of a batch to sums of that part, once the update is done: one that fails adds none.

    So nobody has to take a snapshot of the sums before an update, and what needs only the losses needs no hook at it.
    Losses on the CPU are added up as numbers, in double precision; on another device they stay there, and nothing waits
    for it.

    Args:
        sums_up: Whether the total loss is a sum over the samples, and not a mean.
    """

    def __init__(self, sums_up: bool) -> None:
        self.are_wanted = False
        self._sums_up = sums_up
        self._sums: list[PartSums[Sums]] = []
        self._of_update: list[tuple[int, Losses, Count]] = []

    def add_to(self, sums: PartSums[Sums]) -> None:
        """Add the losses of all updates from now on to these sums, each under ``(name,)``."""
        self._sums.append(sums)
        self.are_wanted = True

    def note(self, part: int, losses: Losses, weight: Count) -> None:
        """Note the present values of the losses of a part of the batch: the step may change what they are computed of.

        Args:
            part: Its number in the batch.
            losses: The losses, detached.
            weight: What they are means over where they do not say it.
        """
        self._of_update.append((part, losses.as_values(), weight))

    def add(self) -> None:
        """Add what was noted: the update is done."""
        for part, losses, weight in self._of_update:
            for sums in self._sums:
                add_losses(sums[part], losses, weight, weight, self._sums_up)
        self._of_update.clear()
