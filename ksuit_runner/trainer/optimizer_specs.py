"""How the optimizers of a run are specified: what builds each, and which parameters it takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ksuit_runner.errors import ConfigError
from ksuit_runner.schedule import Schedule
from ksuit_runner.trainer.parameter_rules import hint, select_parameters

ONLY = ""
"""Name of a run's only optimizer."""


@dataclass(frozen=True)
class OptimizerSpec:
    """One of several optimizers: how it is built, over which parameters, and what it has of its own.

    Attributes:
        build: Builds the optimizer from parameters: a class of ``torch.optim`` with its arguments.
        match: Patterns of the names of its parameters.
        min_ndim: Smallest number of dimensions of its parameters.
        max_ndim: Largest number. Without any of these three it takes the parameters that the others leave.
        schedule: Builds its learning-rate schedule; None for that of the run.
        weight_decay_schedule: Builds the schedule of its weight decay; None for that of the run.
        clip_norm: Largest norm of its own gradients; None for that of the run, which is one of all gradients together.
        clip_value: Largest absolute value of an element of its gradients; None for that of the run.
    """

    build: Callable[..., Optimizer]
    match: Sequence[str] | None = None
    min_ndim: int | None = None
    max_ndim: int | None = None
    schedule: Callable[..., Schedule] | None = None
    weight_decay_schedule: Callable[..., Schedule] | None = None
    clip_norm: float | None = None
    clip_value: float | None = None

    @property
    def selectors(self) -> dict[str, Any]:
        """What selects its parameters."""
        given = {"match": self.match, "min_ndim": self.min_ndim, "max_ndim": self.max_ndim}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class SharedSettings:
    """What the optimizers of a run have in common.

    Attributes:
        schedule: Builds the learning-rate schedule of those without one of their own.
        weight_decay_schedule: Builds the schedule of the weight decay of those without one of their own, or None.
        clip_value: Largest absolute value of an element of the gradients of those without a limit of their own.
        rules: Options by parameter, see ``build_optimizer``; None takes a rule out.
        lr_scale: Factor on all learning rates.
        turns: Names of those that step at one update after the other, see ``Turns``.
    """

    schedule: Callable[..., Schedule]
    weight_decay_schedule: Callable[..., Schedule] | None = None
    clip_value: float | None = None
    rules: Mapping[str, Mapping[str, Any] | None] | None = None
    lr_scale: float = 1.0
    turns: Sequence[str] | None = None


def config_path(name: str) -> str:
    """Return the config path of an optimizer, by its name."""
    return f"optimizer.{name}".rstrip(".")


def assign_parameters(specs: Mapping[str, OptimizerSpec], named: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """Return the names of the parameters of each optimizer.

    Raises:
        ConfigError: A parameter is matched by none of the optimizers or by two, or one of them matches nothing.
    """
    rest = [name for name, spec in specs.items() if not spec.selectors]
    if len(rest) > 1:
        raise ConfigError(
            f"it needs match, min_ndim or max_ndim, as {config_path(rest[0])} takes what the others leave",
            path=config_path(rest[1]),
        )
    found = {
        name: select_parameters(spec.selectors, named, config_path(name)) if spec.selectors else []
        for name, spec in specs.items()
    }
    owners: dict[str, list[str]] = {parameter: [] for parameter in named}
    for name, parameters in found.items():
        for parameter in parameters:
            owners[parameter].append(name)
    for parameter, names in owners.items():
        if len(names) > 1:
            raise ConfigError(f"'{names[0]}' and '{names[1]}' both match the parameter '{parameter}'", path="optimizer")
        if not names and not rest:
            raise ConfigError(
                f"none of {', '.join(specs)} matches the parameter '{parameter}'; one without match, min_ndim and "
                "max_ndim takes what the others leave",
                path="optimizer",
            )
        if not names:
            found[rest[0]].append(parameter)
    for name, parameters in found.items():
        if not parameters and named:
            raise ConfigError(f"it matches no parameter. {hint(specs[name].match, named)}", path=config_path(name))
    return found
