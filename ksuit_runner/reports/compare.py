"""What differs between runs: ``compare=[A,B]``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ksuit_runner.config.differences import ABSENT, differences
from ksuit_runner.config.flatten import nodes
from ksuit_runner.config.overrides import allow_only
from ksuit_runner.errors import ConfigError
from ksuit_runner.reports.code import code_facts, git_command, own_lines
from ksuit_runner.reports.curves import curves
from ksuit_runner.reports.facts import StoredRun
from ksuit_runner.reports.show import OF_A_RUN, TAKES, cell
from ksuit_runner.resume.request import find_stored
from ksuit_runner.security.masking import mask_text
from ksuit_runner.ui.figure_text import save_figure
from ksuit_runner.ui.formats import format_number
from ksuit_runner.ui.terminal import make_console, print_blank, print_pairs, print_table

_MOST_PLOTS = 12
_MOST_LINES = 20
_LEAST = 8  # characters of a value in a narrow terminal


def compare(query: str, overrides: Sequence[str]) -> int:
    """Print where runs differ: config, code, environment and metrics; and draw the metrics that they share.

    Args:
        query: The runs, ``[A,B]``; two or more.
        overrides: The command line; besides the runs it may say where they are.

    Returns:
        The exit status, 0.

    Raises:
        KsuitError: Fewer than two are given, one does not exist, or what is stored of it is damaged.
    """
    allow_only(overrides, "compare", *TAKES)
    queries = [item.strip() for item in query.strip("[]").split(",") if item.strip()]
    if len(queries) < 2:
        raise ConfigError(f"compare={query}: at least two runs are needed, such as compare A B")
    found = [find_stored("compare", item, overrides).paths for item in queries]
    if len({paths.run_id for paths in found}) < len(found):
        raise ConfigError(f"compare={query}: a run is given twice")
    runs, console = [StoredRun(paths) for paths in found], make_console()
    labels = _labels(runs)
    facts_of = {
        "config": _configs(runs),
        "code": list(map(code_facts, runs)),
        "environment": [_without_git(run.environment) for run in runs],
    }
    for title, facts in facts_of.items():
        if rows := _differing(facts, cell if title == "config" else str):
            print_table(console, (title, *labels), rows, least=dict.fromkeys(range(1, len(runs) + 1), _LEAST))
            print_blank(console)
        else:
            console.print(f"{title}: no difference")
        if title == "code":
            _print_changes(console, runs, labels)
    if rows := _metric_rows(runs):
        heads = ("metric", *(head for label in labels for head in (label, "best")))
        print_table(console, heads, rows, optional=[range(2, len(heads), 2)])
        print_blank(console)
    file = found[0].output_dir / f"compare-{'-'.join(paths.run_id[:8] for paths in found)}.png"
    if draw(file, labels, [run.points for run in runs]):
        print_pairs(console, {"plot": str(file)})
    return 0


def _print_changes(console: Console, runs: Sequence[StoredRun], labels: Sequence[str]) -> None:
    """Print what tells the code of runs apart: the lines that were not committed, and how to see the rest."""
    lines = list(own_lines(runs, labels))
    if lines:
        rows = [(name, label, mask_text(line)) for name, label, line in lines[:_MOST_LINES]]
        print_table(console, ("uncommitted change", "only in", "line"), rows, least={2: _LEAST})
        print_blank(console)
    more = {"commits": git_command(runs) or ""}
    if len(lines) > _MOST_LINES:
        diffs = " ".join(str(run.paths.diff) for run in runs)
        more["and more"] = f"{len(lines) - _MOST_LINES} lines; all changes: {diffs}"
    if shown := {label: text for label, text in more.items() if text}:
        print_pairs(console, shown)


def _without_git(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in environment.items() if not name.startswith("git.")}


def _labels(runs: Sequence[StoredRun]) -> list[str]:
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else run.paths.run_id[:8] for name, run in zip(names, runs, strict=True)]


def _configs(runs: Sequence[StoredRun]) -> list[dict[str, Any]]:
    """Return what differs in the configs, by config path: an object that only some have is one fact."""
    first, *others = (run.config for run in runs)
    facts: list[dict[str, Any]] = [{} for _ in runs]
    for other, known in zip(others, facts[1:], strict=True):
        for item in differences(first, other):
            if item.path not in OF_A_RUN:
                facts[0][item.path], known[item.path] = item.old, item.new
    for other, known in zip(others, facts[1:], strict=True):
        for path in facts[0].keys() - known.keys():
            known[path] = dict(nodes(other)).get(path, ABSENT)
    return facts


def _differing(facts: Sequence[Mapping[str, Any]], text: Callable[[Any], str]) -> list[tuple[str, ...]]:
    """Return a row for each fact that is not the same for all: its name, and the text of each value."""
    named = dict.fromkeys(name for known in facts for name in known)
    rows = [(name, *(text(known[name]) if name in known else "" for known in facts)) for name in named]
    return [row for row in rows if len(set(row[1:])) > 1]


def _metric_rows(runs: Sequence[StoredRun]) -> list[tuple[str, ...]]:
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.metrics):
        cells: list[str] = []
        for run in runs:
            summary = run.metrics.get(key)
            best = summary.best if summary else None
            cells += [
                "" if summary is None else format_number(summary.last),
                "" if best is None else format_number(best),
            ]
        rows.append((key, *cells))
    return rows


def draw(path: Path, labels: Sequence[str], points: Sequence[Mapping[str, Mapping[int, float]]]) -> bool:
    """Draw the metrics of runs over the updates, those that all of them have more than one point of, up to a dozen.

    Args:
        path: PNG file to write.
        labels: Names of the runs.
        points: The values of each metric by its key, by update, for each run.

    Returns:
        Whether there was something to draw, and matplotlib (a dependency of MLflow) is installed.
    """
    shared = [key for key in points[0] if all(len(known.get(key, ())) > 1 for known in points)][:_MOST_PLOTS]
    figure = curves(labels, points, shared)
    if figure is None:
        return False
    save_figure(figure, path)
    return True
