"""Types that tell the check of a config what a plain value has to be, or refers to."""

from typing import NewType, TypeAlias

DatasetKey = NewType("DatasetKey", str)
"""A key of ``data.datasets``."""

MetricKey = NewType("MetricKey", str)
"""Key of a metric that some callback of the run logs."""

PositiveInt: TypeAlias = int
"""A whole number of at least 1."""

NonNegativeInt: TypeAlias = int
"""A whole number of at least 0."""
