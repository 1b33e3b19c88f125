"""The parameters that a sweep varies, their values, and the combinations of them: grid or random draws."""

import math
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from hydra.core.override_parser.types import Glob, IntervalSweep, Override

from ksuit_runner.config.groups import choices, groups
from ksuit_runner.config.overrides import bare_name, parse, to_text
from ksuit_runner.errors import ConfigError

SEED = "seed"
"""The key over which means are taken unless ``sweep.mean_over`` names others."""

_OPENS = re.compile(r"\w+\([^)]*$")  # what YAML has left of ``range(0,3)`` in a list

Combination = dict[str, str]
"""Key -> value, both as the text of an override."""


@dataclass(frozen=True)
class Distribution:
    """What numbers are drawn from: uniform over an interval, or over its logarithm.

    Attributes:
        low: Smallest number.
        high: Largest number.
        log: Whether draws are uniform in the logarithm.
        whole: Whether only whole numbers are drawn.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, generator: random.Random) -> str:
        """Draw a number, as the text of an override, with six digits."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = generator.uniform(low, high)
        return self.text(math.exp(value) if self.log else value)

    def text(self, value: float) -> str:
        """Return a number of the interval as the text of an override."""
        return str(round(value)) if self.whole else repr(min(max(float(f"{value:.6g}"), self.low), self.high))


@dataclass(frozen=True)
class SweepParameter:
    """A parameter that a sweep varies.

    Attributes:
        key: Its key in an override, such as ``optimizer.lr``, ``model`` or ``+callbacks``.
        values: Its values; empty for an interval.
        interval: What it is drawn from, or None if it has values.
    """

    key: str
    values: tuple[str, ...] = ()
    interval: Distribution | None = None

    def draw(self, generator: random.Random) -> str:
        """Draw one value, each with the same probability."""
        return self.interval.draw(generator) if self.interval else generator.choice(self.values)

    def extremes(self) -> tuple[str, ...]:
        """Return the values that are checked before anything is drawn: all, or both ends of the interval."""
        if self.interval is None:
            return self.values
        return self.interval.text(self.interval.low), self.interval.text(self.interval.high)


def read_parameters(params: Mapping[str, Any], seed: int) -> list[SweepParameter]:
    """Read the parameters of a sweep.

    Args:
        params: Key -> its values: a list, or text in Hydra's grammar such as ``1,2``, ``range(0,3)``, ``glob(*)`` or
            ``tag(log, interval(1e-4, 1e-1))``. Anything else is one value.
        seed: Seed of ``shuffle``.

    Raises:
        ConfigError: A value cannot be read, or a parameter has none.
    """
    return [_read_parameter(str(key), value, seed) for key, value in params.items()]


def _read_parameter(key: str, value: Any, seed: int) -> SweepParameter:
    path = f"sweep.params.{key}"
    if isinstance(value, list) and not value:
        raise ConfigError("the list is empty; give one value or more", path=path)
    if isinstance(value, list) and any(isinstance(item, str) and _OPENS.match(item) for item in value):
        written = ",".join(map(str, value))
        raise ConfigError(f"text in a list is taken literally. Without the brackets: {written}", path=path)
    if isinstance(value, dict):
        _refuse_nested(path, key, value)
    if not isinstance(value, str):
        return SweepParameter(key, _override_values(path, value if isinstance(value, list) else [value]))
    override = _parse_override(path, f"{key}={value}")
    if not override.is_sweep_override():
        return SweepParameter(key, (value,))
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return SweepParameter(key, interval=_range(path, sweep))
    if isinstance(sweep, Glob):
        return SweepParameter(key, _glob(path, key, sweep))
    with _seeded(f"{seed}/{key}"):  # for shuffle()
        return SweepParameter(key, tuple(override.sweep_string_iterator()))


def _refuse_nested(path: str, key: str, value: dict[Any, Any]) -> None:
    """Refuse a mapping that seems to hold parameters with their values, instead of being one value.

    An object, with its ``_target_``, may have lists as arguments.
    """
    leaves = list(_leaves(key, value))
    if any(isinstance(leaf, list) or (isinstance(leaf, str) and _varies(leaf)) for _, leaf in leaves):
        _override_values(path, [value])
        meant = (f"{name}: {leaf if isinstance(leaf, str) else to_text(leaf)}" for name, leaf in leaves)
        raise ConfigError(
            "\n".join(["a mapping is one value. Keys that vary are written with dots:", *meant])
            + f"\nIf it is meant as one value, put it in a list: {key}: [{{...}}]",
            path=path,
        )


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is in a mapping by its dotted key; an object is one leaf."""
    if isinstance(value, dict) and value and "_target_" not in value:
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}", item)
    else:
        yield key, value


def _varies(text: str) -> bool:
    try:
        return parse(f"key={text}").is_sweep_override()
    except ConfigError:
        return False


def _override_values(path: str, values: list[Any]) -> tuple[str, ...]:
    try:
        return tuple(map(to_text, values))
    except ConfigError as error:
        error.locate(path)
        raise


def _parse_override(path: str, override: str) -> Override:
    try:
        return parse(override)
    except ConfigError as error:
        hint = "Text is parsed as an override; to take it literally, put it in a list"
        raise ConfigError(f"{error}\n{hint}", path=path) from None


def _range(path: str, sweep: IntervalSweep) -> Distribution:
    low, high = sweep.start, sweep.end
    assert low is not None and high is not None  # the grammar demands both
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"the ends of an interval must be finite and in order, not {low} and {high}", path=path)
    log = "log" in sweep.tags
    if log and low <= 0:
        raise ConfigError(f"a logarithmic interval must start above 0, not at {low}", path=path)
    return Distribution(float(low), float(high), log, whole=isinstance(low, int))


def _glob(path: str, key: str, glob: Glob) -> tuple[str, ...]:
    group = bare_name(key)
    if group not in groups():
        raise ConfigError(f"glob() matches files of a config group, and there is no group '{group}'", path=path)
    found = tuple(map(to_text, glob.filter(choices(group))))
    if not found:
        raise ConfigError(f"no file of the group '{group}' matches", path=path)
    return found


@contextmanager
def _seeded(key: str) -> Iterator[None]:
    """Seed Python's generator for the block, and restore it afterwards."""
    state = random.getstate()
    random.seed(key)
    try:
        yield
    finally:
        random.setstate(state)


def grid(parameters: Sequence[SweepParameter]) -> list[Combination]:
    """Return every combination; the last parameter changes fastest.

    Raises:
        ConfigError: A parameter is an interval, which has infinitely many values.
    """
    for parameter in parameters:
        if parameter.interval is not None:
            raise ConfigError(
                "a grid cannot have an interval. Draw from it: sweep.method=random sweep.samples=20",
                path=f"sweep.params.{parameter.key}",
            )
    keys = [parameter.key for parameter in parameters]
    return [dict(zip(keys, values, strict=True)) for values in product(*(item.values for item in parameters))]


def draw(
    parameters: Sequence[SweepParameter], samples: int, seed: int, repeats: Collection[str] = (SEED,)
) -> list[Combination]:
    """Return random combinations, the same for the same seed; each is combined with every value of ``repeats``.

    Draw ``i`` of a parameter depends only on (seed, i, key): more samples or another parameter do not change it.
    """
    repeated = [item for item in parameters if bare_name(item.key) in repeats]
    others = [item for item in parameters if item not in repeated]
    drawn = (
        {item.key: item.draw(random.Random(f"{seed}/{index}/{item.key}")) for item in others}
        for index in range(samples)
    )
    return [combination | tail for combination in drawn for tail in grid(repeated)]
