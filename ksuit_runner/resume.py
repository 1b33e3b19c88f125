"""From a run id to a config: the stored one with the changes that are allowed, before torch is imported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from ksuit_runner.check.config import resolve
from ksuit_runner.command_line import program
from ksuit_runner.compose import SWEEP_NODES, compose_places, output_dir_of, without_sweep
from ksuit_runner.config_changes import REMOVED, differences
from ksuit_runner.counter import Progress
from ksuit_runner.errors import ConfigError, ResumeError
from ksuit_runner.masking import mask_value
from ksuit_runner.override_text import bare_name, root, shell_word, value_of
from ksuit_runner.paths import OutputPaths, PathProvider
from ksuit_runner.recompose import with_overrides
from ksuit_runner.reveal import reveal
from ksuit_runner.stored_run import find_local, read_config_and_text, read_launch, unknown_run
from ksuit_runner.targets import Trust
from ksuit_runner.trust import trust_in

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
    *("leaderboard", "register_anew"),
)


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
        others = ("optimizer", "schedule", "loss", "trainer.parameter_rules")
        return not any(place.startswith(others) for place in self.changes)

    @property
    def has_other_model(self) -> bool:
        """Whether the model was given other settings."""
        return any(place.split(".")[0] == "model" for place in self.changes)

    @property
    def has_other_loss(self) -> bool:
        """Whether the loss was given other settings, such as class weights, which are part of its state."""
        return any(place.split(".")[0] == "loss" for place in self.changes)

    @property
    def has_new_end(self) -> bool:
        """Whether the run was given another length."""
        return any(
            place in ("trainer.max_epochs", "trainer.max_updates", "trainer.max_samples") for place in self.changes
        )

    def changes_all(self, callbacks: Sequence[str]) -> bool:
        """Whether each of some callbacks was given other settings, or removed: those that have ended a run early."""
        sections = [place for place in self.changes if place.partition(".")[0] in ("callbacks", "default_callbacks")]
        changed = [place.split(".")[1:2] for place in sections]  # one whose section is emptied has no name there
        return bool(callbacks) and all([name] in changed or [] in changed for name in callbacks)


@dataclass(frozen=True)
class Request:
    """What a command line asks for: ``MODE=RUN`` or ``MODE=RUN@CHECKPOINT``."""

    mode: Mode
    query: str
    checkpoint: str | None = None

    def __str__(self) -> str:
        return f"{self.mode}={self.query}" + (f"@{self.checkpoint}" if self.checkpoint else "")


def requested(overrides: Sequence[str]) -> Request | None:
    """Return which stored run the command line asks for, and for what.

    Raises:
        ConfigError: It asks for several, or for a resume from the middle of a run.
    """
    found = [(mode, query) for mode in MODES if (query := value_of(mode, overrides)) is not None]
    if len(found) > 1:
        raise ConfigError(f"{found[0][0]} and {found[1][0]} cannot be given together")
    if not found:
        return None
    (mode, text), (query, _, checkpoint) = found[0], found[0][1].rpartition("@")
    if not query or Progress.parse(checkpoint) is None:  # a name may have an @, too
        return Request(mode, text)
    if mode == "resume":
        raise ConfigError(f"resume={text}: a run goes on from its newest checkpoint; from another one: fork={text}")
    return Request(mode, query, checkpoint)


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
        from ksuit_runner.tracker.build import build_tracker

        run_id = fetch(build_tracker(Factory(config), paths), paths, query)
    if run_id is None and "@" in query and request.mode != "resume":
        raise ConfigError(f"{request}: after the @ of a run a checkpoint is needed, such as E2_U90_S2880")
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
        trust: Limits of the config, None if this user has made it on this machine.
    """

    config: DictConfig
    changes: list[str]
    overrides: list[str]
    trust: Trust | None


def compose_stored(mode: Mode, paths: PathProvider, overrides: Sequence[str]) -> Composed:
    """Return the config of a stored run with the given overrides applied.

    Raises:
        ResumeError: With ``resume``, a change would rewrite the run's past.
        ConfigError: An override names nothing that exists.
    """
    stored, text = read_config_and_text(paths)
    stored = without_sweep(stored)
    extra = [item for item in overrides if bare_name(item) not in (*MODES, "trust")]
    refuse_sweep_settings(extra)
    before = resolve(stored)
    config = OmegaConf.create(resolve(with_overrides(stored, extra)))
    changes = dict(differences(before, resolve(config)))
    if mode == "resume":
        _refuse_rewriting(changes, before, paths.run_id, extra)
    trust = trust_in(paths.signature, [text], paths, config.get("tracker") or {}, overrides, changes)
    values = resolve(config)
    if (revealed := reveal(values, overrides)) is not values:
        config = OmegaConf.create(dict(revealed))
    return Composed(config, list(changes), [*read_launch(paths).overrides, *extra], trust)


def refuse_sweep_settings(overrides: Sequence[str]) -> None:
    """Refuse what says how the runs of a sweep are made and launched, for a command that is about one run.

    Raises:
        ConfigError: There is such a setting.
    """
    for item in overrides:
        if root(item) in SWEEP_NODES and item not in ("sweep=null", "launcher=in_process"):
            one = f" A single run that is launched so: -m {item}" if bare_name(item) == "launcher" else ""
            raise ConfigError(
                f"{item}: this is about the runs of a sweep, and there is none. A sweep: -m, or sweep=NAME.{one}"
            )


def _refuse_rewriting(changes: Mapping[str, Any], before: Mapping[str, Any], run_id: str, extra: Sequence[str]) -> None:
    # A password that is said again is no change.
    new = [place for place, value in changes.items() if mask_value(place, value) != _value_at(before, place)]
    refused = [place for place in new if not any(fnmatchcase(place, pattern) for pattern in MAY_CHANGE)]
    if not refused:
        return
    lines = [f"  {place}: {_short(_value_at(before, place))} -> {_short(changes[place])}" for place in refused]
    if len(lines) > _LISTED:
        lines = [*lines[: _LISTED - 1], f"  and {len(lines) - _LISTED + 1} more"]
    fork = " ".join([program(), *(shell_word(item) for item in (f"fork={run_id}", *extra))])
    raise ResumeError("\n".join([f"this would rewrite the past of run {run_id[:8]}:", *lines, f"As a new run: {fork}"]))


_LISTED = 4


def _value_at(config: Mapping[str, Any], place: str) -> Any:
    value: Any = config
    for key in place.split("."):
        value = value.get(key, REMOVED) if isinstance(value, Mapping) else REMOVED
    return value


def _short(value: Any) -> str:
    text = "none" if value is REMOVED else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
