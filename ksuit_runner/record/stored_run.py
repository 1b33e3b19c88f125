"""Stored runs of an output folder: their configs, how they were started, and the index to find them by."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

from msgspec import Meta
from omegaconf import DictConfig

from ksuit_runner.config.groups import folders_around
from ksuit_runner.config.stored_config import format_config, parse_config
from ksuit_runner.errors import ResumeError, counted, suggest
from ksuit_runner.paths import OutputPaths, PathProvider, RunId, is_run_id
from ksuit_runner.record.mode import Mode
from ksuit_runner.security.authorship import sign
from ksuit_runner.security.masking import mask_config, mask_text
from ksuit_runner.system.atomic_files import append_line, make_folder, write_texts, write_unsynced
from ksuit_runner.system.untrusted_files import UnsafeFileError, check_folder, conform, parse_json, read_json, read_text

_SHORTEST_PREFIX = 6
_LONGEST_NAME = 250
_LATEST = 1e11  # seconds since 1970 that a date can have


@dataclass(frozen=True)
class Launch:
    """How a run was started.

    Attributes:
        command: The command line.
        overrides: All overrides that make its config, those of the run that it continues included.
        mode: Train, or fork for one that starts from another run's checkpoint; resume and evaluate, which continue the
            run itself, are never stored.
        origin: Id of that run.
        resumed_by: Commands that resumed it with other settings.
        tags: Additional tags of its record, such as which job of a sweep it is.
        choices: What was chosen of the groups by which runs are compared, such as ``model`` -> ``cnn``.
    """

    command: str
    overrides: list[str]
    mode: Mode = Mode.TRAIN
    origin: RunId | None = None
    resumed_by: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class IndexEntry:
    """A line of the index of an output folder.

    Attributes:
        run_id: Id of the run there.
        name: Its name.
        start_time: When it was started, in seconds since 1970.
        mode: How it was started.
        tracker_id: The tracker's id of it, if that differs.
        tags: The tags that it was launched with; None where the index does not know them.
    """

    run_id: str
    name: str
    start_time: Annotated[float, Meta(ge=0, lt=_LATEST)]  # also: not NaN
    mode: str = Mode.TRAIN
    tracker_id: str | None = None
    tags: dict[str, str] | None = None


def add_to_index(
    paths: OutputPaths,
    run_id: str,
    name: str,
    mode: str,
    start_time: float | None = None,
    tracker_id: str | None = None,
    tags: dict[str, str] | None = None,
) -> None:
    """Add a run to the index; several processes may do so at once.

    Args:
        paths: The output folder.
        run_id: Id of the run there.
        name: Its name.
        mode: How it was started.
        start_time: When, in seconds since 1970; by default now.
        tracker_id: Id that the tracker gave it, for a run that was registered later.
        tags: Tags that it is launched with.
    """
    entry = IndexEntry(run_id, name, time.time() if start_time is None else start_time, mode, tracker_id, tags)
    append_line(paths.index, json.dumps(asdict(entry)))


def store(
    paths: PathProvider,
    config: Mapping[str, Any],
    launch: Launch,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Store the resolved config of a run and how it was started, without passwords and tokens.

    Args:
        paths: Paths of the run.
        config: The config.
        launch: How it was started.
        shapes: The shapes that the model was built for, so that it can be built again without the data.
    """
    make_folder(paths.artifacts_dir)
    text = format_config(mask_config(config))
    sign(paths.signature, text)
    texts = {paths.config: text, paths.launch: json.dumps(_masked(launch), indent=2) + "\n"}
    if shapes is not None:
        texts[paths.shapes] = json.dumps(shapes) + "\n"
    write_texts(texts)


def _masked(launch: Launch) -> dict[str, Any]:
    shown = {"command": mask_text(launch.command), "overrides": list(map(mask_text, launch.overrides))}
    return asdict(launch) | shown | {"tags": {key: mask_text(value) for key, value in launch.tags.items()}}


def read_shapes(paths: PathProvider) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the model of a run was built for, by the names of its arguments; those that are stored.

    Raises:
        ResumeError: The file is damaged.
    """
    if not paths.shapes.is_file():
        return {}
    try:
        return conform(dict[str, tuple[int, ...]], read_json(paths.shapes, paths.runs_dir))
    except UnsafeFileError as error:
        raise ResumeError(f"{paths.shapes} {error}") from None


def store_length(paths: PathProvider, updates: int) -> None:
    """Store how many updates training takes, for those who watch the run: a power cut, which ends it, may lose that."""
    write_unsynced(paths.length, f"{updates}\n")


def read_length(paths: PathProvider) -> int | None:
    """Return how many updates the training of a run takes; None if that is not stored."""
    try:
        return conform(int, read_json(paths.length, paths.runs_dir))
    except UnsafeFileError:
        return None


def store_changes(paths: PathProvider, config: Mapping[str, Any], launch: Launch) -> None:
    """Store the changed config of a resumed run, so that the next resume need not repeat the changes.

    Args:
        paths: Paths of the run.
        config: Its config with the changes; permissions that were given for one resume are not stored.
        launch: How it was resumed.
    """
    before = read_launch(paths)
    resumed_by = [*before.resumed_by, launch.command]
    kept = {**config, "resume_strict": read_config(paths).get("resume_strict", True), "register_anew": False}
    store(paths, kept, replace(before, overrides=launch.overrides, resumed_by=resumed_by))


def read_config(paths: PathProvider) -> DictConfig:
    """Return the stored config of a run; see ``read_config_and_text``."""
    return read_config_and_text(paths)[0]


def read_config_and_text(paths: PathProvider) -> tuple[DictConfig, str]:
    """Return the stored config of a run, and the text that it was read from, which is what is signed.

    Raises:
        ResumeError: It is damaged, or nothing that the runner would have stored.
    """
    try:
        text = read_text(paths.config, paths.runs_dir)
        return parse_config(text), text
    except UnsafeFileError as error:
        raise ResumeError(f"{paths.config} {error}") from None


def read_launch(paths: PathProvider) -> Launch:
    """Return how a run was started.

    Raises:
        ResumeError: It is damaged, or nothing that the runner would have stored.
    """
    try:
        launch = conform(Launch, read_json(paths.launch, paths.runs_dir))
        if launch.mode not in (Mode.TRAIN, Mode.FORK):
            raise UnsafeFileError(f"has an invalid 'mode': {launch.mode.value!r}")
    except UnsafeFileError as error:
        raise ResumeError(f"{paths.launch} {error}") from None
    return launch


def find_local(paths: OutputPaths, query: str) -> str | None:
    """Return the id of the run in the output folder that a query names, or None; creates nothing.

    Args:
        paths: The output folder.
        query: A run's id (also the tracker's), the first 6 or more characters of it, its name, or ``last``.

    Raises:
        ResumeError: Several runs match, the query cannot be the name of a run, or its folder has links.
    """
    if len(query) > _LONGEST_NAME or not query.isprintable():
        raise ResumeError(f"{query[:50]!r} is not a run's id or name")
    found = _find(paths, query)
    if found is not None:
        check_folder(PathProvider(paths.output_dir, found).run_dir)
    return found


def _find(paths: OutputPaths, query: str) -> str | None:
    if is_run_id(query) and (paths.runs_dir / query).is_dir():
        return query
    ids = set(_run_ids(paths))
    known = [entry for entry in _index(paths) if entry.run_id in ids]
    if query == "last":
        trained = [entry for entry in known if _is_trained(paths, entry)]
        return max(trained, key=lambda entry: entry.start_time).run_id if trained else None
    found = {entry.run_id for entry in known if entry.name == query}
    if len(query) >= _SHORTEST_PREFIX:
        found |= {run_id for run_id in ids if run_id.startswith(query)}
        found |= {entry.run_id for entry in known if (entry.tracker_id or "").startswith(query)}
    if len(found) > 1:
        listed = ", ".join(sorted(found)[:4]) + (" …" if len(found) > 4 else "")
        raise ResumeError(f"'{query}' matches {len(found)} runs: {listed}\nGive an id, or more characters of it")
    return found.pop() if found else None


def entries(paths: OutputPaths) -> list[IndexEntry]:
    """Return the runs of an output folder that are still there, in the order in which they were started."""
    ids = set(_run_ids(paths))
    return [entry for entry in _index(paths) if entry.run_id in ids]


def tags_of_runs(paths: OutputPaths) -> dict[str, dict[str, str]]:
    """Return the tags that all runs of an output folder were launched with, by their ids, the oldest entry first.

    Those that are not in the index are read from the run's folder; a damaged one counts as none.
    """
    found: dict[str, dict[str, str] | None] = {}
    for entry in entries(paths):
        found[entry.run_id] = entry.tags if entry.tags is not None else found.get(entry.run_id)
    found |= {run_id: None for run_id in _run_ids(paths) if run_id not in found}
    return {run_id: _launch_tags(paths, run_id) if tags is None else tags for run_id, tags in found.items()}


def _launch_tags(paths: OutputPaths, run_id: str) -> dict[str, str]:
    run = PathProvider(paths.output_dir, run_id)
    try:
        return read_launch(run).tags if run.launch.is_file() else {}
    except ResumeError:
        return {}


def _is_trained(paths: OutputPaths, entry: IndexEntry) -> bool:
    """Whether a run can be resumed: a fork that was killed before its first checkpoint cannot."""
    return entry.mode != Mode.FORK or PathProvider(paths.output_dir, entry.run_id).latest.exists()


def unknown_run(paths: OutputPaths, query: str, flag: str) -> ResumeError:
    """Return the error for a run that does not exist, with the nearest name."""
    names = {entry.name for entry in _index(paths)} | set(_run_ids(paths))
    if query == "last" or not names:
        return ResumeError(f"{flag}={query}: {no_run_in(paths)}")
    where = os.path.relpath(paths.output_dir) if paths.output_dir.is_relative_to(Path.cwd()) else paths.output_dir
    if near := suggest(query, names | {"last"}):
        hint = f"Did you mean '{near}'?"
    else:
        short = " (an id needs at least 6 characters)" if len(query) < _SHORTEST_PREFIX else ""
        count = len(set(_run_ids(paths)))
        hint = f"{counted(count, 'run')} exist{'s' if count == 1 else ''}{short}; 'last' is the newest"
    return ResumeError(f"{flag}={query}: there is no such run in {where}. {hint}")


def no_run_in(paths: OutputPaths) -> str:
    """Say that an output folder has no run, and in which folder the command may have been meant to run."""
    here, text = Path.cwd(), f"there is no run in {paths.output_dir}"
    if not paths.output_dir.is_relative_to(here):
        return text
    for around in folders_around():
        outputs = OutputPaths(around / paths.output_dir.relative_to(here))
        if os.path.isfile(outputs.index):  # False, too, where one may not look
            return f"{text}. {outputs.output_dir} has some: cd {quote(str(around))}"
    return text


def _run_ids(paths: OutputPaths) -> Iterator[str]:
    if paths.runs_dir.is_dir():
        with os.scandir(paths.runs_dir) as found:
            yield from (entry.name for entry in found if is_run_id(entry.name) and entry.is_dir(follow_symlinks=False))


def _index(paths: OutputPaths) -> Iterator[IndexEntry]:
    if paths.index.is_file():
        for line in paths.index.read_bytes().splitlines():
            with suppress(UnsafeFileError, UnicodeDecodeError):  # a line that a crash has torn
                yield conform(IndexEntry, parse_json(line.decode()))
