"""Curves of metrics over the updates, as a figure of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import isfinite
from typing import TYPE_CHECKING

from ksuit_runner.ui.figure_text import literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(
    labels: Sequence[str], points: Sequence[Mapping[str, Mapping[int, float]]], keys: Sequence[str]
) -> Figure | None:
    """Return a figure with axes for each metric and a line for each run, named in a legend if there are several.

    Args:
        labels: Names of the runs.
        points: The values of each metric by its key, by update, for each run.
        keys: The metrics, which all runs have.

    Returns:
        The figure; None if there are no metrics, or matplotlib (a dependency of MLflow) is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not keys:
        return None
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.0 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for number, key in enumerate(keys, 1):
        axes = figure.add_subplot(rows, columns, number)
        for label, known, style in zip(labels, points, cycle(("-", "--", "-.", ":")), strict=False):
            drawn = [(step, value) for step, value in sorted(known[key].items()) if isfinite(value)]
            axes.plot(*zip(*drawn, strict=True) if drawn else ((), ()), style, label=literal(label))
        axes.set_title(literal(key), fontsize="medium")
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
    if len(labels) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(labels)))
    return figure
