"""What a run leaves beside its checkpoints: how it was started, so that it can be found and composed again."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ksuit_runner.durable_files import write_text
from ksuit_runner.errors import ResumeError, suggest
from ksuit_runner.paths import OutputPaths, PathProvider

_SHORTEST_PREFIX = 6


@dataclass(frozen=True)
class Launch:
    """How a run was started.

    Attributes:
        command: The command line.
        overrides: All overrides that make its config, those of the run that it goes on from included.
        mode: ``train``; ``fork`` or ``evaluate`` for one that goes on from another run's checkpoint; ``resume`` for
            one that goes on itself, which is never stored.
        origin: Id of that run.
        resumed_by: Commands that resumed it with other settings.
        tags: Tags of its record besides the usual ones, such as which job of a sweep it is.
    """

    command: str
    overrides: list[str]
    mode: str = "train"
    origin: str | None = None
    resumed_by: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class IndexEntry:
    """A line of the index of an output folder."""

    run_id: str
    name: str
    start_time: float
    mode: str = "train"


def add_to_index(paths: OutputPaths, run_id: str, name: str, mode: str) -> None:
    """Add a run to the index, one line in a single write, so that runs that start at once do not mix theirs."""
    entry = IndexEntry(run_id, name, time.time(), mode)
    line = "\n" + json.dumps(asdict(entry)) + "\n"  # a line before it that a crash has torn takes no other with it
    descriptor = os.open(paths.index, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def store(paths: PathProvider, config: DictConfig, launch: Launch) -> None:
    """Store the resolved config of a run and how it was started."""
    paths.config.parent.mkdir(parents=True, exist_ok=True)
    write_text(paths.config, OmegaConf.to_yaml(config, resolve=True))
    write_text(paths.launch, json.dumps(asdict(launch), indent=2) + "\n")


def store_changes(paths: PathProvider, config: DictConfig, launch: Launch) -> None:
    """Store what a run goes on with from now on: a resume after this one needs no settings repeated.

    Args:
        paths: Paths of the run.
        config: Its config with the changes; what was allowed once is not allowed for ever.
        launch: How it was resumed.
    """
    before = read_launch(paths)
    resumed_by = [*before.resumed_by, launch.command]
    kept = OmegaConf.merge(config, {"resume_strict": read_config(paths).resume_strict})
    assert isinstance(kept, DictConfig)
    store(paths, kept, replace(before, overrides=launch.overrides, resumed_by=resumed_by))


def read_config(paths: PathProvider) -> DictConfig:
    """Return the stored config of a run."""
    config = OmegaConf.load(paths.config)
    assert isinstance(config, DictConfig)
    return config


def read_launch(paths: PathProvider) -> Launch:
    """Return how a run was started."""
    return Launch(**json.loads(paths.launch.read_text()))


def find_local(paths: OutputPaths, query: str) -> str | None:
    """Return the id of the run in the output folder that a person means, or None; nothing is created by looking.

    Args:
        paths: The output folder.
        query: A run's id, the first 6 or more characters of it, its name, or ``last``.

    Raises:
        ResumeError: Several runs fit.
    """
    ids = set(_run_ids(paths))
    entries = [entry for entry in _index(paths) if entry.run_id in ids]
    if query == "last":
        trained = [entry for entry in entries if _is_trained(paths, entry)]
        return max(trained, key=lambda entry: entry.start_time).run_id if trained else None
    if query in ids:
        return query
    found = {entry.run_id for entry in entries if entry.name == query}
    if len(query) >= _SHORTEST_PREFIX:
        found |= {run_id for run_id in ids if run_id.startswith(query)}
    if len(found) > 1:
        listed = ", ".join(sorted(found)[:4]) + (" …" if len(found) > 4 else "")
        raise ResumeError(f"'{query}' fits {len(found)} runs: {listed}\nGive more of the id")
    return found.pop() if found else None


def runs_since(paths: OutputPaths, time_s: float) -> dict[str, str]:
    """Return the names of all runs of an output folder that were started after a time, by their id.

    Args:
        paths: The output folder.
        time_s: In seconds since 1970.
    """
    ids = set(_run_ids(paths))
    return {entry.run_id: entry.name for entry in _index(paths) if entry.start_time >= time_s and entry.run_id in ids}


def _is_trained(paths: OutputPaths, entry: IndexEntry) -> bool:
    """Whether a run can go on: no evaluation can, and no fork that did not begin."""
    began = PathProvider(paths.output_dir, entry.run_id).latest.exists() if entry.mode == "fork" else True
    return began and entry.mode != "evaluate"


def unknown_run(paths: OutputPaths, query: str, flag: str) -> ResumeError:
    """Return the error for a run that is not there, with the nearest one."""
    names = {entry.name for entry in _index(paths)} | set(_run_ids(paths))
    where = os.path.relpath(paths.output_dir) if paths.output_dir.is_relative_to(Path.cwd()) else paths.output_dir
    if query == "last" or not names:
        return ResumeError(f"{flag}={query}: there is no run in {where}")
    hint = suggest(query, names)
    if not hint.startswith("Did"):
        short = " (of an id at least 6 characters are needed)" if len(query) < _SHORTEST_PREFIX else ""
        hint = f"{len(set(_run_ids(paths)))} runs are there{short}; 'last' is the newest"
    return ResumeError(f"{flag}={query}: there is no such run in {where}. {hint}")


def _run_ids(paths: OutputPaths) -> Iterator[str]:
    if paths.runs_dir.is_dir():
        yield from (path.name for path in paths.runs_dir.iterdir() if path.is_dir())


def _index(paths: OutputPaths) -> Iterator[IndexEntry]:
    if paths.index.is_file():
        for line in paths.index.read_text().splitlines():
            try:
                yield IndexEntry(**json.loads(line))
            except (ValueError, TypeError):  # a line that was torn by a crash
                continue
