"""Tables that fit a terminal: as long as there is a way, no word, number or id is broken over lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = 2
_PART_OF_HEAD = re.compile(r"[^\s/.-]+[/.-]*\s*|[/.-]+\s*|\s+")


@dataclass(frozen=True)
class FittedTable:
    """A table in the width of a terminal.

    Attributes:
        heads: Heads of the columns that are shown, some over several lines.
        rows: Their cells, row by row, some of them cut.
        shown: Numbers of the columns that are shown.
    """

    heads: list[str]
    rows: list[list[str]]
    shown: list[int]


def fit(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None,
    optional: Sequence[Sequence[int]] = (),
    least: Mapping[int, int] | None = None,
) -> FittedTable:
    """Fit a table into a width: heads are put on several lines, cells are cut, and columns are left out.

    What does not fit even then stays too wide.

    Args:
        heads: Heads of the columns.
        rows: Cells, row by row.
        width: Characters of a line; None for as many as it takes.
        optional: Columns that may be left out, together those of one item, the least important ones first.
        least: Column -> characters that its cells may be cut to; those of other columns stay whole.
    """
    if width is None:
        return FittedTable(list(heads), [list(row) for row in rows], list(range(len(heads))))
    columns = [[row[index] for row in rows] for index in range(len(heads))]
    cells = [max(map(cell_len, column), default=0) for column in columns]
    whole = [max(cell_len(head), cell) for head, cell in zip(heads, cells, strict=True)]
    parts = [max(map(cell_len, _parts(head)), default=0) for head in heads]
    wrapped = list(map(max, parts, cells))
    limits = [min(cell, (least or {}).get(index, cell)) for index, cell in enumerate(cells)]
    narrowest = list(map(max, parts, limits))

    shown = list(range(len(heads)))
    for left_out in optional:
        if sum(narrowest[index] for index in shown) <= _room(width, shown):
            break
        shown = [index for index in shown if index not in left_out]
    widths = {index: whole[index] for index in shown}
    for limit in (wrapped, narrowest):
        _shrink(widths, limit, _room(width, shown))
    return FittedTable(
        [_wrap(heads[index], widths[index]) for index in shown],
        [[_cut(row[index], max(widths[index], 1)) for index in shown] for row in rows],
        shown,
    )


def build(console: Console, heads: Sequence[str], rows: Sequence[Sequence[Text]], numeric: Sequence[int]) -> Table:
    """Return a table for rich, with a line below its heads on a terminal; cells that are still too wide are folded.

    Args:
        console: Where it will be printed.
        heads: Heads of the columns.
        rows: Cells, row by row.
        numeric: Columns that are right-aligned.
    """
    if console.is_terminal:  # two characters between columns: one of the cell, one of the box
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    else:
        table = Table(box=None, pad_edge=False)
    for index, head in enumerate(heads):
        side: Literal["left", "right"] = "right" if index in numeric else "left"
        table.add_column(Text(head), justify=side, overflow="fold", vertical="bottom")
    for row in rows:
        table.add_row(*row)
    return table


def _room(width: int, shown: Sequence[int]) -> int:
    return width - _GAP * (len(shown) - 1)


def _shrink(widths: dict[int, int], limits: Sequence[int], room: int) -> None:
    """Make columns narrower until they fit, always the widest of those that may be."""
    while sum(widths.values()) > room:
        wide = [index for index, width in widths.items() if width > limits[index]]
        if not wide:
            return
        widths[max(wide, key=widths.__getitem__)] -= 1


def _parts(head: str) -> list[str]:
    """Return the parts of a head between which a line may end: after a space, slash, dot or hyphen."""
    return [part.rstrip() for part in _PART_OF_HEAD.findall(head)]


def _wrap(head: str, width: int) -> str:
    lines = [""]
    for part in _PART_OF_HEAD.findall(head):
        if cell_len((lines[-1] + part).rstrip()) <= width or not lines[-1]:
            lines[-1] += part
        else:
            lines.append(part)
    return "\n".join(line.rstrip() for line in lines)


def _cut(text: str, width: int) -> str:
    """Cut a text: in the middle, as names and metrics differ at both ends, but a sentence at its end."""
    if cell_len(text) <= width:
        return text
    middle = len(text) if " " in text else (len(text) + 1) // 2
    left, right = text[:middle], text[middle:]
    while cell_len(left) + 1 + cell_len(right) > width and (left or right):
        if len(left) > len(right):
            left = left[:-1]
        else:
            right = right[1:]
    return f"{left}…{right}"
