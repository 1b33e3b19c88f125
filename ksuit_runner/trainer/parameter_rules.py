"""Parameter rules: options of the optimizer by name and shape of the parameter, and the groups that result."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ksuit_runner.errors import ConfigError, did_you_mean

ParameterRules = Mapping[str, Mapping[str, Any]]

SELECTORS = ("match", "max_ndim", "optional")
"""Keys of a rule that select its parameters; all others are options."""

LOSS = "loss."
"""Prefix of the names of the loss module's parameters."""


def named_parameters(model: nn.Module, loss: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Return all parameters, by name, that can have a gradient, now or once they thaw.

    Args:
        model: The module to train.
        loss: The loss module; the names of its own parameters begin with ``loss.``.

    Raises:
        ConfigError: A parameter of the model has the name of one of the loss.
    """
    named = dict(model.named_parameters())
    known = set(map(id, named.values()))
    for name, parameter in () if loss is None else loss.named_parameters(prefix=LOSS.removesuffix(".")):
        if id(parameter) in known:
            continue
        if name in named:
            raise ConfigError(f"the loss also has a parameter named '{name}'; rename the model's", path="model")
        named[name] = parameter
    return {name: item for name, item in named.items() if item.is_floating_point() or item.is_complex()}


def parameter_groups(named: Mapping[str, nn.Parameter], rules: ParameterRules) -> list[dict[str, Any]]:
    """Return groups of the parameters that share all options, each with its ``name`` and its named ``params``.

    Frozen ones are included, so that the groups of a run do not depend on what has thawed.

    Raises:
        ConfigError: A rule has no ``match`` or ``max_ndim``, or it matches no parameter.
    """
    selected = {rule: _select(rule, spec, named) for rule, spec in rules.items()}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named.items():
        applied = [rule for rule, names in selected.items() if name in names]
        options = {key: value for rule in applied for key, value in rules[rule].items() if key not in SELECTORS}
        label = "+".join(applied) or "default"
        group = groups.setdefault(label, {"params": [], "name": label, **options})
        group["params"].append((name, parameter))
    return list(groups.values())


def _select(rule: str, spec: Mapping[str, Any], named: Mapping[str, nn.Parameter]) -> set[str]:
    path, patterns, max_ndim = f"trainer.parameter_rules.{rule}", spec.get("match"), spec.get("max_ndim")
    if patterns is None and max_ndim is None:
        raise ConfigError(
            f"a list of patterns of names is needed, or max_ndim ({did_you_mean('match', spec)})", path=f"{path}.match"
        )
    if patterns is not None and (not isinstance(patterns, Sequence) or isinstance(patterns, str)):
        raise ConfigError(f"a list of patterns of names is needed, not {patterns!r}", path=f"{path}.match")
    found = {
        name
        for name, parameter in named.items()
        if (patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns))
        and (max_ndim is None or parameter.ndim <= max_ndim)
    }
    if not found and not spec.get("optional", False):
        raise ConfigError(f"it matches no parameter. {_hint(patterns, named)}".rstrip(), path=path)
    return found


def _hint(patterns: Sequence[str] | None, named: Mapping[str, nn.Parameter]) -> str:
    """Suggest the nearest name to the first pattern that matches nothing: a parameter, or a module that has some."""
    missing = [item for item in patterns or () if not any(fnmatchcase(name, item) for name in named)]
    if not missing:
        return "optional: true allows that"
    parts = {part for name in named for part in name.split(".")}
    prefixes = {".".join(name.split(".")[:end]) for name in named for end in range(1, name.count(".") + 2)}
    return did_you_mean(missing[0].strip("*."), parts | prefixes, longest=12)
