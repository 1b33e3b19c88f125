"""The leaderboard as a picture: the objective over what varies."""

from collections.abc import Sequence
from math import isfinite, log
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ksuit_runner.sweep.leaderboard import Leaderboard, Row
from ksuit_runner.sweep.override_text import bare_name
from ksuit_runner.sweep.space import SEED

_LOG_RATIO = 30.0  # positive values that are farther apart are spread by their logarithm


def draw_leaderboard(path: Path, board: Leaderboard) -> bool:
    """Draw a sweep: over one swept value with the mean and deviation over seeds, over several as parallel coordinates.

    Args:
        path: PNG file to write.
        board: The leaderboard.

    Returns:
        Whether there was anything to draw, and matplotlib (which MLflow brings) to draw it with.
    """
    keys = [key for key in board.keys if key != SEED] or board.keys
    objective = board.objective
    rows = [row for row in board.rows if objective in row.metrics and isfinite(row.metrics[objective])]
    if objective is None or not keys or not rows:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(max(6.0, 1.6 * (len(keys) + 1)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(board.name)
    axes = figure.add_subplot()
    if len(keys) == 1:
        _draw_values(axes, rows, keys[0], objective)
    else:
        _draw_parallel(figure, axes, rows, keys, objective)
    figure.savefig(path, dpi=120)
    return True


def _draw_values(axes: Any, rows: Sequence[Row], key: str, objective: str) -> None:
    numbers = _numbers([row.values[key] for row in rows])
    by_value: dict[Any, list[float]] = {}
    for index, row in enumerate(rows):
        by_value.setdefault(numbers[index] if numbers else row.values[key], []).append(row.metrics[objective])
    positions = sorted(by_value) if numbers else list(by_value)
    means = [fmean(by_value[value]) for value in positions]
    deviations = [stdev(found) if len(found) > 1 else 0.0 for found in map(by_value.__getitem__, positions)]
    axes.errorbar(positions, means, yerr=deviations, fmt="o-" if numbers else "o", capsize=4)
    for value, found in by_value.items():
        axes.plot([value] * len(found), found, ".", color="grey", alpha=0.6)
    if numbers and _is_logarithmic(numbers):
        axes.set_xscale("log")
    axes.set_xlabel(bare_name(key))
    axes.set_ylabel(objective)


def _draw_parallel(figure: Any, axes: Any, rows: Sequence[Row], keys: Sequence[str], objective: str) -> None:
    """Draw every job as a line across one axis per key, coloured by the objective, which is the last axis."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    results = [row.metrics[objective] for row in rows]
    columns = [_scaled([row.values[key] for row in rows]) for key in keys] + [_unit(results)]
    norm = Normalize(min(results), max(results))
    for index, result in enumerate(results):
        color = colormaps["viridis"](norm(result))
        axes.plot(range(len(columns)), [column[index] for column in columns], color=color, alpha=0.8)
    for place, key in enumerate(keys):
        labels = {columns[place][index]: row.values[key] for index, row in enumerate(rows)}
        shown = sorted(labels)[:: max(1, len(labels) // 8)]
        for height in shown:
            axes.annotate(labels[height], (place, height), fontsize=8, xytext=(4, 2), textcoords="offset points")
        axes.axvline(place, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(columns)), [*map(bare_name, keys), objective], rotation=15)
    axes.set_yticks([])
    axes.margins(x=0.08)
    figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, label=objective)


def _numbers(texts: Sequence[str]) -> list[float]:
    """Return the values as numbers, none if one of them is no number."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        return []


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
