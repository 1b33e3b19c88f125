"""The end of a run at a position, or before its time is up."""

import time
from collections.abc import Sequence
from math import inf
from typing import Any, ClassVar

from ksuit_runner.callback_base import quiet
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.config.duration import seconds_of
from ksuit_runner.config.types import Duration, PositiveInt, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError, StopTraining
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.system.signals import TIME_IS_UP


class StopAt(PeriodicCallback):
    """Ends training at an epoch, an update or a sample, or after a time; the first of these counts.

    A run that reaches the position counts as finished, and so does one that is resumed beyond it. Its learning rates
    are those of the whole length, unlike with ``trainer.max_epochs``: if the position is moved, the run continues on
    the same schedule.

    When the time is up, the run ends after its update as after a SIGXCPU: with a checkpoint and status KILLED, to be
    resumed. The time counts from this start of the run, and anew after a resume. It has to leave enough for an
    evaluation that has just begun, and for writing the checkpoint.

    Args:
        epoch: Number of completed epochs.
        update: Number of completed updates.
        sample: Number of samples; the update that reaches it is the last one.
        max_time: Such as ``90m``, ``23h 50m`` or ``1d 12h``, in days (d), hours (h), minutes (m) and seconds (s).
        **kwargs: Passed on to PeriodicCallback.

    Raises:
        ConfigError: Nothing is given, a number is below 1, the run has no epochs, or the text is no time.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(
        self,
        epoch: PositiveInt | None = None,
        update: PositiveInt | None = None,
        sample: PositiveInt | None = None,
        max_time: Duration | None = None,
        **kwargs: Any,
    ) -> None:
        positions = {"epoch": epoch, "update": update, "sample": sample}
        self.positions = {name: number for name, number in positions.items() if number is not None}
        if not self.positions and max_time is None:
            raise ConfigError("one of epoch, update, sample, max_time is needed, not none")
        check_numbers("PositiveInt", **self.positions)
        # Each position is the first time that its interval is due.
        super().__init__(
            every_n_epochs=epoch,
            every_n_updates=update,
            every_n_samples=sample,
            at_start=False,
            at_end=not self.positions,
            **kwargs,
        )
        self.is_idle = not self.positions
        if epoch is not None and not self.trainer.counter.has_epochs:
            raise ConfigError("epoch: the training data is a stream, which has no epochs; use update or sample")
        self.max_time = max_time
        if max_time is not None and self.data_container.world.records:  # the other ranks end with this one
            self.next_time = time.monotonic() + seconds_of(max_time, "max_time")

    def _before_training(self, update_counter: UpdateCounter) -> None:
        self._stop(update_counter)

    @quiet
    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        self._stop(update_counter)

    def _stop(self, update_counter: UpdateCounter) -> None:
        for name, number in self.positions.items():
            if getattr(update_counter, name) >= number:
                raise StopTraining(f"{name} {number} is reached")

    @uses_no_rng
    def _timed_callback(self, update_counter: UpdateCounter) -> None:
        self.next_time = inf
        interruption = self.data_container.interruption
        if interruption.signal is None and not update_counter.is_finished:
            self.logger.info("the time of the run is up (%s): it ends with a checkpoint", self.max_time)
            interruption.signal = TIME_IS_UP
