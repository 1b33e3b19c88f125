"""From a run id to a config: the stored one with the changes that are allowed, before torch is imported."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from shlex import quote
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf, open_dict

from ksuit_runner.check.config import resolve
from ksuit_runner.compose import compose_config, compose_places, groups, output_dir_of, with_values
from ksuit_runner.counter import Progress
from ksuit_runner.errors import ConfigError, ResumeError
from ksuit_runner.override_text import bare_name, root
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.stored_run import find_local, read_config, read_launch, unknown_run
from ksuit_runner.terminal import program

Mode = Literal["resume", "fork", "evaluate"]
MODES: tuple[Mode, ...] = ("resume", "fork", "evaluate")

# What may change while a run stays the same run: its length, what is watched and recorded, and how data is fetched.
MAY_CHANGE = (
    "trainer.max_*",
    "trainer.nan_loss",
    "callbacks*",
    "default_callbacks*",
    "checkpoint*",
    *("tracker.uri", "tracker.experiment", "tracker.timeout_s", "tracker.require", "tracker.close_timeout_s"),
    "tracker.artifact_root",
    *("data.num_workers", "data.prefetch", "data.eval_batch_size"),
    "metric_property_provider*",
    *("output_dir", "name", "objective", "resume_strict", "resume", "fork", "evaluate", "parent_run_id"),
    *("sweep.*", "launcher*", "leaderboard"),
)
_NEVER_STORED = ("hydra", "sync", "list", *MODES, "parent_run_id", "resume_strict")


@dataclass(frozen=True)
class Origin:
    """The stored run that a run goes on from.

    Attributes:
        mode: ``resume`` goes on with it, ``fork`` begins a new one from its checkpoint, ``evaluate`` only looks.
        run_id: Its id.
        changes: Places of the config that differ from its own.
        checkpoint: Name of the checkpoint to go on from; None for the newest good one.
    """

    mode: Mode
    run_id: str
    changes: tuple[str, ...] = ()
    checkpoint: str | None = None

    @property
    def has_same_optimizer(self) -> bool:
        """Whether what was stored about learning rates and schedule still holds."""
        return not any(place.startswith(("optimizer", "schedule", "trainer.parameter_rules")) for place in self.changes)

    @property
    def has_new_end(self) -> bool:
        """Whether the run was given another length."""
        return any(place.startswith("trainer.max_") for place in self.changes)


@dataclass(frozen=True)
class Request:
    """What a command line asks for: ``MODE=RUN`` or ``MODE=RUN@CHECKPOINT``."""

    mode: Mode
    query: str
    checkpoint: str | None = None

    def __str__(self) -> str:
        return f"{self.mode}={self.query}" + (f"@{self.checkpoint}" if self.checkpoint else "")


def value_of(name: str, overrides: Sequence[str]) -> str | None:
    """Return the value that a key at the top of the config is given on the command line, None for none or null."""
    values = [item.partition("=")[2] for item in overrides if item.startswith(f"{name}=")]
    return values[-1] if values and values[-1] not in ("", "null") else None


def requested(overrides: Sequence[str]) -> Request | None:
    """Return which stored run the command line asks for, and for what.

    Raises:
        ConfigError: It asks for several, or for a resume from the middle of a run.
    """
    found = [(mode, item.partition("=")[2]) for item in overrides for mode in MODES if item.startswith(f"{mode}=")]
    found = [(mode, query) for mode, query in found if query not in ("", "null")]
    if len(found) > 1:
        raise ConfigError(f"{found[0][0]} and {found[1][0]} cannot be given together")
    if not found:
        return None
    (mode, text), (query, at, checkpoint) = found[0], found[0][1].partition("@")
    if at and mode == "resume":
        raise ConfigError(f"resume={text}: a run goes on from its newest checkpoint; from another one: fork={text}")
    if at and Progress.parse(checkpoint) is None:
        raise ConfigError(f"{mode}={text}: after the @ a checkpoint is needed, such as E2_U90_S2880")
    return Request(mode, query, checkpoint or None)


def locate(request: Request, overrides: Sequence[str]) -> tuple[OutputPaths, str]:
    """Find the run that a person means; nothing is created by looking.

    Raises:
        ResumeError: There is no such run, or several fit.
    """
    query = request.query
    paths = OutputPaths(output_dir_of(overrides))
    run_id = find_local(paths, query)
    if run_id is None and (config := compose_places(overrides)).tracker.get("uri"):
        from ksuit_runner.factory import Factory
        from ksuit_runner.fetch import fetch

        run_id = fetch(Factory(config).build_tracker(paths), paths, query)
    if run_id is None:
        raise unknown_run(paths, query, request.mode)
    run = PathProvider(paths.output_dir, run_id)
    if not run.config.is_file() or not run.launch.is_file():
        raise ResumeError(f"{request}: run {run_id} has no stored config in {run.run_dir}")
    return paths, run_id


@dataclass(frozen=True)
class Composed:
    """The config of a run that goes on from a stored one.

    Attributes:
        config: The stored config with the changes applied.
        changes: Places that changed.
        overrides: All overrides that make it, the stored ones and the new ones.
    """

    config: DictConfig
    changes: list[str]
    overrides: list[str]


def compose_stored(mode: Mode, paths: PathProvider, overrides: Sequence[str]) -> Composed:
    """Return the config of a stored run with the given overrides applied.

    The overrides mean what they would have meant when the run was started: both command lines are composed, and what
    differs between them is put into the stored config. What the YAML files say today about the rest does not count.

    Raises:
        ResumeError: With ``resume``, a change would rewrite the run's past.
        ConfigError: An override names nothing that exists.
    """
    stored = read_config(paths)
    before = [item for item in read_launch(paths).overrides if root(item) not in _NEVER_STORED]
    extra = [item for item in overrides if bare_name(item) not in MODES]
    if not extra:
        return Composed(stored, [], before)
    # A group that is chosen anew takes nothing over from what was said about the former choice.
    chosen = {bare_name(item) for item in extra} & set(groups())
    kept = [item for item in before if root(item) not in chosen]
    composed = compose_config(before)
    changed = with_values(composed, extra) if kept == before else None
    after, values = resolve(changed or compose_config([*kept, *extra])), resolve(stored)
    changes = dict(_differences(resolve(composed), after))
    for name in map(bare_name, extra):  # what is said explicitly counts even where the YAML files say so by now
        changes |= _differences(_at(values, name), _at(after, name))
    if mode == "resume":
        _refuse_rewriting(changes, values, paths.run_id, extra)
    with open_dict(stored):
        for place, value in changes.items():
            if value is _REMOVED:
                _remove(stored, place)
            else:
                OmegaConf.update(stored, place, value, merge=False, force_add=True)
    return Composed(stored, list(changes), [*kept, *extra])


def _refuse_rewriting(changes: Mapping[str, Any], before: Mapping[str, Any], run_id: str, extra: Sequence[str]) -> None:
    refused = [place for place in changes if not any(fnmatchcase(place, pattern) for pattern in MAY_CHANGE)]
    if not refused:
        return
    lines = [f"  {place}: {_short(_value_at(before, place))} -> {_short(changes[place])}" for place in refused]
    if len(lines) > _LISTED:
        lines = [*lines[: _LISTED - 1], f"  and {len(lines) - _LISTED + 1} more"]
    fork = " ".join([program(), *(quote(item) for item in (f"fork={run_id}", *extra))])
    raise ResumeError("\n".join([f"this would rewrite the past of run {run_id[:8]}:", *lines, f"As a new run: {fork}"]))


_REMOVED = object()
_LISTED = 4


def _value_at(config: Mapping[str, Any], place: str) -> Any:
    return next(iter(_at(config, place).values()), _REMOVED)


def _short(value: Any) -> str:
    text = "none" if value is _REMOVED else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the places where two configs differ with their new values, as deep as both are mappings."""
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, _REMOVED), new.get(key, _REMOVED)
        if isinstance(before, dict) and isinstance(after, dict) and before and after:
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", after


def _at(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the part of a config at a place, under its dotted name; empty if there is none."""
    value: Any = config
    for key in place.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return {}
        value = value[key]
    return {place: value}


def _remove(config: DictConfig, place: str) -> None:
    parent, _, key = place.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if isinstance(node, DictConfig) and key in node:
        del node[key]
