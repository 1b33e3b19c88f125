"""Whether all jobs of a sweep log what it ranks them by; each job's own config was checked before."""

from collections.abc import Mapping, Sequence
from typing import Any

from ksuit_runner.errors import ConfigError
from ksuit_runner.sweep.job_config import overrides_of
from ksuit_runner.sweep.plan import Job


def check_objective(objective: str | None, jobs: Sequence[Job]) -> None:
    """Check that no job is without the objective of the sweep, where that shows in how the jobs differ.

    Raises:
        ConfigError: What the objective refers to differs between jobs; or it is a metric of averaged weights, as in
            ``accuracy/validation/ema``, and only some jobs have the callback that averages them.
    """
    if objective is None:
        return
    weights = objective.rpartition("/")[2]
    averages = any(_has_average(job.config, weights) for job in jobs)
    for job in jobs:
        own = job.config.get("objective", objective)
        reason = f"its objective is '{own}'" if own != objective else f"it has no callback '{weights}'"
        if own != objective or (averages and not _has_average(job.config, weights)):
            raise ConfigError(
                f"a job does not log '{objective}', and could not be ranked: {reason}\n"
                f"This is the job {' '.join(overrides_of(job.combination))}",
                path="objective",
            )


def _has_average(config: Mapping[str, Any], weights: str) -> bool:
    """Whether a callback has the name of averaged weights, or the first part of it, as one of several averages."""
    callbacks = config.get("callbacks") or {}
    return any(weights == name or weights.startswith(f"{name}_") for name in callbacks)
