"""Parameter rules: options of the optimizer by name and shape of the parameter, and the groups that result."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.tensors.name_patterns import compile_pattern, matches_any, matching

ParameterRules = Mapping[str, Mapping[str, Any]]

SELECTORS = ("match", "min_ndim", "max_ndim", "layers", "decay", "optional")
"""Keys of a rule that select its parameters, and those that are no options of the optimizer."""

FACTORS = ("lr_factor", "layer_factor")
"""Factors on a group's learning rate: from the rule that names one, and from a rule with layers."""

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


def parameter_groups(
    named: Mapping[str, nn.Parameter], rules: ParameterRules, among: Mapping[str, nn.Parameter] | None = None
) -> list[dict[str, Any]]:
    """Return groups of the parameters that share all options, each with its ``name`` and its named ``params``.

    Frozen ones are included, so that the groups of a run do not depend on what has thawed.

    Args:
        named: The parameters to group, by name.
        rules: The rules, see ``build_optimizer``.
        among: All parameters that the rules are for, where ``named`` are some of them.

    Raises:
        ConfigError: A rule selects by nothing, or it matches no parameter.
    """
    selected = {rule: _select(rule, spec, among or named) for rule, spec in rules.items()}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named.items():
        options: dict[str, Any] = {}
        labels = []
        for rule, found in selected.items():
            if name in found:
                options |= {key: value for key, value in rules[rule].items() if key not in SELECTORS} | found[name]
                labels.append(f"{rule}.{found[name]['layer']}" if "layer" in found[name] else rule)
        options.pop("layer", None)
        label = "+".join(labels) or "default"
        group = groups.setdefault(label, {"params": [], "name": label, **options})
        group["params"].append((name, parameter))
    return list(groups.values())


def select_parameters(spec: Mapping[str, Any], named: Mapping[str, nn.Parameter], path: str) -> list[str]:
    """Return the names that patterns and numbers of dimensions select, all of them if none is given.

    Args:
        spec: May have ``match`` (patterns of names), ``min_ndim`` and ``max_ndim``.
        named: The parameters by name.
        path: Config path of the specification, for messages.

    Raises:
        ConfigError: ``match`` is no list of patterns, or one of the others no whole number.
    """
    patterns, least, most = spec.get("match"), spec.get("min_ndim"), spec.get("max_ndim")
    if patterns is not None and (not isinstance(patterns, Sequence) or isinstance(patterns, str)):
        raise ConfigError(f"a list of patterns of names is needed, not {patterns!r}", path=f"{path}.match")
    for key in ("min_ndim", "max_ndim"):
        if not isinstance(spec.get(key), int | None):
            raise ConfigError(f"a number of dimensions is needed, not {spec[key]!r}", path=f"{path}.{key}")
    return [
        name
        for name, parameter in named.items()
        if (patterns is None or matches_any(name, patterns))
        and (least is None or parameter.ndim >= least)
        and (most is None or parameter.ndim <= most)
    ]


def _select(rule: str, spec: Mapping[str, Any], named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Return the parameters that a rule selects, each with what the rule says about it alone."""
    path = f"trainer.parameter_rules.{rule}"
    if not spec.keys() & {"match", "min_ndim", "max_ndim", "layers"}:
        raise ConfigError(
            f"a list of patterns of names is needed, or max_ndim ({did_you_mean('match', spec)})", path=f"{path}.match"
        )
    factor = spec.get("lr_factor", 1.0)
    if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
        raise ConfigError(f"a factor of at least 0 is needed, not {factor!r}", path=f"{path}.lr_factor")
    found: dict[str, dict[str, Any]] = {name: {} for name in select_parameters(spec, named, path)}
    patterns = spec.get("match")
    if "layers" in spec or "decay" in spec:
        patterns = [spec["layers"]] if isinstance(spec.get("layers"), str) else spec.get("layers")
        found = _layers(path, patterns, spec.get("decay"), found)
        unused = [item for item in patterns or () if not matching(item, named)]
        if unused and found and not spec.get("optional", False):  # the others would be other layers without it
            raise ConfigError(f"'{unused[0]}' matches no parameter. {hint(unused, named)}".rstrip(), path=path)
    if not found and not spec.get("optional", False):
        raise ConfigError(f"it matches no parameter. {hint(patterns, named)}".rstrip(), path=path)
    return found


def _layers(path: str, patterns: Any, decay: Any, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return the parameters of the layers, each with the number of its layer and the factor on its learning rate."""
    numbers = layer_numbers(path, patterns, names)
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 < decay <= 1:
        raise ConfigError(
            f"a factor above 0 and at most 1 is needed, such as 0.75, not {decay!r}", path=f"{path}.decay"
        )
    count = max(numbers.values(), default=-1) + 1
    return {name: {"layer": number, "layer_factor": decay ** (count - number)} for name, number in numbers.items()}


def layer_numbers(path: str, patterns: Any, names: Collection[str]) -> dict[str, int]:
    """Return the parameters that belong to layers, each with the number of its layer, from the input on.

    Args:
        path: Config path of the specification, for messages.
        patterns: Patterns of names, from the input on, in which ``{}`` stands for the number of a layer.
        names: The names of the parameters.

    Raises:
        ConfigError: These are no patterns.
    """
    if not isinstance(patterns, Sequence) or not all(isinstance(item, str) for item in patterns) or not patterns:
        raise ConfigError(
            'patterns of the layers are needed, from the input on, such as "blocks.{}.*", where {} stands for the '
            "number of a layer",
            path=f"{path}.layers",
        )
    forms = [compile_pattern(pattern) for pattern in patterns]
    positions: dict[str, tuple[int, ...]] = {}
    for name in names:
        matches = ((order, form.match(name)) for order, form in enumerate(forms))
        first = next(((order, match) for order, match in matches if match), None)
        if first is not None:
            positions[name] = (first[0], *map(int, first[1].groups()))
    depth = {position: layer for layer, position in enumerate(sorted(set(positions.values())))}
    return {name: depth[position] for name, position in positions.items()}


def hint(patterns: Sequence[str] | None, named: Mapping[str, nn.Parameter]) -> str:
    """Suggest the nearest name to the first pattern that matches nothing: a parameter, or a module that has some."""
    missing = [item for item in patterns or () if not matching(item, named)]
    if not missing:
        return "optional: true allows that"
    parts = {part for name in named for part in name.split(".")}
    prefixes = {".".join(name.split(".")[:end]) for name in named for end in range(1, name.count(".") + 2)}
    return did_you_mean(missing[0].replace("{}", "*").strip("*."), parts | prefixes, longest=12)
