"""Tables fit a terminal, and no word, number or id is broken over two lines."""

import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from ksuit_runner.ui.terminal import print_table

HEADS = ("job", "optimizer.lr", "callbacks", "accuracy/validation", "status", "time", "run")
ROWS = [
    ("1", "0.001", "[ema,accuracy,loss]", "0.9837", "finished", "2m 05s", "0b3d5ae1"),
    ("10", "0.0001", "[accuracy]", "0.972", "failed", "0.3s", "4e19a0a0"),
]
OPTIONS = {"status_column": 4, "optional": [[5], [0]], "least": {2: 8}}


def printed(width, heads=HEADS, rows=ROWS, terminal=True, **options):
    console = Console(width=width, force_terminal=terminal, color_system=None, highlight=False, legacy_windows=False)
    with console.capture() as capture:
        print_table(console, heads, rows, **options)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_table_has_no_empty_lines_around_it_and_ids_are_no_numbers():
    assert printed(100, **OPTIONS) == [
        "job  optimizer.lr  callbacks            accuracy/validation  status      time  run",
        "─" * 87,
        "  1         0.001  [ema,accuracy,loss]               0.9837  finished  2m 05s  0b3d5ae1",
        " 10        0.0001  [accuracy]                         0.972  failed      0.3s  4e19a0a0",
    ]


def test_heads_take_several_lines_before_cells_are_cut():
    assert printed(76, **OPTIONS) == [
        "     optimizer.                        accuracy/",
        "job          lr  callbacks            validation  status      time  run",
        "─" * 76,
        "  1       0.001  [ema,accuracy,loss]      0.9837  finished  2m 05s  0b3d5ae1",
        " 10      0.0001  [accuracy]                0.972  failed      0.3s  4e19a0a0",
    ]


def test_the_least_important_columns_are_left_out_last():
    assert printed(56, **OPTIONS) == [
        "optimizer.                 accuracy/",
        "        lr  callbacks     validation  status    run",
        "─" * 56,
        "     0.001  [ema,a…loss]      0.9837  finished  0b3d5ae1",
        "    0.0001  [accuracy]         0.972  failed    4e19a0a0",
        "columns that do not fit: job, time",
    ]


@pytest.mark.parametrize("width", [56, 60, 66, 72, 80, 200])
def test_no_word_is_broken(width):
    lines = printed(width, **OPTIONS)
    assert max(map(cell_len, lines)) <= width
    for column in (1, 3, 4, 6):
        assert all(re.search(rf"(^| ){re.escape(row[column])}( |$)", "\n".join(lines), re.M) for row in ROWS)


def test_a_file_has_everything_in_one_line_each():
    whole = [*ROWS[0][:2], "x" * 300, *ROWS[0][3:]]
    lines = printed(1000, rows=[whole], terminal=False, **OPTIONS)
    assert len(lines) == 2 and lines[0].split() == list(HEADS) and " ".join(lines[1].split()) == " ".join(whole)


def test_names_are_cut_in_the_middle_and_sentences_at_the_end():
    rows = [("indecisive-skink-421", "a first try with much more text", "0.5")]
    lines = printed(40, ("name", "notes", "best"), rows, least={0: 12, 1: 12})
    assert lines[2] == "indecisi…ink-421  a first try wit…   0.5"
