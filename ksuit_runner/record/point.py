"""A point of a metric, and the time that it is stamped with."""

import time
from typing import NamedTuple


class Point(NamedTuple):
    """One value of one metric.

    Attributes:
        key: Name of the metric.
        value: Its value, NaN and infinities included.
        step: Update at which it was logged.
        timestamp: When it was first logged, in ms since 1970. It is part of the point's identity, so it never changes.
    """

    key: str
    value: float
    step: int
    timestamp: int


def now() -> int:
    """Return the present time as timestamps have it: in ms since 1970."""
    return time.time_ns() // 1_000_000
