"""Progress of training: a bar on a terminal or in a notebook, plain lines elsewhere."""

from collections.abc import Mapping, Sequence
from itertools import islice
from time import monotonic
from typing import Any, ClassVar

from rich.columns import Columns
from rich.text import Text

from ksuit_runner.callback_base import CallbackBase, quiet
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.record.journal import read_points
from ksuit_runner.reports.live_curves import LiveCurves
from ksuit_runner.ui.notebook import in_notebook
from ksuit_runner.ui.progress_bar import ProgressBar
from ksuit_runner.ui.terminal import format_number, make_console, run_console

_MOST_METRICS = 12


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
        every_n_seconds: float = 10.0,
        refresh_seconds: float = 0.1,
        line_per_epoch: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if every_n_seconds <= 0 or refresh_seconds <= 0:
            raise ConfigError("every_n_seconds, refresh_seconds: a time has to be positive")
        records = self.data_container.world.records
        self._bar = ProgressBar(run_console() if records else make_console(quiet=True), "updates")
        self._interval = refresh_seconds if self._bar.is_live else every_n_seconds
        self._curves = LiveCurves(self.path_provider.run_id) if self._bar.is_live and in_notebook() else None
        self._has_epoch_lines = line_per_epoch
        self._epoch_line: list[str] = []
        self._shown: dict[str, float] = {}
        self.next_time = monotonic() + self._interval
        self._last_update = -1
        if records:
            self.trainer.watch_evaluation = self._show_evaluation

    def _before_training(self, update_counter: UpdateCounter) -> None:
        self._bar.begin(update_counter.end_update, update_counter.update)
        if self._curves is not None and self.path_provider.journal.is_file():  # of a run that is resumed
            for point in read_points(self.path_provider.journal):
                self._curves.add(point.step, self._directed({point.key: point.value}))
        self.next_time = monotonic() + self._interval
        if self._bar.is_live:
            self._show(update_counter)

    @uses_no_rng
    def _timed_callback(self, update_counter: UpdateCounter) -> None:
        self._show(update_counter)

    @quiet
    @uses_no_rng
    def _after_epoch(self, update_counter: UpdateCounter) -> None:
        if self._has_epoch_lines:
            self._epoch_line = self._words(update_counter)
            self.next_time = 0.0  # it is printed with what is logged now, or else once that is done

    @uses_no_rng
    def _after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None:
        directed = self._directed(metrics)
        self._shown.update(directed)
        if self._curves is not None:
            self._curves.add(update_counter.update, directed)
        is_evaluated = not all(key.endswith("/train") for key in directed)
        if self._epoch_line or (is_evaluated and not self._bar.is_live):
            is_shown = self._last_update == update_counter.update  # as when a test set is evaluated at the end
            self._show(update_counter, directed if is_shown and not self._bar.is_live else self._shown)

    def _after_training(self, update_counter: UpdateCounter) -> None:
        if self._bar.is_live or self._epoch_line or self._last_update != update_counter.update:
            self._show(update_counter)

    def close(self) -> None:
        """Leave the terminal as it was found, and the curves with all points."""
        self._bar.stop()
        if self._curves is not None:
            self._curves.draw(at_end=True)

    def _directed(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {key: v for key, v in metrics.items() if self.metric_property_provider.direction(key) != "neutral"}

    def _show(self, counter: UpdateCounter, shown: Mapping[str, float] | None = None) -> None:
        words = self._epoch_line or self._words(counter)
        if self._epoch_line or not self._bar.is_live:
            metrics = _texts(self._shown if shown is None else shown)
            self.logger.info("%s", "  ".join(word for word in (*words, *metrics) if word))
        self._draw()
        self._epoch_line, self._last_update = [], counter.update

    def _words(self, counter: UpdateCounter) -> list[str]:
        """Move the bar to where training is, and say that in words."""
        epoch = _epoch(counter)
        self._bar.update(counter.update, epoch or "update")
        left = "" if counter.is_finished else self._bar.left
        return [epoch, f"update {counter.update}/{counter.end_update}", self._bar.pace, left]

    def _show_evaluation(self, names: Sequence[str], dataset_key: str, batch: int, batches: int | None) -> None:
        """Show which batch of an evaluation is read; see ``EvaluationWatcher``."""
        if monotonic() < self.next_time:
            return
        self._words(self.trainer.counter)
        names = [*names[:2], f"{len(names) - 2} more"] if len(names) > 3 else names
        activity = f"{', '.join(names)} on {dataset_key} {batch + 1}" + ("" if batches is None else f"/{batches}")
        if not self._bar.is_live:
            self.logger.info("%s", activity)
        self._draw(activity)

    def _draw(self, activity: str = "") -> None:
        self.next_time = monotonic() + self._interval
        line = [Text(activity, "cyan", no_wrap=True, overflow="ellipsis")] if activity else []
        self._bar.draw(*line, Columns([Text(item, "dim") for item in _texts(self._shown)], padding=(0, 2)))
        if self._curves is not None:
            self._curves.draw()


def _epoch(counter: UpdateCounter) -> str:
    """Return which epoch of how many the last update belongs to."""
    if not counter.has_epochs:
        return ""
    epoch, epochs = (-(-update // counter.updates_per_epoch) for update in (counter.update, counter.end_update))
    return f"epoch {max(epoch, min(epochs, 1))}/{epochs}"


def _texts(metrics: Mapping[str, float]) -> list[str]:
    """Return metrics as texts, and of many the first ones."""
    texts = [f"{key} {format_number(value)}" for key, value in islice(metrics.items(), _MOST_METRICS)]
    left = len(metrics) - len(texts)
    return [*texts, f"and {left} more"] if left else texts
