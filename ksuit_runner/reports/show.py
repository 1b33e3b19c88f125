"""One run on the terminal: ``show=RUN``."""

from collections.abc import Mapping, Sequence
from typing import Any

from ksuit_runner.config.check.ranks import with_parts_of
from ksuit_runner.config.check.whole_config import resolve
from ksuit_runner.config.compose import compose_config, without_sweep
from ksuit_runner.config.differences import ABSENT, differences
from ksuit_runner.config.overrides import allow_only, root, to_text
from ksuit_runner.errors import ConfigError, with_article
from ksuit_runner.paths import PathProvider
from ksuit_runner.reports.code import SHORT_COMMIT
from ksuit_runner.reports.facts import StoredRun
from ksuit_runner.resume.request import find_stored
from ksuit_runner.sweep.stored_sweep import find_sweep
from ksuit_runner.ui.command_line import evaluate_command, fork_command, resume_command
from ksuit_runner.ui.formats import format_duration, shortened
from ksuit_runner.ui.terminal import make_console, metric_table, print_blank, print_pairs, print_table

TAKES = ("output_dir", "tracker", "trust")
_LONGEST = 60
_LEAST = 12  # characters of a value in a narrow terminal
OF_A_RUN = ("name", "notes", "tags", "output_dir", "parent_run_id")
"""Keys of a config that say which run it is, and not what it does."""


def show(query: str, overrides: Sequence[str]) -> int:
    """Print what a run was, what it found, its checkpoints, and the commands that continue it; of a sweep its ranking.

    Args:
        query: The run, or the sweep.
        overrides: The command line; besides the run it may say where runs are.

    Returns:
        The exit status, 0.

    Raises:
        KsuitError: There is no such run, or what is stored of it is damaged.
    """
    allow_only(overrides, "show", *TAKES)
    if (sweep := find_sweep(query, overrides)) is not None:
        from ksuit_runner.sweep.commands import show_leaderboard

        told = StoredRun(PathProvider(sweep.output_dir, sweep.sweep_id))
        said = {"sweep": told.name, "id": sweep.sweep_id, "tags": told.tags, "notes": told.notes}
        console = make_console()
        print_pairs(console, {label: text for label, text in said.items() if text})
        print_blank(console)
        return show_leaderboard(sweep.sweep_id, [item for item in overrides if root(item) != "show"])
    found = find_stored("show", query, overrides)
    run, console = StoredRun(found.paths), make_console()
    print_pairs(console, head(run), run.status)
    print_blank(console)
    if rows := changes_of_defaults(run):
        heads = ("differs from the default config", "default", "this run")
        print_table(console, heads, rows, least={1: _LEAST, 2: _LEAST})
        print_blank(console)
    if run.metrics:
        console.print(metric_table(console, run.metrics))
        print_blank(console)
    if checkpoints := run.checkpoints:
        print_table(console, ("checkpoint", "tags"), [(name, " ".join(tags)) for name, tags in checkpoints.items()])
        print_blank(console)
    print_pairs(console, commands(run))
    return 0


def head(run: StoredRun) -> dict[str, str]:
    """Return what a run is, by labels."""
    commit, is_dirty = run.environment.get("git.commit"), run.environment.get("git.dirty")
    given = {
        "run": run.name,
        "id": run.paths.run_id,
        "tags": run.tags,
        "notes": run.notes,
        "status": run.status.lower(),
        "started": run.started and f"{run.started:%Y-%m-%d %H:%M:%S}",
        "took": run.took is not None and format_duration(run.took.total_seconds()),
        "command": run.launch.command,
        "origin": run.launch.origin and f"{run.launch.mode} of {run.launch.origin}",
        "commit": commit and f"{str(commit)[:SHORT_COMMIT]}{', with uncommitted changes' if is_dirty else ''}",
        "folder": str(run.paths.run_dir),
    }
    return {label: str(value) for label, value in given.items() if value}


def commands(run: StoredRun) -> dict[str, str]:
    """Return the commands that continue a run: without a checkpoint it can only be resumed."""
    where = run.paths.run_id, run.paths.output_dir
    found = {"resume": resume_command(*where)}
    if run.checkpoints:
        found |= {"fork": fork_command(*where), "evaluate": evaluate_command(*where)}
    return found


def changes_of_defaults(run: StoredRun) -> list[tuple[str, str, str]]:
    """Return config path, default and value of a run, for each value that is not the default of today."""
    today = with_parts_of(run.config.get("ranks", 1), resolve(without_sweep(compose_config([]))))
    return [(path, *cells) for path, cells in changes(today, run.config).items()]


def changes(old: Mapping[Any, Any], new: Mapping[Any, Any]) -> dict[str, tuple[str, str]]:
    """Return where two configs differ: the values in both as text, by config path; not what says which run it is."""
    found = differences(old, new)
    return {item.path: (cell(item.old), cell(item.new)) for item in found if item.path not in OF_A_RUN}


def cell(value: Any) -> str:
    """Return a value of a config as it is written in an override, cut to the width of a cell; empty for none."""
    if value is ABSENT:
        return ""
    if isinstance(value, Mapping) and "_target_" in value:
        return with_article(str(value["_target_"]).rpartition(".")[2])
    try:
        text = to_text(value)
    except ConfigError:  # a key that no override can have
        text = str(value)
    return shortened(text, _LONGEST)
