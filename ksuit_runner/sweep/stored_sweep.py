"""From what a person types to a sweep of the output folder."""

from collections.abc import Sequence
from contextlib import suppress

from ksuit_runner.config.compose import compose_locations, output_dir_of
from ksuit_runner.errors import ResumeError, did_you_mean
from ksuit_runner.paths import OutputPaths, SweepPaths, is_run_id
from ksuit_runner.record.stored_run import find_local
from ksuit_runner.sweep.plan import SweepPlan, read_plan

_SHORTEST_PREFIX = 6


def find_sweep(query: str, overrides: Sequence[str]) -> SweepPaths | None:
    """Return the files of the sweep that a person means, or None if no sweep fits; ``last`` is always a run.

    One that is not in the output folder is looked for, and brought, from the tracking server, if one is named.

    Args:
        query: Its id, the first 6 or more characters of it, or its name.
        overrides: Overrides of the command line; of them, only where runs are counts.

    Raises:
        ResumeError: Several sweeps fit, or the tracking server has one that cannot go on here.
    """
    if query == "last":
        return None
    outputs = OutputPaths(output_dir_of(overrides))
    known = _sweeps(outputs)
    if query in known:
        return known[query]
    by_prefix = {id_ for id_ in known if len(query) >= _SHORTEST_PREFIX and id_.startswith(query)}
    plans = _readable(known)
    found = by_prefix | {id_ for id_, plan in plans.items() if plan.name == query}
    if len(found) > 1:
        newest = max(found & plans.keys(), key=lambda id_: plans[id_].created, default=min(found))
        raise ResumeError(f"'{query}' fits {len(found)} sweeps; give an id. The newest is {newest}")
    if found:
        return known[found.pop()]
    if find_local(outputs, query) is not None or not (config := compose_locations(overrides)).tracker.get("uri"):
        return None
    from ksuit_runner.config.factory import Factory
    from ksuit_runner.sweep.fetch_sweep import fetch_plan
    from ksuit_runner.tracker.build import build_tracker

    return fetch_plan(build_tracker(Factory(config), outputs), outputs, query)


def unknown_sweep(query: str, overrides: Sequence[str]) -> ResumeError:
    """Return the error for a sweep that is not there, with the nearest one."""
    config = compose_locations(overrides)
    known = _sweeps(OutputPaths(config.output_dir))
    names = {plan.name for plan in _readable(known).values()} | known.keys()
    return ResumeError(f"there is no sweep '{query}' in {config.output_dir}. {did_you_mean(query, names)}")


def _readable(known: dict[str, SweepPaths]) -> dict[str, SweepPlan]:
    """Return the plans of sweeps; a damaged one is an error for those who ask for that sweep by its id only."""
    plans = {}
    for id_, paths in known.items():
        with suppress(ResumeError):
            plans[id_] = read_plan(paths)
    return plans


def _sweeps(outputs: OutputPaths) -> dict[str, SweepPaths]:
    folders = outputs.sweeps_dir.iterdir() if outputs.sweeps_dir.is_dir() else ()
    found = {path.name: SweepPaths(outputs.output_dir, path.name) for path in folders if is_run_id(path.name)}
    return {id_: paths for id_, paths in found.items() if paths.plan.is_file()}
