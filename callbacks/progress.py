"""Progress of training: a bar on a terminal or in a notebook, plain lines elsewhere."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import islice
from time import monotonic
from typing import Any, ClassVar

from rich import progress
from rich.columns import Columns
from rich.console import Group
from rich.text import Text

from ksuit_runner.callback_base import CallbackBase, quiet
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.ui.notebook import live_view
from ksuit_runner.ui.terminal import format_number, run_console

_MOST_METRICS = 12


class Progress(CallbackBase):
    """Shows position, speed, time, the evaluation in progress, and the last values of metrics with a better direction.

    Without a terminal it prints a line after each evaluation, at the end, and at intervals in between.

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
        console, records = run_console(), self.data_container.world.records
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[pace]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("left"),
            console=console,
            expand=True,
        )
        self._live = live_view(console) if records else None
        self._interval = every_n_seconds if self._live is None else refresh_seconds
        self._has_epoch_lines = line_per_epoch
        self._epoch_line: list[str] = []
        self._shown: dict[str, float] = {}
        self._next = monotonic() + self._interval
        self._start_update = self._last_update = -1
        if records:
            self.trainer.watch_evaluation = self._show_evaluation

    def _before_training(self, update_counter: UpdateCounter) -> None:
        self._start_update = update_counter.update
        self._bar.add_task("", total=update_counter.end_update, completed=update_counter.update, pace="")
        self._next = monotonic() + self._interval
        if self._live is not None:
            self._live.start()
            self._show(update_counter)

    @quiet
    @uses_no_rng
    def _after_update(self, update_counter: UpdateCounter) -> None:
        if monotonic() >= self._next:
            self._show(update_counter)

    @quiet
    @uses_no_rng
    def _after_epoch(self, update_counter: UpdateCounter) -> None:
        if self._has_epoch_lines:
            self._epoch_line = self._words(update_counter)
            self._next = 0.0  # it is printed with what is logged now, or else after the next update

    @uses_no_rng
    def _after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None:
        directed = {key: v for key, v in metrics.items() if self.metric_property_provider.direction(key) != "neutral"}
        self._shown.update(directed)
        is_evaluated = not all(key.endswith("/train") for key in directed)
        if self._epoch_line or (self._live is None and is_evaluated):
            is_shown = self._last_update == update_counter.update  # as when a test set is evaluated at the end
            self._show(update_counter, directed if is_shown and self._live is None else self._shown)

    def _after_training(self, update_counter: UpdateCounter) -> None:
        if self._live is not None or self._epoch_line or self._last_update != update_counter.update:
            self._show(update_counter)

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._live is not None:
            self._live.stop()

    def _show(self, counter: UpdateCounter, shown: Mapping[str, float] | None = None) -> None:
        metrics = _texts(self._shown if shown is None else shown)
        if self._live is None or self._epoch_line:
            words = [*(self._epoch_line or self._words(counter)), *metrics]
            self.logger.info("%s", "  ".join(word for word in words if word))
        for task in self._bar.task_ids:
            epoch, pace = _epoch(counter) or "update", self._pace(counter)
            self._bar.update(task, description=epoch, completed=counter.update, pace=pace)
        self._draw()
        self._epoch_line, self._last_update = [], counter.update

    def _words(self, counter: UpdateCounter) -> list[str]:
        position = f"update {counter.update}/{counter.end_update}"
        return [_epoch(counter), position, self._pace(counter), self._left(counter)]

    def _show_evaluation(self, names: Sequence[str], dataset_key: str, batch: int, batches: int | None) -> None:
        """Show which batch of an evaluation is read; see ``EvaluationWatcher``."""
        if monotonic() < self._next:
            return
        names = [*names[:2], f"{len(names) - 2} more"] if len(names) > 3 else names
        activity = f"{', '.join(names)} on {dataset_key} {batch + 1}" + ("" if batches is None else f"/{batches}")
        if self._live is None:
            self.logger.info("%s", activity)
        elif not self._bar.task_ids:  # an evaluation alone
            self._live.start()
        self._draw(activity)

    def _draw(self, activity: str = "") -> None:
        self._next = monotonic() + self._interval
        if self._live is not None and self._live.is_started:
            line = Text(activity, "cyan", no_wrap=True, overflow="ellipsis")
            cells = Columns([Text(item, "dim") for item in _texts(self._shown)], padding=(0, 2))
            parts: list[Any] = [*([self._bar] if self._bar.task_ids else []), *([line] if activity else []), cells]
            self._live.update(Group(*parts), refresh=True)

    def _pace(self, counter: UpdateCounter) -> str:
        """Return the updates per second since training was started or resumed."""
        if not (seconds := self._seconds_per_update(counter)):
            return ""
        return f"{format_number(1 / seconds)} updates/s"

    def _left(self, counter: UpdateCounter) -> str:
        """Return the time left at this pace."""
        seconds = self._seconds_per_update(counter)
        if not seconds or counter.is_finished:
            return ""
        return f"{timedelta(seconds=round((counter.end_update - counter.update) * seconds))} left"

    def _seconds_per_update(self, counter: UpdateCounter) -> float | None:
        updates = counter.update - self._start_update
        return (self._bar.tasks[0].elapsed or 0.0) / updates if self._bar.tasks and updates else None


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
