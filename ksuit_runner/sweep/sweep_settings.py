"""The settings of a sweep: the node `sweep` of the config, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import EnumType, StrEnum
from typing import Any, get_type_hints

from ksuit_runner.config.check.known_keys import not_global
from ksuit_runner.config.check.mismatch import mismatch
from ksuit_runner.config.types import PositiveInt
from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.sweep.parameters import SEED

MAY_CHANGE = ("fail_fast", "retry", "on_change")
"""Settings that a resume may change; the jobs follow from all others."""


class Method(StrEnum):
    """How the jobs follow from the parameters."""

    GRID = "grid"
    RANDOM = "random"
    TPE = "tpe"


class RankedValue(StrEnum):
    """Which value of the objective a job is ranked by."""

    LAST = "last"
    BEST = "best"


class OnChange(StrEnum):
    """What a resume does if the sweep's YAML has changed."""

    REFUSE = "refuse"
    KEEP = "keep"


@dataclass(frozen=True)
class SweepSettings:
    """How the jobs of a sweep follow from its parameters, and what happens when one fails.

    Attributes:
        params: Config path or group -> its values.
        method: ``grid`` runs every combination, ``random`` draws some, ``tpe`` lets Optuna search.
        samples: How many combinations are drawn.
        seed: Seed of what is drawn.
        value: Whether a job is ranked by the ``last`` or the ``best`` value of the objective.
        mean_over: Parameters whose values repeat a job, such as seeds and folds: jobs that differ only in these make
            one mean, and a random draw is run with every value of them.
        published: Value of a parameter -> published figure, shown beside the mean.
        fail_fast: Whether the first failed job ends the sweep.
        retry: Whether a resume retries failed jobs.
        on_change: What a resume does if the sweep's YAML has changed: ``refuse``, or ``keep`` the plan.
    """

    params: dict[str, Any] = field(default_factory=dict)
    method: Method = Method.GRID
    samples: PositiveInt | None = None
    seed: int = 0
    value: RankedValue = RankedValue.LAST
    mean_over: list[str] = field(default_factory=lambda: [SEED])
    published: dict[str, float] = field(default_factory=dict)
    fail_fast: bool = False
    retry: bool = True
    on_change: OnChange = OnChange.REFUSE


def read_settings(node: Mapping[str, Any], objective: str | None) -> SweepSettings:
    """Check the node ``sweep`` and return it.

    Args:
        node: The node, as plain values.
        objective: Metric that the jobs are ranked by.

    Raises:
        ConfigError: A key is unknown, a value does not fit, or two values contradict each other.
    """
    hints = get_type_hints(SweepSettings)
    annotations = {item.name: _annotation(hints[item.name], str(item.type)) for item in fields(SweepSettings)}
    mappings = {key for key, text in annotations.items() if text.startswith("dict")}
    node = {key: value for key, value in node.items() if value is not None or key not in mappings}
    for key, value in node.items():
        if key == "sweep" or (key not in annotations and "sweep" in node):
            raise not_global("sweep")
        if key not in annotations:
            raise ConfigError(f"there is no such setting. {did_you_mean(str(key), annotations)}", path=f"sweep.{key}")
        if problem := mismatch(str(value) if isinstance(value, StrEnum) else value, annotations[key]):
            raise ConfigError(problem, path=f"sweep.{key}")
    kinds = {name: kind for name, kind in hints.items() if isinstance(kind, EnumType)}
    settings = SweepSettings(**{key: kinds[key](value) if key in kinds else value for key, value in node.items()})
    if settings.method is Method.GRID and settings.samples is not None:
        raise ConfigError("a grid draws nothing; write sweep.method=random or sweep.method=tpe", path="sweep.samples")
    if settings.method is not Method.GRID and settings.samples is None:
        raise ConfigError(f"sweep.method={settings.method} needs a number of samples", path="sweep.samples")
    if settings.method is Method.TPE and objective is None:
        raise ConfigError("an Optuna search needs the metric that it optimizes", path="objective")
    return settings


def _annotation(hint: Any, text: str) -> str:
    """Return the annotation that a value from YAML is checked by: of an enum, its values."""
    return f"Literal{[str(item) for item in list[StrEnum](hint)]}" if isinstance(hint, EnumType) else text
