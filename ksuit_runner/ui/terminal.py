"""What commands print on the terminal: the start and the end of a run, tables, warnings and errors."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.text import Text

from ksuit_runner.errors import KsuitError
from ksuit_runner.metric_property import Summary
from ksuit_runner.paths import shown_path
from ksuit_runner.security.masking import mask_text
from ksuit_runner.ui import tables
from ksuit_runner.ui.formats import format_duration, format_number
from ksuit_runner.ui.lasting_output import LastingStream

_FILE_WIDTH = 1000
_ERROR_LINES = 6
_MOST_ROWS = 30
EVALUATED = "EVALUATED"
"""What ``print_end`` says of an evaluation instead of the status of the run, which it leaves as it is."""
_STATUS_STYLES = {"FINISHED": "green", EVALUATED: "green", "FAILED": "red", "KILLED": "yellow", "RUNNING": "cyan"}
LEVEL_STYLES = {"DEBUG": "dim", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red"}
"""Colours of the levels of the log."""


def make_console(stderr: bool = False, file: IO[str] | None = None, quiet: bool = False) -> Console:
    """Make a console on stdout, stderr or a file; without colours if NO_COLOR is set or it is not a terminal.

    A file has no width, so there no line is broken or cut. What cannot be written is dropped, see ``LastingStream``.

    Args:
        stderr: Whether it is on stderr.
        file: The file.
        quiet: Whether nothing is shown.
    """
    stream: Any = file or (sys.stderr if stderr else sys.stdout)
    if stream is not None and not isinstance(stream, LastingStream):
        stream = LastingStream(stream)
    can_redraw = stream is not None and stream.isatty()  # with FORCE_COLOR rich takes a file for a terminal
    console = Console(
        stderr=stderr,
        file=stream,
        quiet=quiet,
        highlight=False,
        force_jupyter=False,
        force_interactive=None if can_redraw else False,
    )
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def print_start(console: Console, run_id: str, name: str, where: str, run_dir: Path, device: str = "") -> None:
    """Print which run starts, where it is tracked, where its files are, and on which device it trains."""
    pairs = {"run": name, "id": run_id, "tracked": tracked_at(console, where), "folder": shown_path(run_dir)}
    print_pairs(console, pairs | ({"device": device} if device else {}))


def tracked_at(console: Console, where: str, label: str = "tracked  ") -> str:
    """Return what a tracker says about where its runs are: paths below the current folder are short.

    A command, which has an indented line of its own there, follows in the line before it, unless a terminal is too
    narrow: then it stays where it can be copied.

    Args:
        console: Where it is printed.
        where: What the tracker says.
        label: What is printed before it; further lines begin below its end.
    """
    folder = re.escape(os.getcwd().rstrip("/"))
    short = re.sub(rf"""(^|[\s'"=]|:///){folder}/""", r"\1", where)
    lines = short.replace("\n  ", " ").split("\n")
    if console.is_terminal and len(label) + max(map(len, lines)) > console.width:
        return short
    return f"\n{' ' * len(label)}".join(lines)


def print_end(
    console: Console,
    summary: Mapping[str, Summary],
    run_dir: Path,
    resume_command: str | None,
    status: str,
    seconds: float | None = None,
    best: Path | None = None,
) -> None:
    """Print how a run ended: its metrics as a table, its folder, its best checkpoint, and the command that resumes it.

    Args:
        console: Where to print.
        summary: Metrics by key, in the order of the table's rows.
        run_dir: Folder of the run.
        resume_command: Command that resumes the run, if it can be resumed.
        status: FINISHED, FAILED or KILLED; or EVALUATED.
        seconds: How long it took.
        best: Folder of its best checkpoint.
    """
    if summary:
        print_blank(console)
        console.print(metric_table(console, summary))
        print_blank(console)
    took = "" if seconds is None else f" after {format_duration(seconds)}"
    pairs = {"status": f"{status.lower()}{took}", "folder": shown_path(run_dir)}
    pairs |= {"best": shown_path(best)} if best is not None else {}
    print_pairs(console, pairs | ({"resume": resume_command} if resume_command else {}), status)


def metric_table(console: Console, summary: Mapping[str, Summary]) -> RenderableType:
    """Return a table of metrics: last and best value, a row for each.

    In a terminal that is too narrow for all columns, the last ones are left out. Of many metrics, those without
    a better direction are below the table, side by side.
    """
    neutral: dict[str, Summary] = {}
    if console.is_terminal and len(summary) > _MOST_ROWS:
        neutral = {key: metric for key, metric in summary.items() if metric.direction == "neutral"}
    heads = ("metric", "last", "best", "at update", "better")
    rows = [(key, *_metric_cells(metric, console.options.ascii_only)) for key, metric in summary.items()]
    fitted = tables.fit(heads, [row for row in rows if row[0] not in neutral], _width(console), optional=((4,), (3,)))
    table = tables.build(console, fitted.heads, [list(map(Text, row)) for row in fitted.rows], numeric=(1, 2, 3))
    cells = [Text.assemble((key, "dim"), " ", format_number(metric.last)) for key, metric in neutral.items()]
    return Group(table, Columns(cells, padding=(0, 2))) if cells else table


def print_table(
    console: Console,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    status_column: int | None = None,
    optional: Sequence[Sequence[int]] = (),
    least: Mapping[int, int] | None = None,
) -> None:
    """Print a table of text; columns of numbers are right-aligned.

    On a terminal that is too narrow, heads have several lines, cells are cut, columns are left out, and a line says
    which ones: see ``ui.tables.fit``.

    Args:
        console: Where to print.
        heads: Heads of the columns.
        rows: Cells, row by row.
        status_column: Column whose cells are coloured by status.
        optional: Columns that may be left out, together those of one item, the least important ones first.
        least: Column -> characters that its cells may be cut to.
    """
    fitted = tables.fit(heads, rows, _width(console), optional, least)
    numeric = [at for at, index in enumerate(fitted.shown) if rows and all(_is_number(row[index]) for row in rows)]
    texts = [list(map(Text, row)) for row in fitted.rows]
    if status_column in fitted.shown:
        for row, cells in zip(rows, texts, strict=True):
            cells[fitted.shown.index(status_column)].stylize(_STATUS_STYLES.get(row[status_column].upper(), ""))
    console.print(tables.build(console, fitted.heads, texts, numeric))
    if left_out := dict.fromkeys(head for index, head in enumerate(heads) if index not in fitted.shown):
        console.print(Text(f"columns that do not fit: {', '.join(left_out)}", "dim"), soft_wrap=True)


def print_blank(console: Console) -> None:
    """Print the empty line that sets a table on a terminal apart; a file has none."""
    if console.is_terminal:
        console.print()


def _width(console: Console) -> int | None:
    """Return how wide a table may be; None for any width, as in a file, where nothing is left out."""
    return console.width if console.is_terminal else None


def _is_number(text: str) -> bool:
    """Whether a cell is a number, perhaps with a unit and more after it, such as ``2h 05m`` or ``0.9 ± 0.1``."""
    return not text or re.fullmatch(r"[-+]?(\d[\d.,]*(e[-+]?\d+)?|inf|nan)[smhd%]?( .*)?", text) is not None


def print_error(console: Console, error: KsuitError) -> None:
    """Print an error that the user can fix: a red ``error:`` and its message, 6 lines at most."""
    lines = mask_text(str(error)).splitlines() or [type(error).__name__]
    if len(lines) > _ERROR_LINES:
        lines = [*lines[: _ERROR_LINES - 1], f"({len(lines) - _ERROR_LINES + 1} more lines)"]
    console.print(Text.assemble(("error:", "bold red"), " ", "\n".join(lines)), soft_wrap=True)


def print_warning(console: Console, message: str) -> None:
    """Print what the user should know, although it is no error."""
    console.print(Text(mask_text(message), LEVEL_STYLES["WARNING"]), soft_wrap=True)


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an unexpected error as Python does, with passwords masked; for ``sys.excepthook``."""
    sys.stderr.write(mask_text("".join(traceback.format_exception(kind, error, trace))))


def _metric_cells(metric: Summary, ascii_only: bool) -> tuple[str, str, str, str]:
    last = format_number(metric.last)
    if metric.direction == "neutral" or metric.best is None:
        return last, "", "", ""
    arrows = {"higher": "higher", "lower": "lower"} if ascii_only else {"higher": "↑", "lower": "↓"}
    return last, format_number(metric.best), str(metric.best_step), arrows[metric.direction]


def print_pairs(console: Console, pairs: Mapping[str, str], status: str = "") -> None:
    """Print labels with their values, a line each; the value of ``status`` has the status's colour."""
    width = max(map(len, pairs)) + 2
    for label, value in pairs.items():
        style = _STATUS_STYLES.get(status, "") if label == "status" else ""
        console.print(Text.assemble((label.ljust(width), "dim"), (mask_text(value), style)), soft_wrap=True)
