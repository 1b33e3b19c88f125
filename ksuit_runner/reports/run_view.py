"""A run as it is shown while it trains: a bar with metrics, curves in a notebook, and the words of a line."""

from collections.abc import Mapping, Sequence
from itertools import islice

from rich.columns import Columns
from rich.text import Text

from ksuit_runner.counter import UpdateCounter
from ksuit_runner.metric_property import MetricPropertyProvider
from ksuit_runner.paths import PathProvider
from ksuit_runner.record.journal import read_points
from ksuit_runner.reports.live_curves import LiveCurves
from ksuit_runner.ui.formats import format_number
from ksuit_runner.ui.logs import run_console
from ksuit_runner.ui.notebook import in_notebook
from ksuit_runner.ui.progress_bar import ProgressBar
from ksuit_runner.ui.terminal import make_console

_MOST_METRICS = 12


class RunView:
    """Shows where a run is and the last values of its metrics, of those with a better direction.

    Args:
        paths: The run's files.
        properties: Knows which metrics have a better direction.
        is_shown: Whether anything is shown, as on the rank that records.

    Attributes:
        is_live: Whether it can be redrawn; else only its words are of use.
    """

    def __init__(self, paths: PathProvider, properties: MetricPropertyProvider, is_shown: bool = True) -> None:
        self._bar = ProgressBar(run_console() if is_shown else make_console(quiet=True), "updates")
        self.is_live = self._bar.is_live
        self._curves = LiveCurves(paths.run_id) if self.is_live and in_notebook() else None
        self._paths, self._properties = paths, properties
        self._metrics: dict[str, float] = {}

    def begin(self, counter: UpdateCounter) -> None:
        """Begin to measure the time; a run that is resumed has the curves of before."""
        self._bar.begin(counter.end_update, counter.update)
        if self._curves is not None and self._paths.journal.is_file():
            for point in read_points(self._paths.journal):
                self._curves.add(point.step, self._directed({point.key: point.value}))

    def add(self, update: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Add the values that metrics have after an update, and return those that are shown."""
        directed = self._directed(metrics)
        self._metrics.update(directed)
        if self._curves is not None:
            self._curves.add(update, directed)
        return directed

    def position(self, counter: UpdateCounter) -> list[str]:
        """Move the bar to where training is, and return that in words: epoch, update, pace, time left."""
        epoch = _epoch(counter)
        self._bar.update(counter.update, epoch or "update")
        left = "" if counter.is_finished else self._bar.left
        words = [epoch, f"update {counter.update}/{counter.end_update}", self._bar.pace, left]
        return [word for word in words if word]

    def values(self, metrics: Mapping[str, float] | None = None) -> list[str]:
        """Return metrics in words, and of many the first ones; by default the last value of each."""
        metrics = self._metrics if metrics is None else metrics
        texts = [f"{key} {format_number(value)}" for key, value in islice(metrics.items(), _MOST_METRICS)]
        left = len(metrics) - len(texts)
        return [*texts, f"and {left} more"] if left else texts

    def draw(self, activity: str = "") -> None:
        """Draw it anew, with what the run does now besides training."""
        line = [Text(activity, "cyan", no_wrap=True, overflow="ellipsis")] if activity else []
        self._bar.draw(*line, Columns([Text(item, "dim") for item in self.values()], padding=(0, 2)))
        if self._curves is not None:
            self._curves.draw()

    def draw_evaluation(
        self, counter: UpdateCounter, names: Sequence[str], dataset_key: str, batch: int, batches: int | None
    ) -> str:
        """Draw it with the evaluation that is in progress, and return that in words.

        Args:
            counter: Where training is.
            names: Names of the callbacks that evaluate.
            dataset_key: The dataset.
            batch: Number of the batch, from 0.
            batches: How many there are, if that is known.
        """
        self.position(counter)
        named = [*names[:2], f"{len(names) - 2} more"] if len(names) > 3 else names
        activity = f"{', '.join(named)} on {dataset_key} {batch + 1}" + ("" if batches is None else f"/{batches}")
        self.draw(activity)
        return activity

    def stop(self) -> None:
        """Leave the terminal as it was found, and the curves with all points."""
        self._bar.stop()
        if self._curves is not None:
            self._curves.draw(at_end=True)

    def _directed(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {key: value for key, value in metrics.items() if self._properties.direction(key) != "neutral"}


def _epoch(counter: UpdateCounter) -> str:
    """Return which epoch of how many the last update belongs to."""
    if not counter.has_epochs:
        return ""
    epoch, epochs = (-(-update // counter.updates_per_epoch) for update in (counter.update, counter.end_update))
    return f"epoch {max(epoch, min(epochs, 1))}/{epochs}"
