"""Figures of matplotlib that callbacks log; importing it takes most of a second, which only those wait for who draw."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ksuit_runner.ui.figure_text import literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_NAMES = 20  # rows that still have their names and numbers


def draw_confusion_matrix(counts: NDArray[np.int64], shares: NDArray[np.float64], names: Sequence[str]) -> "Figure":
    """Draw which classes are taken for which: a row is a target, a column a prediction.

    Args:
        counts: How often each pair occurs, shape (classes, classes): the numbers.
        shares: The same as shares of the target: the colors.
        names: Names of the classes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="prediction", ylabel="target")
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of the target")
    if len(names) <= _MOST_NAMES:
        longest, names = max(map(len, names)), [*map(literal, names)]
        axes.set_xticks(range(len(names)), names, rotation=90 if longest > 3 else 0)
        axes.set_yticks(range(len(names)), names)
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    return figure


def draw_range_test(
    rates: NDArray[np.float64],
    losses: NDArray[np.float64],
    smoothed: NDArray[np.float64],
    marked: Mapping[str, float],
) -> "Figure":
    """Draw losses over the learning rate of their update, all of shape (updates,), and mark some rates by name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), dpi=100, layout="constrained")
    axes = figure.add_subplot(xlabel="learning rate", ylabel="loss", xscale="log")
    axes.plot(rates, losses, color="lightgray", label="each update")
    axes.plot(rates, smoothed, label="smoothed")
    usual = losses[losses <= 1.5 * smoothed[0]]  # not the last ones, beside which nothing else could be seen
    if len(usual) > 1:
        axes.set_ylim(usual.min(), usual.max())
    for number, (name, rate) in enumerate(marked.items()):
        axes.axvline(rate, color=f"C{number + 1}", linestyle="--", label=f"{name.replace('_', ' ')}: {rate:.2g}")
    axes.legend()
    return figure
