"""What a sweep varies: parameters with the values that they take, and the jobs that follow from them."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from hydra.core.override_parser.types import Glob, IntervalSweep, Override

from ksuit_runner.config.compose import choices, groups
from ksuit_runner.config.overrides import bare_name, parse, to_text
from ksuit_runner.errors import ConfigError

SEED = "seed"
"""The key that is never drawn: every draw is done with every seed."""

Combination = dict[str, str]
"""Key -> value, both as an override has them."""


@dataclass(frozen=True)
class NumberRange:
    """All numbers between two.

    Attributes:
        low: The smallest one.
        high: The largest one.
        log: Whether their logarithms are spread evenly.
        whole: Whether only whole numbers count.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, generator: random.Random) -> str:
        """Return a number as an override has it, with six digits."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = generator.uniform(low, high)
        return self.text(math.exp(value) if self.log else value)

    def text(self, value: float) -> str:
        """Return a number of the interval as an override has it."""
        return str(round(value)) if self.whole else repr(min(max(float(f"{value:.6g}"), self.low), self.high))


@dataclass(frozen=True)
class SweepParameter:
    """Something that a sweep varies.

    Attributes:
        key: What an override calls it, such as ``optimizer.lr``, ``model`` or ``+callbacks``.
        values: The values that it takes; empty for an interval.
        interval: The interval that it is drawn from.
    """

    key: str
    values: tuple[str, ...] = ()
    interval: NumberRange | None = None

    def draw(self, generator: random.Random) -> str:
        """Return one value, each as likely as the others."""
        return self.interval.draw(generator) if self.interval else generator.choice(self.values)

    def extremes(self) -> tuple[str, ...]:
        """Return the values that have to compose before anything is drawn: all, or both ends of the interval."""
        if self.interval is None:
            return self.values
        return self.interval.text(self.interval.low), self.interval.text(self.interval.high)


def read_parameters(params: Mapping[str, Any], seed: int) -> list[SweepParameter]:
    """Read what varies.

    Args:
        params: Key -> its values: a list, or text in Hydra's grammar such as ``1,2``, ``range(0,3)``, ``glob(*)`` or
            ``tag(log, interval(1e-4, 1e-1))``.
        seed: Seed of ``shuffle``.

    Raises:
        ConfigError: A value cannot be read, or a parameter has none.
    """
    return [_read(str(key), value, seed) for key, value in params.items()]


def _read(key: str, value: Any, seed: int) -> SweepParameter:
    place = f"sweep.params.{key}"
    if isinstance(value, list) and not value:
        raise ConfigError("a value is needed, the list is empty", path=place)
    if not isinstance(value, str):
        return SweepParameter(key, _texts(place, value if isinstance(value, list) else [value]))
    override = _parse(place, f"{key}={value}")
    if not override.is_sweep_override():
        return SweepParameter(key, (value,))
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        return SweepParameter(key, interval=_interval(place, sweep))
    if isinstance(sweep, Glob):
        return SweepParameter(key, _matching(place, key, sweep))
    with _seeded(f"{seed}/{key}"):  # for shuffle()
        return SweepParameter(key, tuple(override.sweep_string_iterator()))


def _texts(place: str, values: list[Any]) -> tuple[str, ...]:
    try:
        return tuple(map(to_text, values))
    except ConfigError as error:
        error.locate(place)
        raise


def _parse(place: str, override: str) -> Override:
    try:
        return parse(override)
    except ConfigError as error:
        hint = "Text is in the grammar of overrides; in a list it stands for itself"
        raise ConfigError(f"{error}\n{hint}", path=place) from None


def _interval(place: str, sweep: IntervalSweep) -> NumberRange:
    low, high = sweep.start, sweep.end
    assert low is not None and high is not None  # the grammar demands both
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"the ends of an interval have to be finite and in order, not {low} and {high}", path=place)
    log = "log" in sweep.tags
    if log and low <= 0:
        raise ConfigError(f"a logarithmic interval begins above 0, not at {low}", path=place)
    return NumberRange(float(low), float(high), log, whole=isinstance(low, int))


def _matching(place: str, key: str, glob: Glob) -> tuple[str, ...]:
    group = bare_name(key)
    if group not in groups():
        raise ConfigError(f"glob() chooses files of a group, and there is no group '{group}'", path=place)
    found = tuple(map(to_text, glob.filter(choices(group))))
    if not found:
        raise ConfigError(f"no file of the group '{group}' matches", path=place)
    return found


@contextmanager
def _seeded(key: str) -> Iterator[None]:
    """Let what draws from Python's own generator draw the same every time."""
    state = random.getstate()
    random.seed(key)
    try:
        yield
    finally:
        random.setstate(state)


def grid(parameters: Sequence[SweepParameter]) -> list[Combination]:
    """Return every combination; the last parameter changes fastest.

    Raises:
        ConfigError: A parameter is an interval, which has no end of values.
    """
    for parameter in parameters:
        if parameter.interval is not None:
            key = f"sweep.params.{parameter.key}"
            raise ConfigError(f"{key}: an interval is drawn from: sweep.method=random sweep.samples=20")
    keys = [parameter.key for parameter in parameters]
    return [dict(zip(keys, values, strict=True)) for values in product(*(item.values for item in parameters))]


def draw(parameters: Sequence[SweepParameter], samples: int, seed: int) -> list[Combination]:
    """Return random combinations, the same for the same seed; each is done with every value of ``seed``.

    Draw ``i`` of a parameter depends on (seed, i, key) only: more samples, or another parameter, leave it as it is.
    """
    seeds = [item for item in parameters if item.key == SEED]
    others = [item for item in parameters if item.key != SEED]
    drawn = (
        {item.key: item.draw(random.Random(f"{seed}/{index}/{item.key}")) for item in others}
        for index in range(samples)
    )
    return [combination | tail for combination in drawn for tail in grid(seeds)]
