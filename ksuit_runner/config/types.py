"""Types that tell the check of a config what a plain string refers to."""

from typing import NewType

DatasetKey = NewType("DatasetKey", str)
"""A key of ``data.datasets``."""

MetricKey = NewType("MetricKey", str)
"""Key of a metric that some callback of the run logs."""
