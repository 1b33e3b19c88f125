"""Which hooks are due: after an update, and at the start and the end of training."""

from collections.abc import Callable, Collection, Sequence

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter

Method = Callable[..., None]
"""A hook of a callback."""


class Agenda:
    """Says which hooks are due, in the order in which they are called.

    Most updates are followed by the same hooks. Until the next one at which an epoch or an interval ends, intervals are
    not asked again.

    Args:
        after_update: Hooks that follow every update.
        after_epoch: Hooks that follow every epoch.
        periodic: Callbacks that act at intervals.
        update_counter: Position of the run.
    """

    def __init__(
        self,
        after_update: Sequence[Method],
        after_epoch: Sequence[Method],
        periodic: Sequence[PeriodicCallback],
        update_counter: UpdateCounter,
    ) -> None:
        self._after_update = list(after_update)
        self._after_epoch = list(after_epoch)
        self._periodic = periodic
        self._intervals = list(dict.fromkeys(item.interval for item in periodic))
        self._counter = update_counter
        self._plain_updates = range(0)  # which are followed by the hooks of every update, and nothing else

    def at_start(self, begun: Collection[str] = ()) -> list[Method]:
        """Return the periodic callbacks that act before the first update.

        Args:
            begun: Names of those that have acted then already, before the run was resumed.
        """
        if self._counter.update > 0 or self._counter.is_empty:
            return []
        return [item.periodic_callback for item in self._periodic if item.interval.at_start and item.name not in begun]

    def after_update(self) -> list[Method]:
        """Return the hooks that follow the current update, each with the periodic callbacks that are due with it.

        In a run without updates these are all periodic callbacks.
        """
        counter = self._counter
        if counter.update in self._plain_updates:
            return self._after_update
        if counter.is_empty:
            return [item.periodic_callback for item in self._periodic]
        methods = [*self._after_update, *self._due(of_epoch=False)]
        if counter.is_full_epoch:
            methods += [*self._after_epoch, *self._due(of_epoch=True)]
        next_due = [interval.next_due(counter) for interval in self._intervals]
        end_of_epoch = (counter.epoch + 1) * counter.updates_per_epoch
        self._plain_updates = range(counter.update + 1, min([end_of_epoch, *(at for at in next_due if at is not None)]))
        return methods

    def at_end(self) -> list[Method]:
        """Return the periodic callbacks that act at the end of training, without those that were due anyway."""
        counter = self._counter
        if counter.is_empty:
            return []
        at_end = [item for item in self._periodic if item.interval.at_end]
        return [item.periodic_callback for item in at_end if not item.interval.is_due(counter)]

    def _due(self, of_epoch: bool) -> list[Method]:
        """Return the periodic callbacks that are due now, with the epoch or without it."""
        counter = self._counter
        due = [item for item in self._periodic if item.interval.is_due(counter)]
        return [item.periodic_callback for item in due if item.interval.follows_epoch(counter) is of_epoch]
