"""How many ranks train a run, and whether its config can be trained by so many; before torch is imported."""

from collections.abc import Mapping
from typing import Any

from ksuit_runner.distributed.environment import place
from ksuit_runner.errors import ConfigError, counted
from ksuit_runner.system.gpus import visible_gpus

_SINGLE = "ksuit_runner.distributed.strategy.Strategy"
_PARTS = "trainer.accumulation_steps"


def rank_count(values: Mapping[str, Any]) -> int:
    """Return how many ranks train a run: those that torchrun or Slurm has started, or as many as its config asks for.

    Args:
        values: The config as plain values.

    Raises:
        ConfigError: They contradict each other.
    """
    asked, here = values.get("ranks", 1), place()
    if here is None:
        return max(1, len(visible_gpus())) if asked == "auto" else int(asked)
    if asked not in (1, "auto", here.size):
        raise ConfigError(
            f"{asked} ranks are asked for, and {here.starter} has started {here.size}. Leave ranks out: they are these",
            path="ranks",
        )
    return here.size


def with_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with ``accumulation_steps: auto`` as a number, which stays the same on any number of ranks.

    Raises:
        ConfigError: The ranks cannot train it.
    """
    ranks = rank_count(values)
    values = with_parts_of(ranks, values)
    if ranks > 1:
        _check_strategy(values, ranks)
        _check_device(values, ranks)
    _check_parts(values, ranks)
    return values


def with_parts_of(ranks: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with ``accumulation_steps: auto`` as what it is on so many ranks."""
    trainer = values.get("trainer")
    is_auto = isinstance(trainer, Mapping) and trainer.get("accumulation_steps") == "auto"
    return {**values, "trainer": {**trainer, "accumulation_steps": ranks}} if is_auto else dict(values)  # type: ignore[dict-item]


def _check_strategy(values: Mapping[str, Any], ranks: int) -> None:
    strategy = values.get("strategy")
    if strategy is None or (isinstance(strategy, Mapping) and strategy.get("_target_") == _SINGLE):
        raise ConfigError(f"single is for one process, and there are {ranks} ranks: add trainer=ddp", path="strategy")


def check_gpus(values: Mapping[str, Any]) -> None:
    """Check that there are GPUs for the ranks of this machine, if there are any; where these ranks are started.

    Raises:
        ConfigError: There are fewer.
    """
    ranks, here = rank_count(values), place()
    gpus = len(visible_gpus()) if _device(values) in ("auto", "cuda") else 0
    local = ranks if here is None else here.local_size
    has_one = here is not None and gpus == 1  # perhaps its own, as a scheduler may hide the others from each task
    if ranks > 1 and local is not None and local > gpus > 0 and not has_one:
        raise ConfigError(
            f"{local} ranks on this machine need a GPU each, and there are {gpus}. Fewer ranks, or trainer.device=cpu",
            path="ranks",
        )


def _check_device(values: Mapping[str, Any], ranks: int) -> None:
    kind, _, index = (device := _device(values)).partition(":")
    if index:
        raise ConfigError(
            f"{ranks} ranks need a device each, and {device} is a single one: trainer.device={kind} gives each rank "
            "its own. CUDA_VISIBLE_DEVICES says which ones there are",
            path="trainer.device",
        )


def _check_parts(values: Mapping[str, Any], ranks: int) -> None:
    parts, batch_size = _in(values, "trainer", "accumulation_steps"), _in(values, "data", "batch_size")
    if not isinstance(parts, int) or parts < 1:  # the trainer has the say
        return
    if parts % ranks:
        fitting = ", ".join(str(number) for number in range(1, parts + 1) if parts % number == 0)
        raise ConfigError(
            f"{counted(parts, 'part')} of a batch cannot be divided among {ranks} ranks: write a multiple of {ranks}, "
            f"or auto. With {counted(parts, 'part')} there can be {fitting} rank{'s' if parts > 1 else ''}",
            path=_PARTS,
        )
    if isinstance(batch_size, int) and 0 < batch_size < parts:
        batch = f"a batch of {counted(batch_size, 'sample')}"
        raise ConfigError(f"{batch} cannot be divided into {parts} parts", path=_PARTS)


def _device(values: Mapping[str, Any]) -> str:
    return str(_in(values, "trainer", "device") or "auto")


def _in(values: Mapping[str, Any], node: str, key: str) -> Any:
    found = values.get(node)
    return found.get(key) if isinstance(found, Mapping) else None
