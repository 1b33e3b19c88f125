"""Which parameters share which options of the optimizer: rules by name and shape, and the groups that follow."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ksuit_runner.errors import ConfigError, did_you_mean

ParameterRules = Mapping[str, Mapping[str, Any]]

SELECTORS = ("match", "max_ndim", "optional")
"""Keys of a rule that say what it holds for; all others are options."""

LOSS = "loss."
"""What the names of the loss module's parameters begin with."""


def named_parameters(model: nn.Module, loss: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Return by name all parameters that can have a gradient, now or once they thaw.

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
            raise ConfigError(
                f"the loss has a parameter of the name '{name}' too; give the model's another one", path="model"
            )
        named[name] = parameter
    return {name: item for name, item in named.items() if item.is_floating_point() or item.is_complex()}


def parameter_groups(named: Mapping[str, nn.Parameter], rules: ParameterRules) -> list[dict[str, Any]]:
    """Return groups of the parameters that share all options, each with its ``name`` and its named ``params``.

    What is frozen is grouped too, so that the groups of a run are the same whatever has thawed by then.

    Raises:
        ConfigError: A rule does not say what it holds for, or it holds for nothing.
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
    place, patterns, most = f"trainer.parameter_rules.{rule}", spec.get("match"), spec.get("max_ndim")
    if patterns is None and most is None:
        raise ConfigError(
            f"a list of patterns of names is needed, or max_ndim ({did_you_mean('match', spec)})", path=f"{place}.match"
        )
    if patterns is not None and (not isinstance(patterns, Sequence) or isinstance(patterns, str)):
        raise ConfigError(f"a list of patterns of names is needed, not {patterns!r}", path=f"{place}.match")
    found = {
        name
        for name, parameter in named.items()
        if (patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns))
        and (most is None or parameter.ndim <= most)
    }
    if not found and not spec.get("optional", False):
        raise ConfigError(f"it matches no parameter. {_hint(patterns, named)}".rstrip(), path=place)
    return found


def _hint(patterns: Sequence[str] | None, named: Mapping[str, nn.Parameter]) -> str:
    """Name what is nearest to the first pattern that nothing has: a parameter, or a module that holds some."""
    missing = [item for item in patterns or () if not any(fnmatchcase(name, item) for name in named)]
    if not missing:
        return "optional: true lets it"
    parts = {part for name in named for part in name.split(".")}
    prefixes = {".".join(name.split(".")[:end]) for name in named for end in range(1, name.count(".") + 2)}
    return did_you_mean(missing[0].strip("*."), parts | prefixes, longest=12)
