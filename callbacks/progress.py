"""Progress of training: a bar on a terminal or in a notebook, plain lines elsewhere."""

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any, ClassVar

from ksuit_runner.callback_base import CallbackBase, quiet
from ksuit_runner.config.types import PositiveFloat, check_numbers
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.reports.run_view import RunView


class Progress(CallbackBase):
    """Shows position, speed, time, the evaluation in progress, and the last values of metrics with a better direction.

    Without a terminal it prints a line after each evaluation, at the end, and at intervals in between. In a notebook it
    also draws curves of these metrics, which takes a twentieth of the time at most.

    Args:
        every_n_seconds: Interval of the lines in between.
        refresh_seconds: Shortest time between two refreshes of the bar.
        line_per_epoch: Print a line after each epoch, also above the bar and so in the run's log.
        **kwargs: Passed on to CallbackBase.

    Raises:
        ConfigError: A time is not positive.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(
        self,
        every_n_seconds: PositiveFloat = 10.0,
        refresh_seconds: PositiveFloat = 0.1,
        line_per_epoch: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_numbers("PositiveFloat", every_n_seconds=every_n_seconds, refresh_seconds=refresh_seconds)
        records = self.data_container.world.records
        self._view = RunView(self.path_provider, self.metric_property_provider, is_shown=records)
        self._interval = refresh_seconds if self._view.is_live else every_n_seconds
        self._has_epoch_lines = line_per_epoch
        self._epoch_line: list[str] = []  # still to be printed
        self._last_update = -1
        self.next_time = monotonic() + self._interval
        if records:
            self.trainer.watch_evaluation = self._show_evaluation

    def _before_training(self, update_counter: UpdateCounter) -> None:
        self._view.begin(update_counter)
        self.next_time = monotonic() + self._interval
        if self._view.is_live:
            self._show(update_counter)

    @uses_no_rng
    def _timed_callback(self, update_counter: UpdateCounter) -> None:
        self._show(update_counter)

    @quiet
    @uses_no_rng
    def _after_epoch(self, update_counter: UpdateCounter) -> None:
        if self._has_epoch_lines:
            self._epoch_line = self._view.position(update_counter)
            self.next_time = 0.0  # printed with what is logged now, or right after it

    @uses_no_rng
    def _after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None:
        added = self._view.add(update_counter.update, metrics)
        is_evaluated = not all(key.endswith("/train") for key in added)
        if self._epoch_line or (is_evaluated and not self._view.is_live):
            is_shown = self._last_update == update_counter.update  # as when a test set is evaluated at the end
            self._show(update_counter, added if is_shown and not self._view.is_live else None)

    def _after_training(self, update_counter: UpdateCounter) -> None:
        if self._view.is_live or self._epoch_line or self._last_update != update_counter.update:
            self._show(update_counter)

    def _show(self, counter: UpdateCounter, metrics: Mapping[str, float] | None = None) -> None:
        words = self._epoch_line or self._view.position(counter)
        if self._epoch_line or not self._view.is_live:
            self.logger.info("%s", "  ".join([*words, *self._view.values(metrics)]))
        self._view.draw()
        self._epoch_line, self._last_update = [], counter.update
        self.next_time = monotonic() + self._interval

    def _show_evaluation(self, names: Sequence[str], dataset_key: str, batch: int, batches: int | None) -> None:
        """Show which batch of an evaluation is read; see ``EvaluationWatcher``."""
        if monotonic() < self.next_time:
            return
        activity = self._view.draw_evaluation(self.trainer.counter, names, dataset_key, batch, batches)
        if not self._view.is_live:
            self.logger.info("%s", activity)
        self.next_time = monotonic() + self._interval

    def close(self) -> None:
        """Leave the terminal as it was found, and the curves with all points."""
        self._view.stop()
