"""The settings of a sweep: the node `sweep` of the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ksuit_runner.config.check.annotation import mismatch
from ksuit_runner.errors import ConfigError, did_you_mean

MAY_CHANGE = ("fail_fast", "retry", "on_change")
"""What a resume may say anew; all else makes the jobs what they are."""


@dataclass(frozen=True)
class SweepSettings:
    """How the jobs of a sweep follow from its parameters, and what happens when one fails.

    Attributes:
        params: Key of the config, or group -> the values that it takes.
        method: ``grid`` does every combination, ``random`` draws some, ``tpe`` lets Optuna look for good ones.
        samples: How many combinations are drawn.
        seed: Seed of what is drawn.
        value: Whether a job counts by the ``last`` or the ``best`` value of its objective.
        published: Value of a parameter -> figure from a paper, shown beside the mean over seeds.
        fail_fast: Whether the first failed job ends the sweep.
        retry: Whether a resume tries failed jobs again.
        on_change: What a resume does if the sweep's YAML has changed: ``refuse``, or ``keep`` to what was planned.
    """

    params: dict[str, Any] = field(default_factory=dict)
    method: Literal["grid", "random", "tpe"] = "grid"
    samples: int | None = None
    seed: int = 0
    value: Literal["last", "best"] = "last"
    published: dict[str, float] = field(default_factory=dict)
    fail_fast: bool = False
    retry: bool = True
    on_change: Literal["refuse", "keep"] = "refuse"


def read_settings(node: Mapping[str, Any], objective: str | None) -> SweepSettings:
    """Check the node ``sweep`` and return it.

    Args:
        node: The node, as plain values.
        objective: Metric that the jobs are ranked by.

    Raises:
        ConfigError: A key is unknown, a value does not fit, or two of them do not go together.
    """
    annotations = {item.name: str(item.type) for item in fields(SweepSettings)}
    for key, value in node.items():
        if key not in annotations:
            raise ConfigError(f"there is no such setting. {did_you_mean(str(key), annotations)}", path=f"sweep.{key}")
        if problem := mismatch(value, annotations[key]):
            raise ConfigError(problem, path=f"sweep.{key}")
    settings = SweepSettings(**node)
    if settings.method == "grid" and settings.samples is not None:
        raise ConfigError(
            "a grid has no samples; sweep.method=random or sweep.method=tpe draws them", path="sweep.samples"
        )
    if settings.method != "grid" and (settings.samples is None or settings.samples < 1):
        raise ConfigError(f"sweep.method={settings.method} needs to know how many, 1 or more", path="sweep.samples")
    if settings.method == "tpe" and objective is None:
        raise ConfigError("an Optuna search needs the metric that it makes better", path="objective")
    return settings
