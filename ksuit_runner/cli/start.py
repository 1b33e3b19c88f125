"""Starts what the command line or Python code asks for: a new run, or a stored run or sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ksuit_runner.config.check.initialization import NODE, initialization_of
from ksuit_runner.config.check.known_keys import check_keys
from ksuit_runner.config.check.objects import ObjectChecker
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.comparable import named_choices
from ksuit_runner.config.compose import refuse_empty_mappings, show_debugging, without_sweep
from ksuit_runner.config.overrides import value_of
from ksuit_runner.distributed.environment import place
from ksuit_runner.engine.outcome import RunOutcome
from ksuit_runner.errors import ConfigError, files_explained
from ksuit_runner.paths import PathProvider, SweepPaths, is_run_id
from ksuit_runner.record.mode import Mode
from ksuit_runner.record.origin import Origin
from ksuit_runner.record.stored_run import Launch
from ksuit_runner.resume.changes import compose_stored
from ksuit_runner.resume.request import Request, locate
from ksuit_runner.resume.starting_point import with_starting_point
from ksuit_runner.security.masking import mask_text
from ksuit_runner.start.slurm_job import requeue_after
from ksuit_runner.start.start_run import Start, start_run
from ksuit_runner.sweep.stored_sweep import find_sweep
from ksuit_runner.ui.command_line import resume_command
from ksuit_runner.ui.terminal import make_console

if TYPE_CHECKING:
    from ksuit_runner.sweep.runner import SweepOutcome


def start_composed(config: DictConfig, command: str) -> RunOutcome:
    """Run the config that Hydra has just composed.

    Args:
        config: The whole config.
        command: What started it, to be stored with it.

    Raises:
        KsuitError: It could not be started.
    """
    hydra = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN:
        raise ConfigError("hydra.mode: a sweep is asked for by -m, or by sweep=NAME for a file in conf/sweep/")
    refuse_launcher(config, hydra.runtime.choices.get("launcher"))
    ObjectChecker().walk("launcher", OmegaConf.to_container(config.launcher, resolve=True))
    if config.sweep.params:
        raise ConfigError(
            "values that vary are those of a sweep, and this is a single run. To run the sweep, add -m; "
            "to run it once, without them, add sweep=null",
            path="sweep.params",
        )
    overrides: list[str] = OmegaConf.to_container(hydra.overrides.task)  # type: ignore[assignment]
    show_debugging(hydra.verbose)
    refuse_empty_mappings(config, overrides)
    check_keys(config, overrides)
    values = check_config(without_sweep(config))
    choices = named_choices(values, hydra.runtime.choices)
    return start_new(values, Launch(command, overrides, choices=choices))


def start_new(values: Mapping[str, Any], launch: Launch) -> RunOutcome:
    """Start a new run with a checked config; see ``start_composed``."""
    return _start(Start(with_starting_point(values), launch))


def _start(start: Start) -> RunOutcome:
    outcome = start_run(start)
    requeue_after(outcome.signal, start.config.get("requeue", True))
    return outcome


def refuse_launcher(config: DictConfig, name: str | None) -> None:
    """Refuse a launcher for a run that is not a sweep.

    Args:
        config: The whole config.
        name: What the launcher is called on the command line.

    Raises:
        ConfigError: It would not run in this process.
    """
    target = OmegaConf.select(config, "launcher._target_")
    if target not in (None, "ksuit_runner.launchers.in_process.InProcessLauncher"):
        raise ConfigError(
            f"{name} is for the runs of a sweep, and this is a single one. "
            f"To launch it that way: -m launcher={name}; to run it here: launcher=in_process",
            path="launcher",
        )


def start_stored(request: Request, overrides: Sequence[str], command: str) -> RunOutcome | SweepOutcome:
    """Resume, fork or evaluate a stored run; resume a sweep.

    Raises:
        KsuitError: It could not be started; nothing is changed then.
    """
    with files_explained():
        if (sweep := _sweep(request, overrides)) is not None:
            from ksuit_runner.sweep.commands import resume_sweep

            resumed = resume_sweep(sweep, overrides)
            requeue_after(resumed.signal, value_of("requeue", overrides) != "false")
            return resumed
    start = _stored_start(request, overrides, command)
    _say_if_job(request, start)
    return _start(start)


def _say_if_job(request: Request, start: Start) -> None:
    """Say that the last run, which is resumed, is only a job of a sweep: after a kill the sweep may be meant."""
    sweep_id, here = start.config.get("parent_run_id"), place()
    if request != Request(Mode.RESUME, "last") or not is_run_id(str(sweep_id)) or (here is not None and here.rank > 0):
        return
    sweep = SweepPaths(start.config["output_dir"], str(sweep_id))
    if sweep.plan.is_file():
        text = (
            f"the last run is a job of a sweep. To resume the sweep: {resume_command(sweep.sweep_id, sweep.output_dir)}"
        )
        make_console().print(text, soft_wrap=True, markup=False)


def print_stored(request: Request, overrides: Sequence[str]) -> int:
    """Print the config with which a stored run would be resumed, forked or evaluated, and return 0.

    Raises:
        KsuitError: It could not be started like this.
    """
    with files_explained():
        if _sweep(request, overrides) is not None:
            raise ConfigError(f"{request}: this is a sweep, each of whose jobs has a config of its own")
    values = _stored_start(request, overrides, "").config
    print(mask_text(OmegaConf.to_yaml(OmegaConf.create(dict(values)))), end="")
    return 0


def _sweep(request: Request, overrides: Sequence[str]) -> SweepPaths | None:
    return find_sweep(request.query, overrides) if request.mode == Mode.RESUME else None


def _stored_start(request: Request, overrides: Sequence[str], command: str) -> Start:
    mode = request.mode
    with files_explained():
        found = locate(request, overrides)
        stored = compose_stored(mode, PathProvider(found.outputs.output_dir, found.run_id), overrides)
    config = stored.config
    config.output_dir = str(found.outputs.output_dir)
    if mode == Mode.FORK:
        config.name, config.parent_run_id = config.name if "name" in stored.changes else None, None
    if mode == Mode.EVALUATE:
        config.objective = None  # ranks trained runs; what evaluates may log something else
    values: Mapping[str, Any] = check_config(config, trust=stored.trust, is_stored=True)
    if mode != Mode.RESUME:
        _refuse_initialization(request, stored.changes, values)
    if "initialize.from" in stored.changes:
        values = with_starting_point(values)
    choices = named_choices(values, stored.chosen)
    launch = Launch(command, stored.overrides, mode, found.run_id, choices=choices)
    origin = Origin(mode, found.run_id, tuple(stored.changes), found.checkpoint)
    return Start(values, launch, origin, stored.trust)


def _refuse_initialization(request: Request, changes: Sequence[str], values: Mapping[str, Any]) -> None:
    """Refuse other weights for a run that takes all of them from a checkpoint; the same ones may lie elsewhere."""
    settings = initialization_of(values)
    is_elsewhere = settings is not None and settings.checksum is not None
    changed = [path for path in changes if path.split(".")[0] == NODE and not (is_elsewhere and path == f"{NODE}.from")]
    if changed:
        raise ConfigError(f"{request} takes all weights from the checkpoint; this is for a new run", path=changed[0])
