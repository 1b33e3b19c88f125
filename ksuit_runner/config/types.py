"""Types that say what a plain value of a config has to be, or refers to; and the check of numbers by these types."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, NewType, TypeAlias

from ksuit_runner.errors import ConfigError, short

DatasetKey = NewType("DatasetKey", str)
"""A key of ``data.datasets``."""

MetricKey = NewType("MetricKey", str)
"""Key of a metric that some callback of the run logs."""

Duration: TypeAlias = str
"""A text such as ``90m`` or ``1d 12h``, see ``config.duration``."""

PositiveInt: TypeAlias = int
"""A whole number of at least 1."""

NonNegativeInt: TypeAlias = int
"""A whole number of at least 0."""

TwoOrMore: TypeAlias = int
"""A whole number of at least 2."""

PositiveFloat: TypeAlias = float
"""A number above 0."""

NonNegativeFloat: TypeAlias = float
"""A number of at least 0."""

AboveOne: TypeAlias = float
"""A number above 1."""

FractionUpToOne: TypeAlias = float
"""A number from 0 to 1."""

FractionBelowOne: TypeAlias = float
"""A number from 0 to below 1."""

OpenFraction: TypeAlias = float
"""A number between 0 and 1, and neither of these."""


class NumberRange(NamedTuple):
    """What one of these types of numbers allows.

    Attributes:
        is_whole: Whether the numbers are whole ones.
        contains: Whether a number is in the range.
        words: The range in words, after ``noun`` or several of it.
    """

    is_whole: bool
    contains: Callable[[float], bool]
    words: str

    @property
    def noun(self) -> str:
        """What one of the numbers is called, before ``words``."""
        return "whole number" if self.is_whole else "number"

    def fits(self, value: Any) -> bool:
        """Whether a value is such a number, also one of numpy; true and false are none."""
        is_number = isinstance(value, Integral if self.is_whole else Real) and not isinstance(value, bool)
        return is_number and self.contains(value)


NUMBER_RANGES: Mapping[str, NumberRange] = {
    "PositiveInt": NumberRange(True, lambda number: number >= 1, "of at least 1"),
    "NonNegativeInt": NumberRange(True, lambda number: number >= 0, "of at least 0"),
    "TwoOrMore": NumberRange(True, lambda number: number >= 2, "of at least 2"),
    "PositiveFloat": NumberRange(False, lambda number: number > 0, "above 0"),
    "NonNegativeFloat": NumberRange(False, lambda number: number >= 0, "of at least 0"),
    "AboveOne": NumberRange(False, lambda number: number > 1, "above 1"),
    "FractionUpToOne": NumberRange(False, lambda number: 0 <= number <= 1, "from 0 to 1"),
    "FractionBelowOne": NumberRange(False, lambda number: 0 <= number < 1, "from 0 to below 1"),
    "OpenFraction": NumberRange(False, lambda number: 0 < number < 1, "between 0 and 1"),
}
"""Name of a type of numbers -> what it allows: an annotation is read as text."""


def check_numbers(kind: str, path: str = "", /, **numbers: float | Sequence[float] | None) -> None:
    """Check arguments of a constructor that Python code calls as well, where no check of a config has seen them.

    Args:
        kind: Name of the type of numbers that the arguments are annotated with.
        path: Config path of what is constructed; by default whoever constructs it adds the path to an error.
        **numbers: The arguments by name: numbers, lists of them, or None.

    Raises:
        ConfigError: One of them is no such number.
    """
    allowed = NUMBER_RANGES[kind]
    for name, given in numbers.items():
        for number in given if isinstance(given, Sequence) else (given,):
            if number is not None and not allowed.fits(number):
                problem = f"a {allowed.noun} {allowed.words} is needed, not {short(number)}"
                raise ConfigError(problem, path=f"{path}.{name}") if path else ConfigError(f"{name}: {problem}")
