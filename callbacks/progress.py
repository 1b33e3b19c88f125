"""What a person sees while a run trains: a bar on a terminal, plain lines anywhere else."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from time import monotonic
from typing import Any, ClassVar

from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError
from ksuit_runner.terminal import format_number, run_console


class Progress(CallbackBase):
    """Shows position, losses, metrics where higher is better, speed and the time that is left.

    Args:
        every_n_seconds: Shortest time between two plain lines.
        refresh_seconds: Shortest time between two pictures of the bar.
        **kwargs: Passed on to CallbackBase.

    Raises:
        ConfigError: A time is not positive.
    """

    logs: ClassVar[Sequence[str] | None] = ()

    def __init__(self, every_n_seconds: float = 5.0, refresh_seconds: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if every_n_seconds <= 0 or refresh_seconds <= 0:
            raise ConfigError("every_n_seconds, refresh_seconds: a time has to be positive")
        console = run_console()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}", style="dim"))
        self._bar = Bar(*columns, console=console, auto_refresh=False) if console.is_terminal else None
        self._interval = refresh_seconds if self._bar is not None else every_n_seconds
        self._task = TaskID(0)
        self._shown: dict[str, float] = {}
        self._next = self._start = 0.0
        self._start_update = 0

    def _before_training(self, update_counter: UpdateCounter) -> None:
        self._start, self._start_update = monotonic(), update_counter.update
        self._next = self._start + self._interval
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=update_counter.end_update, text="")
            self._show(update_counter)

    def _after_update(self, update_counter: UpdateCounter) -> None:
        now = monotonic()
        if now >= self._next:
            self._next = now + self._interval
            self._show(update_counter)

    def _after_log(self, update_counter: UpdateCounter, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            if key == "loss/train" or self.metric_property_provider.direction(key) == "higher":
                self._shown[key] = value

    def _after_training(self, update_counter: UpdateCounter) -> None:
        self._show(update_counter)

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._bar is not None:
            self._bar.stop()

    def _show(self, counter: UpdateCounter) -> None:
        metrics = "  ".join(f"{key} {format_number(value)}" for key, value in self._shown.items())
        position = f"epoch {counter.epoch}  update {counter.update}/{counter.end_update}"
        text = "  ".join(part for part in (metrics, self._pace(counter)) if part)
        if self._bar is None:
            self.logger.info("%s  %s", position, text)
        else:
            self._bar.update(self._task, completed=counter.update, description=position, text=text, refresh=True)

    def _pace(self, counter: UpdateCounter) -> str:
        seconds, updates = monotonic() - self._start, counter.update - self._start_update
        if updates == 0:
            return ""
        left = (counter.end_update - counter.update) * seconds / updates
        return f"{updates / seconds:.3g} updates/s  {timedelta(seconds=round(left))} left"
