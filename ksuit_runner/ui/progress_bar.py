"""A bar with lines below it: on a terminal or in a notebook; elsewhere only its numbers are known."""

from __future__ import annotations

import math

from rich import progress
from rich.console import Console, Group, RenderableType
from rich.table import Column
from rich.text import Text

from ksuit_runner.ui.formats import format_duration, format_number
from ksuit_runner.ui.notebook import live_view

_WIDE = 70
"""Characters of a terminal with room for the time that has passed."""


class ProgressBar:
    """A bar of rich that is redrawn when it is told to, with what is shown below it.

    Args:
        console: Where it is drawn; a console that is quiet shows nothing.
        unit: What is counted, for the pace; None shows no pace.

    Attributes:
        is_live: Whether it can be redrawn.
    """

    def __init__(self, console: Console, unit: str | None = None) -> None:
        self._unit = unit
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            *([_PaceColumn(unit)] if unit else []),
            *([progress.TimeElapsedColumn()] if console.width >= _WIDE else []),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("left"),
            console=console,
            expand=True,
            speed_estimate_period=math.inf,  # updates may be minutes apart
        )
        self._view = live_view(console)
        self.is_live = self._view is not None

    def begin(self, total: int, completed: float = 0) -> None:
        """Begin to measure the time, of what is not complete yet."""
        task = self._bar.add_task("", total=total, completed=completed)  # type: ignore[arg-type]
        self._bar.advance(task, 0)  # the first sample of its speed

    def skip(self, steps: float) -> None:
        """Count what was complete before: it has taken no time."""
        self._bar.tasks[0].completed += steps

    def update(self, completed: float, description: str) -> None:
        """Say how much is complete, and what it is."""
        for task in self._bar.task_ids:
            self._bar.update(task, completed=completed, description=description)

    def draw(self, *below: RenderableType) -> None:
        """Show the bar, if it has begun, and what is below it."""
        if self._view is not None:
            if not self._view.is_started:
                self._view.start()
            self._view.update(Group(*([self._bar] if self._bar.task_ids else []), *below), refresh=True)

    def stop(self) -> None:
        """Leave the terminal as it was found; nothing is drawn any more."""
        if self._view is not None:
            self._view.stop()
            self._view = None

    @property
    def pace(self) -> str:
        """How much is completed per second, as text; empty if that is not known yet."""
        return _pace(self._bar.tasks[0], self._unit) if self._bar.tasks and self._unit else ""

    @property
    def left(self) -> str:
        """The time left at this speed, as text; empty if nothing is left, or it is not known yet."""
        seconds = self._bar.tasks[0].time_remaining if self._bar.tasks else None
        return f"{format_duration(seconds)} left" if seconds else ""


class _PaceColumn(progress.ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__(Column(no_wrap=True))
        self._unit = unit

    def render(self, task: progress.Task) -> Text:
        return Text(_pace(task, self._unit))


def _pace(task: progress.Task, unit: str) -> str:
    return f"{format_number(task.speed)} {unit}/s" if task.speed else ""
