"""Checks the values of a config that refer to others: intervals, keys of datasets, keys of metrics."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from ksuit_runner.config.check.annotation import mentions
from ksuit_runner.config.check.objects import CheckedObject
from ksuit_runner.config.schema import UNKNOWN
from ksuit_runner.counter import Interval
from ksuit_runner.errors import MOST_LISTED, ConfigError, did_you_mean, suggest

LENGTHS = {"every_n_epochs": "max_epochs", "every_n_updates": "max_updates", "every_n_samples": "max_samples"}
"""Interval -> the length of a run that is counted in the same."""
_ENDS = ("at_start", "at_end")
_CALLBACKS = ("callbacks.", "default_callbacks.")


def check_intervals(item: CheckedObject) -> None:
    """Check that a periodic callback has an interval, and that every interval is a positive whole number.

    Raises:
        ConfigError: It has none, or one that is not a positive whole number.
    """
    asked = {parameter.name for parameter in item.parameters}
    if not asked.issuperset(LENGTHS) or not (item.path == "checkpoint" or is_callback(item)):
        return
    values = [item.arguments[name] for name in (*LENGTHS, *_ENDS) if name in asked]
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


def check_metric_keys(objects: Sequence[CheckedObject], objective: Any, trainer: Any) -> None:
    """Check that every argument annotated as MetricKey, and the objective, is logged by some callback.

    Nothing is checked if there is a callback that does not declare what it logs.

    Args:
        objects: The checked objects of the config.
        objective: The metric by which runs are ranked, or None.
        trainer: The node of the trainer, which says how long the run is.

    Raises:
        ConfigError: No callback logs the metric, or the one that does is never due.
    """
    callbacks, weights = list(filter(is_callback, objects)), _offered_weights(objects)
    if any(item.signature is None or item.signature.logs is None for item in callbacks):
        return
    logged = {pattern for item in callbacks if not _is_idle(item, trainer) for pattern in _logged_by(item, weights)}
    watched = [pair for item in objects for pair in _keys(item, "MetricKey")]
    for path, key in [*watched, *_strings("objective", objective)]:
        if any(_matches(key, pattern) for pattern in logged):
            continue
        for item in callbacks:
            if any(_matches(key, pattern) for pattern in _logged_by(item, weights)):
                raise ConfigError(f"{item.path} logs '{key}', but is not due before the run ends", path=path)
        if len(logged) > MOST_LISTED:
            hint, listed = did_you_mean(key, logged), ""
        else:
            hint = did_you_mean(key, logged, longest=0) if logged else "No callback logs anything."
            listed = f"\nLogged are: {', '.join(sorted(logged))}" if logged else ""
        raise ConfigError(f"no callback logs '{key}'. {hint}".rstrip() + listed, path=path)


def check_tags(objects: Sequence[CheckedObject]) -> None:
    """Check that each checkpoint whose weights are evaluated after training gets its tag: mostly from a callback.

    Raises:
        ConfigError: Nothing gives a checkpoint this tag.
    """
    callbacks = list(filter(is_callback, objects))
    if any(item.signature is None or item.signature.tags is None for item in callbacks):
        return
    given = {tag for item in callbacks for tag in _declared(item, item.signature.tags if item.signature else ())}
    if any(item.path == "checkpoint" and item.arguments.get("keep_every") for item in objects):
        given.add("update-*")
    for item in callbacks:
        for path, tag in _strings(f"{item.path}.weights_of", item.arguments.get("weights_of")):
            if not any(_matches(tag, pattern) for pattern in given):
                hint = did_you_mean(tag, given) if given else "Add best_checkpoint, or best_loss, to the callbacks."
                own = f"A callback of your own that gives it says so: tags = ('{tag}',)"
                raise ConfigError(f"no callback gives a checkpoint the tag '{tag}'. {hint}\n{own}", path=path)


def is_callback(item: CheckedObject) -> bool:
    """Whether an object is one of the run's callbacks, and not an argument of one."""
    return item.path.startswith(_CALLBACKS) and item.path.count(".") == 1


def expand(pattern: str, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Put arguments into a pattern of names: one name for each element of a list, or key of a mapping.

    ``{_heads}`` is ``_NAME`` for each of the ``heads``, and nothing if there are none; ``{_decays+}`` is nothing also
    if there is one. ``{/weights}`` is ``/NAME`` in the same way, and nothing for an empty name.
    """
    parts = re.split(r"\{([_/]?\w+\+?)\}", pattern)  # texts at even positions, names of arguments at odd ones
    choices = [_choices(part, arguments) if index % 2 else [part] for index, part in enumerate(parts)]
    yield from map("".join, product(*choices))


def _choices(name: str, arguments: Mapping[str, Any]) -> list[str]:
    mark, least = name[0] if name[0] in "_/" else "", 2 if name.endswith("+") else 1
    value = arguments.get(name.removeprefix(mark).removesuffix("+"))
    if not mark:
        return _texts(value)
    if value is UNKNOWN:
        return ["*"]
    texts = _texts(value) if value else []
    return [f"{mark}{text}" if text else "" for text in texts] if len(texts) >= least else [""]


def _logged_by(item: CheckedObject, weights: Sequence[str]) -> Iterator[str]:
    """Yield the metric keys that a callback logs, as far as it declares them, by which weights are offered."""
    tag = item.arguments.get("weights_of")
    if tag is not None:  # the weights are those of a checkpoint, and named after its tag
        weights = [f"{tag}/{name}".rstrip("/") for name in weights] if isinstance(tag, str) else ["*"]
    yield from _declared(item, item.signature.logs if item.signature else (), weights=weights)


def _offered_weights(objects: Iterable[CheckedObject]) -> list[str]:
    """Return the names of the weights that evaluations report: empty for the live ones, ``*`` where it is not known."""
    found = [""]
    for item in objects:
        if item.path == "trainer" or is_callback(item):
            offers = item.signature.offers if item.signature else None
            found += ["*"] if offers is None else _declared(item, offers)
    return found


def _declared(item: CheckedObject, patterns: Sequence[str] | None, **further: Any) -> Iterator[str]:
    """Yield the names that a class declares by patterns, with the arguments of an object put into them."""
    arguments = item.arguments | {"name": item.path.rpartition(".")[2], **further}
    for pattern in patterns or ():
        yield from expand(pattern, arguments)


def _is_idle(item: CheckedObject, trainer: Any) -> bool:
    """Whether a periodic callback is sure never to act in a run that does not end early."""
    if not {*LENGTHS, *_ENDS} <= item.arguments.keys() or item.arguments.get("weights_of") is not None:
        return False
    if any(item.arguments[name] is not False for name in _ENDS):
        return False
    lengths = trainer if isinstance(trainer, Mapping) else {}
    given = [(item.arguments[every], lengths.get(end)) for every, end in LENGTHS.items() if item.arguments[every]]
    return all(isinstance(every, int) and isinstance(end, int) and 0 < end < every for every, end in given)


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
