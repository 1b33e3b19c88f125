"""Intervals and warm-ups that a run is too short for: named before training, as they may be mistakes."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.config.schema import objects_beside
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import counted
from ksuit_runner.schedule import warmup_updates


def never_due(periodic: Iterable[PeriodicCallback], counter: UpdateCounter, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence, with its config path, about each interval, and each warm-up, that does not end in the run.

    A callback may act all the same, at the end or in hooks of its own.

    Args:
        periodic: The callbacks of the run that act at intervals.
        counter: Its counter; what counts is the length of the whole run, wherever it is.
        config: Its config.
    """
    begin = counter.at(0)
    if begin.is_empty:
        return
    epochs = f", {begin.updates_per_epoch} in each epoch" if begin.has_epochs else ""
    length = f"the run has {counted(begin.end_update, 'update')}{epochs}"
    chosen = config["callbacks"] or {}  # the default ones are not chosen for the length of a run
    for item in periodic:
        due = item.interval.next_due(begin)
        is_idle = not item.interval.at_start and (due is None or due > begin.end_update)
        if is_idle and item.name in chosen:
            path = f"callbacks.{item.name}"
            yield f"{path}: its interval is longer than the run: {item.interval} is update {due}, and {length}"
    for path, node in _schedules(config):
        warmup = node.get("warmup", 0)
        updates = warmup_updates(warmup, begin.end_update, begin.updates_per_epoch if begin.has_epochs else None)
        if updates >= begin.end_update:
            yield f"{path}.warmup: it does not end: {warmup} is {counted(updates, 'update')}, and {length}"


def _schedules(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the config path and the node of each schedule that ships."""
    optimizer = config["optimizer"]
    nodes = {"": config, **{f"optimizer.{name}.": optimizer[name] for name in objects_beside("optimizer", optimizer)}}
    for prefix, above in nodes.items():
        for name in ("schedule", "weight_decay_schedule"):
            node = above.get(name)
            if isinstance(node, Mapping) and str(node.get("_target_")).startswith("ksuit_runner.schedule."):
                yield f"{prefix}{name}", node
