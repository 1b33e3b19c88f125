"""Types that tell the check of a config what a plain value has to be, or refers to."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, NewType, TypeAlias

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
        words: The range in words, after ``a number`` or ``numbers``.
    """

    is_whole: bool
    contains: Callable[[float], bool]
    words: str


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
