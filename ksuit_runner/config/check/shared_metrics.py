"""Metrics that two callbacks are sure to log under one key at one update, by the source of their classes.

Where that depends on the length of an epoch, it is found when the run is assembled, see ``engine.shared_metrics``.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import lcm
from typing import Any

from ksuit_runner.config.check.objects import CheckedObject
from ksuit_runner.config.check.references import LENGTHS, expand, is_callback
from ksuit_runner.config.schema import UNKNOWN
from ksuit_runner.errors import ConfigError


def check_shared_metrics(objects: Sequence[CheckedObject], trainer: Any) -> None:
    """Check that no two periodic callbacks log different values under one key at one update, as far as that is sure.

    Args:
        objects: The checked objects of the config.
        trainer: The node of the trainer, which says how long the run is.

    Raises:
        ConfigError: Two callbacks do.
    """
    lengths = trainer if isinstance(trainer, Mapping) else {}
    periodic = [item for item in objects if is_callback(item) and "every_n_updates" in item.arguments]
    for item, other in combinations(periodic, 2):
        shared = _keys(item) & _keys(other)
        if shared and not _agree(item, other) and _meet(item.arguments, other.arguments, lengths):
            raise ConfigError(
                f"it logs '{min(shared)}' at updates at which {other.path} does, and not the same value. Leave one of "
                "them out, or give it an interval that does not meet the other's",
                path=item.path,
            )


def _keys(item: CheckedObject) -> set[str]:
    """Return the keys that a callback logs in any case, apart from those of the weights of a checkpoint."""
    if item.signature is None or item.arguments.get("weights_of") is not None:
        return set()
    arguments = item.arguments | {"name": item.path.rpartition(".")[2]}
    return {key for pattern in item.signature.logs or () for key in expand(pattern, arguments) if "*" not in key}


def _agree(item: CheckedObject, other: CheckedObject) -> bool:
    """Whether two callbacks may log the same value at one update, as evaluations do."""
    return all(each.signature is not None and each.signature.is_repeatable for each in (item, other))


def _meet(one: Mapping[str, Any], other: Mapping[str, Any], lengths: Mapping[str, Any]) -> bool:
    if any(one.get(end) is True and other.get(end) is True for end in ("at_start", "at_end")):
        return True
    for every, end in LENGTHS.items():
        numbers: list[Any] = [one.get(every), other.get(every)]
        last = lengths.get(end)
        if None in numbers or UNKNOWN in numbers:
            continue
        if numbers[0] == numbers[1] or (isinstance(last, int) and lcm(*numbers) <= last):
            return True
    return False
