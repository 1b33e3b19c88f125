"""The leaderboard as a plot: the objective over the swept values."""

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite, log, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksuit_runner.config.overrides import bare_name
from ksuit_runner.sweep.leaderboard import Leaderboard, Row, mean_and_deviation
from ksuit_runner.ui.figure_text import literal, save_figure
from ksuit_runner.ui.formats import format_number, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOG_RATIO = 30.0  # positive values with a larger ratio are drawn on a logarithmic scale
_LINE_POINTS = 20  # up to so many values are joined by a line
_NAME_LENGTH, _TITLE_LENGTH = 24, 60
_SPACING = 0.08  # between two labels at an axis of length 1


def draw_leaderboard(path: Path, board: Leaderboard) -> bool:
    """Draw a sweep into a PNG file, as ``leaderboard_figure`` does, and return whether there was something to draw."""
    if (figure := leaderboard_figure(board)) is None:
        return False
    save_figure(figure, path)
    return True


def leaderboard_figure(board: Leaderboard) -> "Figure | None":
    """Draw a sweep: over one swept key with mean and deviation (over seeds, say), over several as parallel coordinates.

    Returns:
        The figure; None if there is nothing to draw, or matplotlib (a dependency of MLflow) is not installed.
    """
    keys = board.compared or board.keys
    objective = board.objective
    rows = [row for row in board.rows if objective in row.metrics and isfinite(row.metrics[objective])]
    if len(keys) == 1:
        rows = [row for row in rows if row.status == "finished"]  # as in the table of means
    if objective is None or not keys or not rows or (figure := _empty(board)) is None:
        return None
    axes = figure.add_subplot()
    if len(keys) == 1:
        _draw_values(figure, axes, rows, keys[0], objective, is_number=keys == board.compared)
    else:
        _draw_parallel(figure, axes, rows, keys, objective)
    return figure


def values_figure(board: Leaderboard) -> "Figure | None":
    """Draw the objective of every job over the values of each swept key, the best job in colour.

    Returns:
        The figure; None if there is nothing to draw, or matplotlib (a dependency of MLflow) is not installed.
    """
    objective = board.objective
    rows = [row for row in board.rows if objective in row.metrics and isfinite(row.metrics[objective])]
    if objective is None or not rows or (figure := _empty(board)) is None:
        return None
    columns = min(3, len(board.keys))
    lines = -(-len(board.keys) // columns)
    figure.set_size_inches(4.5 * columns, 3.5 * lines)
    results = [row.metrics[objective] for row in rows]
    for number, key in enumerate(board.keys, 1):
        axes = figure.add_subplot(lines, columns, number)
        xs, names = _positions([row.values[key] for row in rows], is_number=key in board.compared)
        axes.plot(xs, results, "o", color="grey", alpha=0.6)
        axes.plot(xs[:1], results[:1], "o", color="tab:red")  # they are ranked
        if names:
            _set_names(axes, names, room=40)
        else:
            _scale(axes, xs)
        axes.set_xlabel(_label(bare_name(key)))
        axes.set_ylabel(_label(objective))
    return figure


def _empty(board: Leaderboard) -> "Figure | None":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6.0, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_label(board.name, _TITLE_LENGTH))
    return figure


def _draw_values(figure: Any, axes: Any, rows: Sequence[Row], key: str, objective: str, is_number: bool) -> None:
    """Draw a point per value, joined by a line where the values are numbers, and not names as those of seeds are."""
    places, names = _positions([row.values[key] for row in rows], is_number)
    by_x: dict[float, list[float]] = {}
    for x, row in zip(places, rows, strict=True):
        by_x.setdefault(x, []).append(row.metrics[objective])
    xs = sorted(by_x)
    found = [mean_and_deviation(by_x[x]) for x in xs]
    deviations = [nan if deviation is None else deviation for _, deviation in found]
    style = "o-" if not names and len(xs) <= _LINE_POINTS else "o"
    axes.errorbar(xs, [mean for mean, _ in found], deviations, fmt=style, capsize=4, label="mean ± deviation")
    if any(len(values) > 1 for values in by_x.values()):
        points = [(x, value) for x, values in by_x.items() for value in values]
        axes.plot(*zip(*points, strict=True), ".", color="grey", alpha=0.6, label="run")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    if names:
        figure.set_figwidth(max(6.0, 0.6 * len(names)))
        _set_names(axes, names)
    else:
        _scale(axes, places)
    axes.set_xlabel(_label(bare_name(key)))
    axes.set_ylabel(_label(objective))


def _scale(axes: Any, numbers: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    values = sorted(set(numbers))
    if _is_logarithmic(numbers):
        axes.set_xscale("log")
    elif all(after - before >= _SPACING * (values[-1] - values[0]) for before, after in pairwise(values)):
        axes.set_xticks(values, [f"{value:g}" for value in values])
    elif all(number == int(number) for number in numbers):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _positions(texts: Sequence[str], is_number: bool) -> tuple[list[float], list[str]]:
    """Return where values are on an axis, and their names in this order; no names if the values are numbers."""
    numbers = _numbers(texts)
    if is_number and numbers:
        return numbers, []
    names = sorted(set(texts), key=float) if numbers else list(dict.fromkeys(texts))
    return [float(names.index(text)) for text in texts], names


def _set_names(axes: Any, names: Sequence[str], room: int = 50) -> None:
    """Write names below the x axis, slanted if there is no room for so many characters."""
    labels = [_label(name, _NAME_LENGTH) for name in names]
    is_tight = len(names) * max(map(len, labels)) > room
    slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_tight else {}
    axes.set_xticks(range(len(names)), labels, **slant)
    axes.set_xlim(-0.5, len(names) - 0.5)


def _draw_parallel(figure: Any, axes: Any, rows: Sequence[Row], keys: Sequence[str], objective: str) -> None:
    """Draw every job as a line across one axis per key, coloured by the objective, which is the last axis.

    The best one lies on top, and those that have not finished are dotted.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure.set_figwidth(max(6.0, 1.8 * (len(keys) + 1)))
    results = [row.metrics[objective] for row in rows]
    columns = [_scaled([row.values[key] for row in rows]) for key in keys] + [_unit(results)]
    norm = Normalize(min(results), max(results))
    for row, result, *heights in reversed(list(zip(rows, results, *columns, strict=True))):
        style, color = "-" if row.status == "finished" else ":", colormaps["viridis"](norm(result))
        axes.plot(range(len(columns)), heights, style, color=color, alpha=0.8)
    texts = [[_tick(row.values[key]) for row in rows] for key in keys] + [[*map(format_number, results)]]
    for x, (heights, names) in enumerate(zip(columns, texts, strict=True)):
        _label_axis(axes, x, dict(zip(heights, names, strict=True)))
    slant = {"rotation": 15, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), [_label(text) for text in (*map(bare_name, keys), objective)], **slant)
    axes.set_yticks([])
    axes.margins(x=0.08, y=0.06)
    axes.spines[:].set_visible(False)
    figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, label=_label(objective))


def _label_axis(axes: Any, x: int, names: dict[float, str]) -> None:
    """Draw one of the parallel axes and write as many of its values beside it as there is room for, ends included."""
    axes.axvline(x, color="grey", linewidth=0.8)
    shown: list[float] = []
    for height in (max(names), *sorted(names)):
        if all(abs(height - other) >= _SPACING for other in shown):
            shown.append(height)
            box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
            style = {"xytext": (4, 2), "textcoords": "offset points", "bbox": box, "zorder": 3}
            axes.annotate(_label(names[height], _NAME_LENGTH), (x, height), fontsize=8, **style)


def _label(text: str, length: int = 40) -> str:
    """Return a text for matplotlib that is drawn literally, cut if it is long."""
    return literal(shortened(text, length))


def _tick(value: str) -> str:
    return format_number(float(value)) if _numbers([value]) else value


def _numbers(texts: Sequence[str]) -> list[float]:
    """Return the values as numbers, none if one of them is not a number or non-finite."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return []
    return numbers if all(map(isfinite, numbers)) else []


def _is_logarithmic(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) / min(numbers) >= _LOG_RATIO


def _scaled(texts: Sequence[str]) -> list[float]:
    """Return heights from 0 to 1: numbers by their size, names in the order of their first appearance."""
    numbers = _numbers(texts)
    if not numbers:
        names = list(dict.fromkeys(texts))
        return _unit([float(names.index(text)) for text in texts])
    if _is_logarithmic(numbers):
        numbers = [log(number) for number in numbers]
    return _unit(numbers)


def _unit(numbers: Sequence[float]) -> list[float]:
    low, high = min(numbers), max(numbers)
    return [(number - low) / (high - low) if high > low else 0.5 for number in numbers]
