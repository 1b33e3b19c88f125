"""The command line; torch and MLflow are imported only when a run starts."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module

import hydra
from omegaconf import DictConfig

from ksuit_runner import __version__
from ksuit_runner.cli.arguments import COMMANDS, as_overrides, split
from ksuit_runner.config.compose import VERBOSE, drop_settings_of_what_is_left_out, show_debugging
from ksuit_runner.config.explain import MISTAKES, explain
from ksuit_runner.config.groups import CONFIG_NAME, register_search_path, shipped_conf
from ksuit_runner.config.overrides import bare_name, value_of
from ksuit_runner.distributed.environment import adopt_slurm, for_starter, place
from ksuit_runner.engine.outcome import RunOutcome
from ksuit_runner.errors import ConfigError, KsuitError, PeerError, files_explained
from ksuit_runner.ui.command_line import command_line
from ksuit_runner.ui.lasting_output import secure_output
from ksuit_runner.ui.terminal import make_console, print_error, print_traceback

Command = Callable[[str, Sequence[str]], int]
_OTHERS_S = 1.0


def main() -> None:
    """Run what the command line asks for and exit with its status."""
    secure_output()
    sys.excepthook = print_traceback
    if os.getcwd() not in sys.path:  # the project's own callbacks and models; `python -m` does so itself
        sys.path.insert(0, os.getcwd())
    adopt_slurm()
    if place() is not None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a rank that is lost is told once, not by all of torch
    try:
        status = _main(sys.argv[1:])
    except KsuitError as error:
        _print_error(error)
        status = error.exit_status
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(for_starter(status))


def _print_error(error: KsuitError) -> None:
    """Print why nothing was started, once for all ranks."""
    if isinstance(error, PeerError) and error.is_reported:
        return
    here = place()
    if here is not None and here.rank > 0:
        time.sleep(_OTHERS_S)  # what has started the ranks ends this one meanwhile if it is the same with rank 0
        error = KsuitError(f"rank {here.rank}: {error}")
    if logging.getLogger("ksuit_runner").level == logging.DEBUG:
        print_traceback(type(error), error, error.__traceback__)
    print_error(make_console(stderr=True), error)


def _main(arguments: Sequence[str]) -> int:
    if "--version" in arguments:
        print(f"ksuit_runner {__version__}")
        return 0
    flags, words = split(arguments)
    if {"--help", "-h"} & set(flags):
        from ksuit_runner.cli.help import print_help

        return print_help(words)
    overrides = _without_verbose(as_overrides(words))
    for name, (module, function) in COMMANDS.items():
        if (query := value_of(name, overrides)) is not None:
            command: Command = getattr(import_module(f"ksuit_runner.{module}"), function)
            with files_explained():
                return command(query, overrides)
    return _start(flags, overrides)


def _start(flags: Sequence[str], overrides: Sequence[str]) -> int:
    """Start a run or a sweep, or go on with one; what only this needs takes a third of the time of ``--help``."""
    from ksuit_runner.cli.start import print_stored, start_stored
    from ksuit_runner.resume.request import as_single, refuse_sweep_settings, requested

    request, choice = requested(overrides), value_of("sweep", overrides)
    multirun = [flag for flag in flags if flag in ("-m", "--multirun")]
    others = [flag for flag in flags if flag not in multirun]
    if request is not None:
        if others in (["--cfg", "job"], ["-c", "job"]) and not multirun:
            return print_stored(request, overrides)
        if flags or choice:
            raise ConfigError(f"{request}: it cannot be given together with {(*flags, f'sweep={choice}')[0]}")
        return start_stored(request, overrides, command_line()).exit_status
    overrides = as_single(overrides)
    if not others and (multirun or choice):
        from ksuit_runner.sweep.commands import start_sweep

        with files_explained():
            return start_sweep(overrides, command_line()).exit_status
    if not others:
        refuse_sweep_settings(overrides)
    sys.argv[1:] = [*others, *overrides]  # argparse expects flags before the overrides, users write them anywhere
    return _run_composed(overrides)


def _without_verbose(overrides: Sequence[str]) -> list[str]:
    """Obey ``hydra.verbose``, which any command takes, and return the other overrides."""
    show_debugging(value_of(VERBOSE, overrides) or "false")
    return [item for item in overrides if bare_name(item) != VERBOSE]


def _run_composed(overrides: Sequence[str]) -> int:
    """Let Hydra compose the config, or answer --help and the like."""
    from ksuit_runner.cli.start import start_composed

    results: list[RunOutcome | KsuitError] = []
    has_begun = False

    def task(config: DictConfig) -> None:
        nonlocal has_begun
        has_begun = True
        try:
            drop_settings_of_what_is_left_out(config, overrides)
            results.append(start_composed(config, command_line()))
        except KsuitError as error:  # Hydra would print more about it than the user needs
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
