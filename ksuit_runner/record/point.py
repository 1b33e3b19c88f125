"""What is logged at an update: a point of a metric, or a file; and the time that it is stamped with."""

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


class LoggedFile(NamedTuple):
    """What was logged of another kind than a number: an image, a table, a text ...

    Attributes:
        key: Its kind and its name, such as ``images/reconstructions``.
        path: Its file, below the artifact root of the run.
        step: Update at which it was logged.
        timestamp: When it was first logged, in ms since 1970.
    """

    key: str
    path: str
    step: int
    timestamp: int

    @property
    def kind(self) -> str:
        """Its kind: ``images``, ``figures``, ``histograms``, ``tables``, ``texts`` or ``files``."""
        return self.key.partition("/")[0]


def now() -> int:
    """Return the present time as timestamps have it: in ms since 1970."""
    return time.time_ns() // 1_000_000
