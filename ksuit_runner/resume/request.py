"""Reads which stored run a command line asks for, and finds it, before torch is imported."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ksuit_runner.config.compose import SWEEP_NODES, compose_locations, output_dir_of
from ksuit_runner.config.overrides import bare_name, root, value_of
from ksuit_runner.errors import ConfigError, ResumeError
from ksuit_runner.paths import OutputPaths, SweepPaths
from ksuit_runner.record.mode import OF_STORED_RUNS, Mode
from ksuit_runner.resume.reference import Reference, find_run
from ksuit_runner.ui.formats import SHORT_ID

_NO_SWEEP = ("sweep=null", "sweep.params=null", "sweep.params={}")


@dataclass(frozen=True)
class Request:
    """What a command line asks for: ``MODE=RUN``, or ``MODE=REFERENCE`` to a checkpoint."""

    mode: Mode
    query: str

    def __str__(self) -> str:
        return f"{self.mode}={self.query}"


@dataclass(frozen=True)
class Located:
    """The stored run that was asked for.

    Attributes:
        outputs: The output folder.
        run_id: Its id.
        checkpoint: Name of the checkpoint; None for the newest intact one.
    """

    outputs: OutputPaths
    run_id: str
    checkpoint: str | None = None


def requested(overrides: Sequence[str]) -> Request | None:
    """Return which stored run the command line asks for, and in which mode.

    Raises:
        ConfigError: It asks for several.
    """
    found = [(mode, query) for mode in OF_STORED_RUNS if (query := value_of(mode, overrides)) is not None]
    if len(found) > 1:
        raise ConfigError(f"{found[0][0]} and {found[1][0]} cannot be given together")
    return Request(*found[0]) if found else None


def locate(request: Request, overrides: Sequence[str]) -> Located:
    """Find the requested run and checkpoint; creates nothing, unless the run is fetched from a tracker.

    Raises:
        ResumeError: There is no such run, or several match.
        ConfigError: It has no such checkpoint, or a resume names one.
    """
    found = find_stored(request.mode, request.query, overrides)
    if request.mode == Mode.RESUME:
        if found.rest:
            raise ConfigError(
                f"{request}: a run is resumed from its newest checkpoint; from another one: fork={request.query}"
            )
        return Located(found.outputs, found.run_id)
    checkpoint, weights = found.checkpoint_and_weights()
    if weights is not None:
        instead = f"a new run that begins with them: initialize.from={request.query}"
        raise ConfigError(f"{request}: it takes a whole checkpoint, and not the weights '{weights}'; {instead}")
    return Located(found.outputs, found.run_id, checkpoint)


def find_stored(key: str, query: str, overrides: Sequence[str]) -> Reference:
    """Find a stored run, here or at its tracker.

    Args:
        key: What asks for it, for messages.
        query: The reference.
        overrides: Say where runs are.

    Raises:
        ResumeError: There is no such run, or several match; or its config is not stored.
    """
    outputs = OutputPaths(output_dir_of(overrides))
    found = find_run(key, query, outputs, partial(_fetch, outputs, overrides))
    if SweepPaths(outputs.output_dir, found.run_id).plan.is_file():
        which = f"leaderboard={found.run_id[:SHORT_ID]} lists them"
        raise ResumeError(f"{found}: this is a sweep, and {key}= takes one of its runs: {which}")
    if not found.paths.config.is_file() or not found.paths.launch.is_file():
        raise ResumeError(f"{found}: run {found.run_id} has no stored config in {found.paths.run_dir}")
    return found


def _fetch(outputs: OutputPaths, overrides: Sequence[str], query: str) -> str | None:
    from ksuit_runner.config.factory import Factory
    from ksuit_runner.resume.fetch_run import fetch_by

    return fetch_by(Factory(compose_locations(overrides)), outputs, query)


def as_single(overrides: Sequence[str]) -> list[str]:
    """Return overrides in which ``sweep=null`` also removes what an experiment varies, and not only a choice."""
    return ["sweep.params=null" if item == "sweep=null" else item for item in overrides]


def refuse_sweep_settings(overrides: Sequence[str]) -> None:
    """Refuse settings of sweeps and launchers for a command that is about one run.

    Raises:
        ConfigError: There is such a setting.
    """
    for item in overrides:
        if root(item) in SWEEP_NODES and item not in (*_NO_SWEEP, "launcher=in_process"):
            one = f" A single run that is launched so: -m {item}" if bare_name(item) == "launcher" else ""
            raise ConfigError(
                f"{item}: this is about the runs of a sweep, and there is none. A sweep: -m, or sweep=NAME.{one}"
            )
