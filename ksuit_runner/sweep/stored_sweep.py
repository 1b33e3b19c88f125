"""Find a stored sweep by its id, a prefix of it, or its name."""

from collections.abc import Sequence
from contextlib import suppress

from ksuit_runner.config.compose import compose_locations, output_dir_of
from ksuit_runner.errors import ResumeError, did_you_mean
from ksuit_runner.paths import OutputPaths, SweepPaths, is_run_id
from ksuit_runner.record.stored_run import entries, find_local, tags_of_runs
from ksuit_runner.sweep.job_runs import JOB_TAG
from ksuit_runner.sweep.plan import SweepPlan, read_plan

_SHORTEST_PREFIX = 6


def find_sweep(query: str, overrides: Sequence[str], is_surely: bool = False) -> SweepPaths | None:
    """Return the files of the sweep that a query matches, or None; ``last`` always means a run.

    A sweep that is not in the output folder is fetched from the tracking server, if the config names one.

    Args:
        query: Its id, the first 6 or more characters of it, or its name.
        overrides: Overrides of the command line; only output folder and tracker matter.
        is_surely: Whether only a sweep can be meant, and not a run of the same name.

    Raises:
        ResumeError: Several sweeps match, or a run has the name, too, or the one of the tracking server cannot be
            resumed here.
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
        raise ResumeError(f"'{query}' matches {len(found)} sweeps; give an id. The newest is {newest}")
    if found:
        paths = known[found.pop()]
        if not is_surely and not by_prefix:
            _refuse_run_of_name(query, paths)
        return paths
    if find_local(outputs, query) is not None or not (config := compose_locations(overrides)).tracker.get("uri"):
        return None
    from ksuit_runner.config.factory import Factory
    from ksuit_runner.recorder.tracker import open_tracker
    from ksuit_runner.sweep.fetch_sweep import fetch_plan

    return fetch_plan(open_tracker(Factory(config), outputs), outputs, query)


def _refuse_run_of_name(name: str, sweep: SweepPaths) -> None:
    """Refuse the name of a sweep that is also that of a run, unless the run is a job of a sweep: these have its name.

    Raises:
        ResumeError: There is such a run.
    """
    named = [entry.run_id for entry in entries(sweep) if entry.name == name]
    tags = tags_of_runs(sweep) if named else {}
    runs = [run_id for run_id in named if JOB_TAG not in tags[run_id]]
    if runs:
        raise ResumeError(
            f"'{name}' is the name of a sweep and of a run; give an id. "
            f"The sweep is {sweep.sweep_id}, the newest such run {runs[-1]}"
        )


def newest_sweep(overrides: Sequence[str]) -> SweepPaths:
    """Return the files of the sweep in the output folder that was planned last.

    Raises:
        ResumeError: There is none.
    """
    outputs = OutputPaths(output_dir_of(overrides))
    known = _sweeps(outputs)
    plans = _readable(known)
    if not plans:
        raise ResumeError(f"there is no sweep in {outputs.output_dir}")
    return known[max(plans, key=lambda id_: plans[id_].created)]


def unknown_sweep(query: str, overrides: Sequence[str]) -> ResumeError:
    """Return the error for a sweep that does not exist, with the nearest one that does."""
    config = compose_locations(overrides)
    known = _sweeps(OutputPaths(config.output_dir))
    names = {plan.name for plan in _readable(known).values()} | known.keys() | ({"last"} if known else set())
    return ResumeError(f"there is no sweep '{query}' in {config.output_dir}. {did_you_mean(query, names)}")


def _readable(known: dict[str, SweepPaths]) -> dict[str, SweepPlan]:
    """Return the plans that can be read; a damaged one is an error only for those who ask for its sweep by id."""
    plans = {}
    for id_, paths in known.items():
        with suppress(ResumeError):
            plans[id_] = read_plan(paths)
    return plans


def _sweeps(outputs: OutputPaths) -> dict[str, SweepPaths]:
    folders = outputs.sweeps_dir.iterdir() if outputs.sweeps_dir.is_dir() else ()
    found = {path.name: SweepPaths(outputs.output_dir, path.name) for path in folders if is_run_id(path.name)}
    return {id_: paths for id_, paths in found.items() if paths.plan.is_file()}
