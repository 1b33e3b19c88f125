"""The leaderboard as tables: in the terminal, and as Markdown and CSV files of the parent run."""

import csv
import io
from collections.abc import Sequence

from rich.console import Console

from ksuit_runner.config.overrides import bare_name
from ksuit_runner.paths import SweepPaths
from ksuit_runner.sweep.leaderboard import Group, Leaderboard
from ksuit_runner.system.atomic_files import write_text
from ksuit_runner.ui.formats import SHORT_ID, format_duration, format_number
from ksuit_runner.ui.terminal import print_table

_LEAST = 8  # characters of a value in a narrow terminal

Table = tuple[list[str], list[list[str]]]
"""Column heads and rows."""


def print_leaderboard(console: Console, board: Leaderboard) -> None:
    """Print the jobs, best first, and the means over seeds or folds where there are several."""
    heads, rows = job_table(board, SHORT_ID)
    status = heads.index("status")
    shown = range(status - 1, len(board.keys) + 1, -1)  # the first one ranks
    alike = [status] if len({row.status for row in board.rows}) == 1 else []
    optional = [[index] for index in (heads.index("time"), *shown, *alike, 0)]
    least = dict.fromkeys(range(1, len(board.keys) + 1), _LEAST)
    print_table(console, heads, rows, status, optional, least)
    if board.objective is None and len(rows) > 1 and (metrics := board.metric_keys):
        hint = f"not ranked, as the sweep has no objective; to rank it: leaderboard=SWEEP_ID objective={metrics[0]}"
        console.print(hint, soft_wrap=True, highlight=False)
    if board.groups:
        console.print()
        print_table(console, *group_table(board), least=dict.fromkeys(range(len(board.compared)), _LEAST))


def write_leaderboard(paths: SweepPaths, board: Leaderboard) -> None:
    """Write both tables as Markdown, and the jobs as CSV."""
    write_text(paths.table, f"# {board.name}\n\n{as_markdown(board)}")
    text = io.StringIO()
    csv.writer(text).writerows(_csv_rows(board))
    write_text(paths.csv, text.getvalue())


def as_markdown(board: Leaderboard, most_rows: int | None = None) -> str:
    """Return both tables as Markdown, of each the first rows."""
    tables = [job_table(board)] + ([group_table(board)] if board.groups else [])
    return "\n".join(_markdown((heads, rows[:most_rows])) for heads, rows in tables)


def job_table(board: Leaderboard, id_length: int | None = None) -> Table:
    """Return the jobs with the overrides in which they differ.

    Args:
        board: The leaderboard.
        id_length: How many characters of a run's id to show; None shows all.
    """
    metrics = board.metric_keys
    heads = ["job", *map(bare_name, board.keys), *metrics, "status", "time", "run"]
    rows = [
        [
            str(row.index + 1),
            *(_shorten(row.values[key]) for key in board.keys),
            *(format_number(row.metrics[key]) if key in row.metrics else "" for key in metrics),
            row.status,
            format_duration(row.seconds) if row.seconds else "",
            (row.run_id or "")[:id_length],
        ]
        for row in board.rows
    ]
    return heads, rows


def group_table(board: Leaderboard) -> Table:
    """Return mean and deviation of the objective over seeds or folds, with the other overrides that differ."""
    keys = board.compared
    repeated = [bare_name(key).rpartition(".")[2] for key in board.keys if key not in keys]
    counted = f"{repeated[0]}s" if len(repeated) == 1 else "jobs"
    heads = [*map(bare_name, keys), f"{board.objective} (mean ± deviation)", counted]
    rows = [[*(_shorten(group.values[key]) for key in keys), spread(group), str(group.count)] for group in board.groups]
    if any(group.published is not None for group in board.groups):
        heads.append("published")
        for group, row in zip(board.groups, rows, strict=True):
            row.append("" if group.published is None else format_number(group.published))
    return heads, rows


def spread(group: Group) -> str:
    """Return mean and deviation as text."""
    mean = format_number(group.mean)
    return mean if group.deviation is None else f"{mean} ± {group.deviation:.2g}"


def _shorten(value: str) -> str:
    """Shorten a long number, such as a search suggests, to six digits."""
    try:
        return value if len(value) <= 9 else f"{float(value):.6g}"
    except ValueError:
        return value


def _markdown(table: Table) -> str:
    heads, rows = table
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def _csv_rows(board: Leaderboard) -> Sequence[Sequence[object]]:
    metrics = board.metric_keys
    rows = [
        [
            row.index + 1,
            *(row.values[key] for key in board.keys),
            *(row.metrics.get(key, "") for key in metrics),
            row.status,
            round(row.seconds, 3),
            row.run_id or "",
        ]
        for row in board.rows
    ]
    return [["job", *map(bare_name, board.keys), *metrics, "status", "seconds", "run"], *rows]
