"""Progress of training: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from time import monotonic
from typing import Any, ClassVar

from rich.columns import Columns
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ksuit_runner.callback_base import CallbackBase, quiet
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError
from ksuit_runner.keyed_random import uses_no_rng
from ksuit_runner.ui.terminal import format_number, run_console


class Progress(CallbackBase):
    """Shows position, speed, the time left, and the last values of metrics that have a better direction.

    Without a terminal it prints a line after each evaluation, at the end, and at intervals in between.

    Args:
        every_n_seconds: Interval of the lines in between.
        refresh_seconds: Shortest time between two refreshes of the bar.
        **kwargs: Passed on to CallbackBase.

    Raises:
        ConfigError: A time is not positive.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(self, every_n_seconds: float = 10.0, refresh_seconds: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if every_n_seconds <= 0 or refresh_seconds <= 0:
            raise ConfigError("every_n_seconds, refresh_seconds: a time has to be positive")
        console = run_console()
        is_shown = console.is_interactive and self.data_container.world.records
        self._live = Live(console=console, auto_refresh=False) if is_shown else None
        self._interval = every_n_seconds if self._live is None else refresh_seconds
        self._shown: dict[str, float] = {}
        self._start = self._next = 0.0
        self._start_update = self._last_update = -1

    def _before_training(self, update_counter: UpdateCounter) -> None:
        self._start, self._start_update = monotonic(), update_counter.update
        self._next = self._start + self._interval
        if self._live is not None:
            self._live.start()
            self._show(update_counter)

    @quiet
    @uses_no_rng
    def _after_update(self, update_counter: UpdateCounter) -> None:
        if monotonic() >= self._next:
            self._show(update_counter)

    @uses_no_rng
    def _after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None:
        directed = {key: v for key, v in metrics.items() if self.metric_property_provider.direction(key) != "neutral"}
        self._shown.update(directed)
        if self._live is None and not all(key.endswith("/train") for key in directed):
            is_shown = self._last_update == update_counter.update  # as when a test set is evaluated at the end
            self._show(update_counter, directed if is_shown else self._shown)

    def _after_training(self, update_counter: UpdateCounter) -> None:
        if self._live is not None or self._last_update != update_counter.update:
            self._show(update_counter)

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._live is not None:
            self._live.stop()

    def _show(self, counter: UpdateCounter, shown: Mapping[str, float] | None = None) -> None:
        shown = self._shown if shown is None else shown
        epoch = f"epoch {counter.epoch}  " if counter.has_epochs else ""
        position = f"{epoch}update {counter.update}/{counter.end_update}"
        metrics = [f"{key} {format_number(value)}" for key, value in shown.items()]
        if self._live is None:
            self.logger.info("%s", "  ".join(part for part in (position, self._pace(counter), *metrics) if part))
        elif self._live.is_started:
            line = Table.grid(padding=(0, 1))
            line.add_row(position, ProgressBar(counter.end_update, counter.update, width=24), self._pace(counter))
            cells = Columns([Text(item, "dim") for item in metrics], padding=(0, 2))
            self._live.update(Group(line, cells), refresh=True)
        self._next, self._last_update = monotonic() + self._interval, counter.update

    def _pace(self, counter: UpdateCounter) -> str:
        """Return updates per second since training was started or resumed, and the time left at this pace."""
        updates = counter.update - self._start_update
        if self._start_update < 0 or updates == 0:
            return ""
        seconds = monotonic() - self._start
        pace = f"{format_number(updates / seconds)} updates/s"
        if counter.is_finished:
            return pace
        return f"{pace}  {timedelta(seconds=round((counter.end_update - counter.update) * seconds / updates))} left"
