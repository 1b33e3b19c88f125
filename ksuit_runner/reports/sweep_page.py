"""A sweep as one page of HTML that needs no other file: ``report=SWEEP``."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from ksuit_runner.config.check.whole_config import resolve
from ksuit_runner.config.compose import NOT_STORED, compose_config
from ksuit_runner.config.overrides import bare_name
from ksuit_runner.paths import PathProvider, SweepPaths
from ksuit_runner.reports.curves import curves
from ksuit_runner.reports.facts import StoredRun
from ksuit_runner.reports.html import document, drawing, table
from ksuit_runner.reports.show import changes
from ksuit_runner.sweep.leaderboard import Leaderboard
from ksuit_runner.sweep.leaderboard_plot import leaderboard_figure, values_figure
from ksuit_runner.sweep.leaderboard_tables import group_table, job_table
from ksuit_runner.sweep.plan import SweepPlan
from ksuit_runner.ui.command_line import leaderboard_command, resume_command
from ksuit_runner.ui.formats import SHORT_ID, format_duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CURVES = 6  # jobs that are drawn
_MOST_METRICS = 9  # of these jobs


def sweep_page(paths: SweepPaths, plan: SweepPlan, board: Leaderboard) -> str:
    """Return the page of a sweep.

    It has its leaderboard with the means over seeds or folds, the objective over each swept key, all keys together as
    parallel coordinates, the curves of the best jobs (of the first ones, if there is no objective), what varies and
    what all jobs have in common.

    Args:
        paths: Files of the sweep.
        plan: Its plan.
        board: Its leaderboard as it stands.
    """
    run, counts = _run(paths, paths.sweep_id), Counter(row.status for row in board.rows)
    about = {
        "id": paths.sweep_id,
        "tags": run.tags,
        "notes": run.notes,
        "status": run.status.lower(),
        "started": f"{datetime.fromtimestamp(plan.created):%Y-%m-%d %H:%M:%S}",
        "took": "" if run.took is None else format_duration(run.took.total_seconds()),
        "command": plan.command,
        "jobs": ", ".join(f"{count} {status}" for status, count in counts.items()),
        "objective": f"{board.objective}, {board.direction} is better"
        if board.objective
        else "none, jobs in their order",
        "folder": str(paths.sweep_dir),
    }
    today = resolve(compose_config([]))
    common = changes({key: value for key, value in today.items() if key not in NOT_STORED}, plan.base)
    varied = {bare_name(key) for key in board.keys}
    where = paths.sweep_id, paths.output_dir
    first = "best" if board.objective else "first"
    sections = {
        "Sweep": table((), [(key, value) for key, value in about.items() if value]),
        "Leaderboard": table(*job_table(board, SHORT_ID)),
        f"Mean over {' and '.join(board.mean_over)}": table(*group_table(board)) if board.groups else "",
        "Objective over what varies": drawing(values_figure(board), "objective over each swept key"),
        "All together": drawing(leaderboard_figure(board), "leaderboard") if len(board.keys) > 1 else "",
        f"Curves of the {first} jobs": drawing(_curves(paths, board), f"curves of the {first} jobs"),
        "What varies": table(("", "values"), [(key, str(value)) for key, value in plan.settings.params.items()]),
        "Config of all jobs": table(
            ("differs from the default config", "default", "this sweep"),
            [(path, *cells) for path, cells in common.items() if path not in varied],
        ),
        "Commands": table((), [("resume", resume_command(*where)), ("leaderboard", leaderboard_command(*where))]),
    }
    return document(plan.name, sections)


def _run(paths: SweepPaths, run_id: str) -> StoredRun:
    return StoredRun(PathProvider(paths.output_dir, run_id))


def _curves(paths: SweepPaths, board: Leaderboard) -> "Figure | None":
    """Draw the metrics that the best jobs have in common, the objective first; of runs whose files are here."""
    best = [(f"job {row.index + 1}", _run(paths, row.run_id)) for row in board.rows if row.run_id]
    drawn = [(label, run) for label, run in best if run.paths.journal.is_file()][:_MOST_CURVES]
    if not drawn:
        return None
    labels, runs = zip(*drawn, strict=True)
    return curves(labels, [run.points for run in runs], _keys(runs, board.objective))


def _keys(runs: Sequence[StoredRun], objective: str | None) -> list[str]:
    shared = [
        key
        for key, metric in runs[0].metrics.items()
        if metric.direction != "neutral" and all(len(run.points.get(key, ())) > 1 for run in runs)
    ]
    return sorted(shared, key=lambda key: key != objective)[:_MOST_METRICS]
