"""Base class of callbacks that watch a few updates in a row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.config.types import PositiveInt, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng


class WindowCallback(PeriodicCallback):
    """Watches a few updates in a row on rank 0, and then logs files of what it has seen.

    A run that ends or is resumed within these updates has seen fewer. A subclass defines how to start and how to stop,
    and what to log in between.

    Args:
        first_update: Number of the first update to watch, from 1.
        updates: How many to watch.
        **kwargs: Passed on to PeriodicCallback.

    Attributes:
        is_watching: Whether an update is being watched.

    Raises:
        ConfigError: A number is smaller than 1.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(self, first_update: PositiveInt = 10, updates: PositiveInt = 3, **kwargs: Any) -> None:
        check_numbers("PositiveInt", first_update=first_update, updates=updates)
        last = first_update + updates - 1
        super().__init__(every_n_updates=last, at_end=True, **kwargs)  # at later times there is nothing to log
        self._window = range(first_update - 1, last)  # by the number of updates before each
        self.is_watching = False

    @uses_no_rng
    def _before_every_update(self, update_counter: UpdateCounter) -> None:
        if update_counter.update in self._window and not self.is_watching and self.data_container.world.records:
            self.is_watching = self._start()

    @uses_no_rng
    def _periodic_callback(self, update_counter: UpdateCounter) -> None:
        if self.is_watching:
            self._log()
            self.close()

    def close(self) -> None:
        """Watch no more."""
        if self.is_watching:
            self.is_watching = False
            self._stop()

    @abstractmethod
    def _start(self) -> bool:
        """Start to watch; return whether that is possible now."""

    @abstractmethod
    def _log(self) -> None:
        """Log what was seen."""

    @abstractmethod
    def _stop(self) -> None:
        """Watch no more, whether or not it was logged."""
