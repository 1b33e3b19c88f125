"""The command line. Torch and MLflow are imported when a run really starts, and not before."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ksuit_runner.changed_config import compose_stored
from ksuit_runner.check.config import check_config
from ksuit_runner.command_line import command_line
from ksuit_runner.compose import (
    CONFIG_NAME,
    MISTAKES,
    explain,
    refuse_long_overrides,
    refuse_lost_overrides,
    register_search_path,
    shipped_conf,
    without_sweep,
)
from ksuit_runner.errors import ConfigError, KsuitError, files_explained
from ksuit_runner.lasting_output import secure_output
from ksuit_runner.origin import Origin
from ksuit_runner.override_text import value_of
from ksuit_runner.paths import PathProvider
from ksuit_runner.resume import Request, locate, refuse_sweep_settings, requested
from ksuit_runner.stored_run import Launch
from ksuit_runner.sweep.find import find_sweep
from ksuit_runner.terminal import make_console, print_error, print_traceback

if TYPE_CHECKING:
    from ksuit_runner.runner import Outcome


def main() -> None:
    """Run what the command line asks for and exit with its status."""
    secure_output()
    sys.excepthook = print_traceback
    if os.getcwd() not in sys.path:  # the project's own callbacks and models; `python -m` does so itself
        sys.path.insert(0, os.getcwd())
    try:
        status = _main(sys.argv[1:])
    except KsuitError as error:
        print_error(make_console(stderr=True), error)
        status = error.exit_status
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)


def _main(arguments: Sequence[str]) -> int:
    flags, overrides = _split(arguments)
    if {"--help", "-h"} & set(flags):
        from ksuit_runner.help import print_help

        return print_help(overrides)
    if to_sync := value_of("sync", overrides):
        from ksuit_runner.sync import sync

        with files_explained():
            return sync(to_sync, overrides)
    if to_list := value_of("list", overrides):
        from ksuit_runner.listing import list_runs

        with files_explained():
            return list_runs(to_list, overrides)
    if board := value_of("leaderboard", overrides):
        from ksuit_runner.sweep.command import show_leaderboard

        with files_explained():
            return show_leaderboard(board, overrides)
    request, choice = requested(overrides), value_of("sweep", overrides)
    multirun = [flag for flag in flags if flag in ("-m", "--multirun")]
    others = [flag for flag in flags if flag not in multirun]
    if request is not None and not {"--cfg", "-c"} & set(flags):
        if flags or choice:
            raise ConfigError(f"{request}: it cannot be given together with {(*flags, f'sweep={choice}')[0]}")
        return _go_on(request, overrides)
    if not others and (multirun or choice):
        from ksuit_runner.sweep.command import start_sweep

        with files_explained():
            return start_sweep(overrides, command_line())
    if not others:
        refuse_sweep_settings(overrides)
    sys.argv[1:] = [*others, *overrides]  # argparse wants flags before the overrides, a person writes them anywhere
    return _run_composed(overrides)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags of Hydra, with what belongs to them, and the overrides.

    Raises:
        ConfigError: A word is neither, or an override has no meaning before Hydra is asked.
    """
    overrides = list(get_args_parser().parse_intermixed_args(list(arguments)).overrides)
    for item in overrides:
        if "=" not in item and not item.startswith("~"):
            raise ConfigError(f"'{item}' is no override: PLACE=VALUE sets a value, ~PLACE removes one")
    refuse_long_overrides(overrides)
    refuse_lost_overrides(overrides)
    return [item for item in arguments if item not in overrides], overrides


def _run_composed(overrides: Sequence[str]) -> int:
    """Let Hydra compose the config, or answer --help and the like."""
    results: list[Outcome | KsuitError] = []
    has_begun = False

    def task(config: DictConfig) -> None:
        nonlocal has_begun
        has_begun = True
        try:
            _refuse_launcher(config)
            results.append(_run_one(without_sweep(config)))
        except KsuitError as error:  # Hydra would print more about it than a person needs
            results.append(error)

    register_search_path()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, where they are explained
    try:
        hydra.main(config_path=str(shipped_conf()), config_name=CONFIG_NAME, version_base="1.3")(task)()
    except Exception as error:
        if has_begun and not isinstance(error, MISTAKES):  # an error of the run, which needs its traceback
            raise
        raise explain(error, overrides) from error
    if results and isinstance(results[0], KsuitError):
        raise results[0]
    return results[0].exit_status if results else 0


def _refuse_launcher(config: DictConfig) -> None:
    target = OmegaConf.select(config, "launcher._target_")
    if target not in (None, "ksuit_runner.launchers.in_process.InProcessLauncher"):
        name = HydraConfig.get().runtime.choices.get("launcher")
        raise ConfigError(
            f"launcher: {name} is for the runs of a sweep, and this is a single one. "
            f"To launch it so: -m launcher={name}; to do it here: launcher=in_process"
        )


def _run_one(config: DictConfig) -> "Outcome":
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        raise ConfigError("hydra.mode: a sweep is asked for by -m, or by sweep=NAME for a file in conf/sweep/")
    values = check_config(config)
    overrides = list(HydraConfig.get().overrides.task)
    from ksuit_runner.runner import run

    return run(values, Launch(command_line(), overrides))


def _go_on(request: Request, overrides: Sequence[str]) -> int:
    """Resume, fork or evaluate a stored run; resume a sweep."""
    mode = request.mode
    with files_explained():
        if mode == "resume" and (sweep := find_sweep(request.query, overrides)) is not None:
            from ksuit_runner.sweep.command import resume_sweep

            return resume_sweep(sweep, overrides)
        outputs, run_id = locate(request, overrides)
        stored = compose_stored(mode, PathProvider(outputs.output_dir, run_id), overrides)
    config = stored.config
    config.output_dir = str(outputs.output_dir)
    if mode == "fork":
        config.name, config.parent_run_id = config.name if "name" in stored.changes else None, None
    values = check_config(config, trust=stored.trust)
    from ksuit_runner.runner import run

    launch = Launch(command_line(), stored.overrides, mode, run_id)
    origin = Origin(mode, run_id, tuple(stored.changes), request.checkpoint)
    return run(values, launch, origin, trust=stored.trust).exit_status


if __name__ == "__main__":
    main()
