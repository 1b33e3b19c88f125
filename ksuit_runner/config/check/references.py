"""Checks the values of a config that refer to others: intervals, keys of datasets, keys of metrics."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from ksuit_runner.config.check.annotation import mentions
from ksuit_runner.config.check.objects import CheckedObject
from ksuit_runner.config.schema import UNKNOWN
from ksuit_runner.counter import Interval
from ksuit_runner.errors import ConfigError, did_you_mean, suggest

_INTERVALS = ("every_n_epochs", "every_n_updates", "every_n_samples")
_ENDS = ("at_start", "at_end")
_CALLBACKS = ("callbacks.", "default_callbacks.")


def check_intervals(item: CheckedObject) -> None:
    """Check that a periodic callback has an interval, and that every interval is a positive whole number.

    Raises:
        ConfigError: It has none, or one that is not a positive whole number.
    """
    asked = {parameter.name for parameter in item.parameters}
    if not asked.issuperset(_INTERVALS) or not (item.path == "checkpoint" or is_callback(item)):
        return
    values = [item.arguments[name] for name in (*_INTERVALS, *_ENDS) if name in asked]
    if UNKNOWN in values or (item.path == "checkpoint" and values == [None] * 3):
        return
    try:
        Interval(*values)
    except ConfigError as error:
        error.locate(item.path)
        raise


def check_dataset_keys(item: CheckedObject, datasets: Collection[str]) -> None:
    """Check that every argument annotated as DatasetKey names one of the datasets.

    Raises:
        ConfigError: There is no such dataset.
    """
    for path, key in _keys(item, "DatasetKey"):
        if key not in datasets:
            listed = f" ({', '.join(sorted(datasets))})" if suggest(key, datasets) else ""
            raise ConfigError(f"there is no dataset '{key}'. {did_you_mean(key, datasets)}{listed}", path=path)


def check_metric_keys(objects: Sequence[CheckedObject], objective: Any) -> None:
    """Check that every argument annotated as MetricKey, and the objective, is logged by some callback.

    Nothing is checked if there is a callback that does not declare what it logs.

    Raises:
        ConfigError: No callback logs the metric.
    """
    logged: set[str] = set()
    for item in filter(is_callback, objects):
        if item.signature is None or item.signature.logs is None:
            return
        of_stored_weights = item.arguments.get("weights_of") not in (None, UNKNOWN)  # which the keys name
        for pattern in item.signature.logs:
            if not (of_stored_weights and pattern.endswith("{dataset_key}")):
                logged.update(expand(pattern, item.arguments | {"name": item.path.rpartition(".")[2]}))
    watched = [pair for item in objects for pair in _keys(item, "MetricKey")]
    for path, key in [*watched, *_strings("objective", objective)]:
        if not any(_matches(key, pattern) for pattern in logged):
            hint = did_you_mean(key, logged, longest=0) if logged else "No callback logs anything."
            listed = f"\nLogged are: {', '.join(sorted(logged))}" if logged else ""
            raise ConfigError(f"no callback logs '{key}'. {hint}".rstrip() + listed, path=path)


def is_callback(item: CheckedObject) -> bool:
    """Whether an object is one of the run's callbacks, and not an argument of one."""
    return item.path.startswith(_CALLBACKS) and item.path.count(".") == 1


def expand(pattern: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Put arguments into a pattern of metric keys: one key for each element of a list, or key of a mapping.

    ``{_heads}`` is ``_NAME`` for each of the ``heads``, and nothing if there are none.
    """
    parts = re.split(r"\{(\w+)\}", pattern)  # texts at even positions, names of arguments at odd ones
    choices = [_choices(part, arguments) if index % 2 else [part] for index, part in enumerate(parts)]
    yield from map("".join, product(*choices))


def _choices(name: str, arguments: Mapping[str, Any]) -> list[str]:
    if not name.startswith("_"):
        return _texts(arguments.get(name))
    value = arguments.get(name[1:])
    if value is UNKNOWN:
        return ["*"]
    return [f"_{text}" for text in _texts(value)] if value else [""]


def _texts(value: Any) -> list[str]:
    if isinstance(value, list | tuple | Mapping):
        return [str(item) for item in value]
    return ["*"] if value is None or value is UNKNOWN else [str(value)]


def _matches(key: str, pattern: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), key, re.DOTALL) is not None


def _keys(item: CheckedObject, kind: str) -> Iterator[tuple[str, str]]:
    for parameter in item.parameters:
        if mentions(parameter.annotation, kind):
            yield from _strings(f"{item.path}.{parameter.name}", item.arguments[parameter.name])


def _strings(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _strings(f"{path}[{index}]", part)
