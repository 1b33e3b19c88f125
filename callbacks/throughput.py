"""Training speed, and the share of time spent waiting for data."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any, ClassVar

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng


class Throughput(PeriodicCallback):
    """Logs ``samples_per_second``, ``updates_per_second`` and ``data_wait_fraction``.

    The last one is the share of the time that training waited for its data. The time is wall-clock time since the last
    log, evaluations and checkpoints included. The values differ from run to run, so there is no state to resume.

    Args:
        **kwargs: Passed on to PeriodicCallback.
    """

    logs: ClassVar[Sequence[str] | None] = ("samples_per_second", "updates_per_second", "data_wait_fraction")
    is_repeatable: ClassVar[bool] = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._start, self._sample, self._update = 0.0, 0, 0

    def _before_training(self, update_counter: UpdateCounter) -> None:
        self.data_container.take_wait_seconds()
        self._restart(update_counter)

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        seconds = perf_counter() - self._start
        self.writer.add_scalar("samples_per_second", (update_counter.sample - self._sample) / seconds)
        self.writer.add_scalar("updates_per_second", (update_counter.update - self._update) / seconds)
        self.writer.add_scalar("data_wait_fraction", self.data_container.take_wait_seconds() / seconds)
        self._restart(update_counter)

    def _restart(self, update_counter: UpdateCounter) -> None:
        self._start, self._sample, self._update = perf_counter(), update_counter.sample, update_counter.update
