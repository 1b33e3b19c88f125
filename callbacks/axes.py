"""Epoch and sample as metrics, for plots over them."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng


class Axes(CallbackBase):
    """Logs ``epoch`` and ``sample`` at every update at which something else is logged.

    Trackers know the update of each point; with these two, MLflow, W&B and tables of metrics can plot over epochs, with
    fractions, or over the samples seen, and so compare runs with batches of different size.
    """

    logs: ClassVar[Sequence[str] | None] = ("epoch", "sample")

    @uses_no_rng
    def _after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None:
        if update_counter.has_epochs:
            self.writer.add_scalar("epoch", update_counter.update / update_counter.updates_per_epoch)
        self.writer.add_scalar("sample", update_counter.sample)
