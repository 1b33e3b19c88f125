"""The losses of training, added up over its updates for those who ask for them."""

from __future__ import annotations

from torch import Tensor

from ksuit_runner.trainer.losses import Count, Losses, add_loss
from ksuit_runner.trainer.sums import Number, PartSums, Sums

_TOTAL = ("total",)


class RunningLosses:
    """Adds the losses of each part of a batch to sums of that part, once the update is done.

    An update that fails adds nothing, so that no snapshot of the sums is needed; and a callback that needs only the
    losses needs no hook at every update. Losses on the CPU are added up as numbers, in double precision; on another
    device they stay there, and nothing waits for it.

    Args:
        sums_up: Whether the total loss is a sum over the samples, and not a mean.
    """

    def __init__(self, sums_up: bool) -> None:
        self.are_wanted = False
        self._sums_up = sums_up
        self._sums: list[PartSums[Sums]] = []
        self._of_update: list[tuple[int, tuple[str], Number, Count, bool]] = []

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
        if len(losses) == 1 and not losses.counts:  # the quick way, for most models
            self._of_update.append((part, _TOTAL, _value(losses["total"]), _value(weight), self._sums_up))
            return
        for name, loss, count in losses.means(weight, weight):
            is_sum = self._sums_up and name == "total"
            self._of_update.append((part, (name,), _value(loss), _value(count), is_sum))

    def add(self) -> None:
        """Add what was noted: the update is done."""
        noted, self._of_update = self._of_update, []
        for part, key, loss, count, is_sum in noted:
            for sums in self._sums:
                add_loss(sums[part], key, loss, count, is_sum)


def _value(item: Number) -> Number:
    """Return a present value: as a number if it is on the CPU, else as a copy."""
    if not isinstance(item, Tensor):
        return item
    return item.item() if item.is_cpu else item.detach().clone()
