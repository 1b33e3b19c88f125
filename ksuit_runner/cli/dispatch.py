"""The command line; torch and MLflow are imported only when a run starts."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from ksuit_runner.cli.start import check_overrides, start_composed, start_stored
from ksuit_runner.config.compose import CONFIG_NAME, MISTAKES, explain, register_search_path, shipped_conf
from ksuit_runner.config.overrides import value_of
from ksuit_runner.distributed.environment import adopt_slurm, for_starter, place
from ksuit_runner.engine.outcome import RunOutcome
from ksuit_runner.errors import ConfigError, KsuitError, PeerError, files_explained
from ksuit_runner.resume.request import MODES, refuse_sweep_settings, requested
from ksuit_runner.ui.command_line import command_line
from ksuit_runner.ui.lasting_output import secure_output
from ksuit_runner.ui.terminal import make_console, print_error, print_traceback

Command = Callable[[str, Sequence[str]], int]
COMMANDS = {
    "sync": ("cli.sync", "sync"),
    "list": ("cli.list_runs", "list_runs"),
    "show": ("reports.show", "show"),
    "export": ("cli.export", "export"),
    "compare": ("reports.compare", "compare"),
    "leaderboard": ("sweep.commands", "show_leaderboard"),
}
"""Key of a command that trains nothing -> its module and function, which gets the value of the key."""
_WORDS = (*COMMANDS, *MODES)
_NEWEST = "20"  # how many runs are listed unless it is said
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
    print_error(make_console(stderr=True), error)


def _main(arguments: Sequence[str]) -> int:
    flags, overrides = _split(arguments)
    if {"--help", "-h"} & set(flags):
        from ksuit_runner.cli.help import print_help

        return print_help(overrides)
    for name, (module, function) in COMMANDS.items():
        if (query := value_of(name, overrides)) is not None:
            command: Command = getattr(import_module(f"ksuit_runner.{module}"), function)
            with files_explained():
                return command(query, overrides)
    request, choice = requested(overrides), value_of("sweep", overrides)
    multirun = [flag for flag in flags if flag in ("-m", "--multirun")]
    others = [flag for flag in flags if flag not in multirun]
    if request is not None and not {"--cfg", "-c"} & set(flags):
        if flags or choice:
            raise ConfigError(f"{request}: it cannot be given together with {(*flags, f'sweep={choice}')[0]}")
        return start_stored(request, overrides, command_line()).exit_status
    if not others and (multirun or choice):
        from ksuit_runner.sweep.commands import start_sweep

        with files_explained():
            return start_sweep(overrides, command_line()).exit_status
    if not others:
        refuse_sweep_settings(overrides)
    sys.argv[1:] = [*others, *overrides]  # argparse expects flags before the overrides, users write them anywhere
    return _run_composed(overrides)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags of Hydra, with what belongs to them, and the overrides.

    Raises:
        ConfigError: A word is neither, or an override has no meaning before Hydra is asked.
    """
    given = list(get_args_parser().parse_intermixed_args(list(arguments)).overrides)
    overrides = _as_overrides(given)
    check_overrides(overrides)
    return [item for item in arguments if item not in given], overrides


def _as_overrides(given: Sequence[str]) -> list[str]:
    """Return overrides in which ``show RUN`` is ``show=RUN``, and ``compare A B`` is ``compare=[A,B]``.

    Raises:
        ConfigError: A command has too few or too many words.
    """
    command, *words = [item for item in given if "=" not in item and not item.startswith("~")] or [""]
    key = "list" if command == "runs" else command
    if key not in _WORDS:
        return list(given)
    if key == "compare":
        value = f"[{','.join(words)}]"
    elif command == "runs" and not words:
        value = _NEWEST
    elif len(words) == 1:
        value = words[0]
    else:
        what = "a number, or all" if key == "list" else "a sweep" if key == "leaderboard" else "a run, such as last"
        raise ConfigError(f"{command}: it takes {what}, and {len(words)} words are given")
    return [f"{key}={value}", *(item for item in given if item not in (command, *words))]


def _run_composed(overrides: Sequence[str]) -> int:
    """Let Hydra compose the config, or answer --help and the like."""
    results: list[RunOutcome | KsuitError] = []
    has_begun = False

    def task(config: DictConfig) -> None:
        nonlocal has_begun
        has_begun = True
        try:
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
