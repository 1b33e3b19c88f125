"""Finds the largest batches that fit into memory, by trying them out: ``find_batch_size=true``."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ksuit_runner.config.check.known_keys import check_keys
from ksuit_runner.config.check.ranks import rank_count
from ksuit_runner.config.check.whole_config import check_config
from ksuit_runner.config.compose import compose_config, without_sweep
from ksuit_runner.config.overrides import root
from ksuit_runner.distributed.environment import place
from ksuit_runner.errors import ConfigError
from ksuit_runner.record.stored_run import Launch
from ksuit_runner.resume.starting_point import with_starting_point
from ksuit_runner.start.start_run import Start, start_run
from ksuit_runner.ui.terminal import make_console

if TYPE_CHECKING:
    from rich.console import Console

_COMMAND = "find_batch_size"
_NOOP = {"_target_": "ksuit_runner.tracker.noop.NoopTracker"}
_END = "ksuit_runner.engine.trial.EndTrial"
_LEAST_EVALUATED = 2  # with a single sample, some models and callbacks can do nothing
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def find_batch_size(query: str, overrides: Sequence[str]) -> int:
    """Print the least ``trainer.accumulation_steps`` with which a part of ``data.batch_size`` fits into memory.

    The batch of an update stays as it is, and with it learning rate and schedule. What fits is found out by short runs
    of the very config: with its model, precision, optimizer, callbacks and ranks. Then the first batch of every
    evaluation is tried out beside all that training holds, and ``data.eval_batch_size`` is halved until it fits.

    A run does not decide this by itself: the number of parts is what its random draws and the order of its sums depend
    on, and has to be the same when it is resumed, on any device.

    Args:
        query: ``true``.
        overrides: The command line: those of the run.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: There is a mistake in the config, or not even a single sample fits.
        Exception: What else a run has failed with.
    """
    if query != "true":
        raise ConfigError(f"{_COMMAND}={query}: write {_COMMAND}=true, beside the overrides of the run")
    if (here := place()) is not None:
        raise ConfigError(f"{_COMMAND}: this is for one process, and {here.starter} has started {here.size}: ranks=N")
    config = compose_config([item for item in overrides if root(item) != _COMMAND])
    check_keys(config, overrides)
    values = with_starting_point(check_config(without_sweep(config)))
    size, ranks, console = int(values["data"]["batch_size"]), rank_count(values), make_console()

    def fits(parts: int) -> bool:
        does_fit = _try_out(values, parts, _LEAST_EVALUATED)
        result = "fits" if does_fit else "out of memory"
        console.print(f"trainer.accumulation_steps={parts}, parts of {-(-size // parts)} samples: {result}")
        return does_fit

    parts = least_that_fits(fits, ranks, size)
    if parts is None:
        raise ConfigError("not even a part of a single sample fits", path="data.batch_size")
    each = f"on each of {ranks} ranks" if ranks > 1 else "at once"
    console.print(
        f"the whole batch of {size} samples fits; for more of them: {_COMMAND}=true data.batch_size={2 * size}"
        if parts == ranks
        else f"the largest that fits: {-(-size // parts)} samples {each}. Write trainer.accumulation_steps={parts}"
    )
    if _evaluation_sizes(values):
        _find_evaluation_size(values, parts, console)
    return 0


def _find_evaluation_size(values: Mapping[str, Any], parts: int, console: Console) -> None:
    """Print the largest batches of evaluations that fit: those of the config, or half as large, and so on."""
    sizes = _evaluation_sizes(values)
    size = max(sizes.values())
    while not _try_out(values, parts, size):
        console.print(f"evaluations in batches of {size} samples: out of memory")
        if size <= _LEAST_EVALUATED:
            raise ConfigError("an evaluation does not fit, however small its batches are", path="callbacks")
        size = max(_LEAST_EVALUATED, size // 2)
    smaller = [f"{path}={size}" for path, configured in sizes.items() if configured > size]
    write = f". Write {' '.join(smaller)}" if smaller else ""
    console.print(f"evaluations in batches of {size} samples: fits{write}")


def _evaluation_sizes(values: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of the batches of evaluations by their config paths; none if no callback evaluates a dataset."""
    data, callbacks = values["data"], values.get("callbacks") or {}
    evaluations = {name: item for name, item in callbacks.items() if "dataset_key" in (item or {})}
    sizes = {
        f"callbacks.{name}.batch_size": int(item["batch_size"])
        for name, item in evaluations.items()
        if item.get("batch_size")
    }
    if len(sizes) < len(evaluations):
        sizes["data.eval_batch_size"] = int(data.get("eval_batch_size") or data["batch_size"])
    return sizes


def least_that_fits(fits: Callable[[int], bool], step: int, most: int) -> int | None:
    """Return the least number of parts, a multiple of ``step`` and at most ``most``, that fits; None if none does.

    Args:
        fits: Whether so many parts fit; if they do, so do more of them.
        step: Number of ranks.
        most: Number of samples.
    """
    too_few, enough = 0, 1  # in steps
    while not fits(enough * step):
        if enough == most // step:
            return None
        too_few, enough = enough, min(2 * enough, most // step)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(middle * step) else (middle, enough)
    return enough * step


def _try_out(values: Mapping[str, Any], parts: int, evaluated: int) -> bool:
    """Return whether two updates in so many parts fit into memory, and a batch of every evaluation beside them.

    Args:
        values: The config of the run.
        parts: Number of parts of a batch.
        evaluated: Most samples in a batch of an evaluation.

    Raises:
        KeyboardInterrupt: The user has ended it.
        ConfigError: There is nothing to try out.
        Exception: The run has failed of something else.
    """
    _free_memory()
    with TemporaryDirectory(prefix="ksuit_trial_") as folder:
        mark = Path(folder, "fits")
        end = {"_target_": _END, "mark": str(mark)}
        data, callbacks = values["data"], values.get("callbacks") or {}
        trial = {
            **values,
            "data": {**data, "eval_batch_size": min(evaluated, data.get("eval_batch_size") or data["batch_size"])},
            "output_dir": folder,
            "tracker": _NOOP,
            "trainer": {**values["trainer"], "accumulation_steps": parts},
            "callbacks": {**{name: _limited(item, evaluated) for name, item in callbacks.items()}, _COMMAND: end},
            "max_restarts": 0,
        }
        outcome = start_run(Start(trial, Launch(_COMMAND, []), is_shown=False))
        if mark.exists():
            return True
    if outcome.error is None:
        if outcome.signal is None:
            raise ConfigError("the run has no updates to try out", path="trainer")
        raise KeyboardInterrupt
    if not is_out_of_memory(outcome.error):
        raise outcome.error
    return False


def _limited(callback: Any, evaluated: int) -> Any:
    size = callback.get("batch_size") if isinstance(callback, Mapping) else None
    return callback if size is None else {**callback, "batch_size": min(size, evaluated)}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a run has failed because it needed more memory than there is, of a device or of the machine."""
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _OUT_OF_MEMORY)


def _free_memory() -> None:
    """Give back to the device what a trial has held, which has ended."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
