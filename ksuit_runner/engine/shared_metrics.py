"""Metrics that two callbacks log under one key, at intervals that meet: found before training."""

from collections.abc import Iterator, Mapping
from itertools import combinations

from ksuit_runner.callback_base import CallbackBase
from ksuit_runner.callback_bases.periodic import PeriodicCallback
from ksuit_runner.config.check.references import expand
from ksuit_runner.counter import UpdateCounter
from ksuit_runner.errors import ConfigError


def check_shared_metrics(callbacks: Mapping[str, CallbackBase], counter: UpdateCounter) -> None:
    """Check that no update gives two callbacks different values for one metric, as far as they say what they log.

    Evaluations at one update agree, however many intervals lead to them; means over different updates do not.

    Raises:
        ConfigError: Two callbacks would log such values; both are named, and the update.
    """
    periodic = {name: item for name, item in callbacks.items() if isinstance(item, PeriodicCallback)}
    for (name, item), (other_name, other) in combinations(periodic.items(), 2):
        if item.is_repeatable and other.is_repeatable:
            continue
        shared = set(_keys(item)) & set(_keys(other))
        if shared and (update := item.interval.meets(other.interval, counter)) is not None:
            raise ConfigError(
                f"callbacks.{name} and callbacks.{other_name}: both log '{min(shared)}' at update {update}, and not "
                "the same value. Leave one of them out, or give it an interval that does not meet the other's"
            )


def _keys(callback: CallbackBase) -> Iterator[str]:
    """Yield the keys that a callback says it logs, without those that depend on more than its arguments."""
    arguments = {**vars(callback), "name": callback.display_name}
    for pattern in callback.logs or ():
        yield from (key for key in expand(pattern, arguments) if "*" not in key)
