"""Curves of a run's metrics in a notebook, drawn while it trains."""

import logging
from collections.abc import Mapping
from io import BytesIO
from time import monotonic

from ksuit_runner.reports.curves import curves
from ksuit_runner.ui.figure_text import save_figure
from ksuit_runner.ui.notebook import NotebookPicture

_LOGGER = logging.getLogger(__name__)
_FIRST_S = 2.0  # a shorter run shows its curves with its result
_SHARE = 0.05  # of the time is spent on drawing at most
_MOST_POINTS = 1000  # of a metric; of more, every second one is dropped
_MOST_METRICS = 9


class LiveCurves:
    """Draws metrics over the updates as one picture, which is replaced in place.

    An error of drawing is a warning, and the last one: training goes on without curves.

    Args:
        run_id: Id of the run.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._points: dict[str, dict[int, float]] = {}
        self._picture = NotebookPicture(run_id)
        self._next = monotonic() + _FIRST_S
        self._is_drawn, self._is_broken = True, False

    def add(self, update: int, metrics: Mapping[str, float]) -> None:
        """Add the values that metrics have after an update."""
        for key, value in metrics.items():
            points = self._points.setdefault(key, {})
            points[update] = value
            if len(points) > _MOST_POINTS:
                self._points[key] = dict(list(points.items())[::-2][::-1])
            self._is_drawn = False

    def draw(self, *, at_end: bool = False) -> None:
        """Draw what is new, if drawing has not taken too much of the time so far.

        Args:
            at_end: Draw it in any case, if the run was long enough to be drawn before.
        """
        began = monotonic()
        if self._is_drawn or self._is_broken or (began < self._next and not (at_end and self._picture.is_shown)):
            return
        try:
            self._show()
        except Exception as error:  # of matplotlib, or of the notebook
            self._is_broken = True
            _LOGGER.warning("no more curves are drawn: %r", error)
        self._next = monotonic() + max(_FIRST_S, (monotonic() - began) / _SHARE)

    def _show(self) -> None:
        keys = [key for key, points in self._points.items() if len(points) > 1][:_MOST_METRICS]
        if (figure := curves([self._run_id], [self._points], keys)) is not None:
            content = BytesIO()
            save_figure(figure, content)
            self._picture.show(content.getvalue())
            self._is_drawn = True
