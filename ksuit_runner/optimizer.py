"""Optimizers: parameter groups by name, fused kernels where there are any, and a state that is kept by name."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ksuit_runner.errors import CheckpointError, ConfigError, suggest

ParameterRules = Mapping[str, Mapping[str, Any]]

FUSED_DEVICES = ("cpu", "cuda", "mps")
# How a step is computed, not what: a checkpoint may go on with other kernels on another device.
KERNEL_OPTIONS = ("params", "param_names", "name", "fused", "foreach", "capturable", "differentiable")


def build_optimizer(
    factory: Callable[..., Optimizer], model: nn.Module, rules: ParameterRules, device: torch.device
) -> Optimizer:
    """Build the optimizer over the model's trainable parameters, in groups of those that share all options.

    Args:
        factory: The optimizer's class with its arguments, but without parameters.
        model: The module to train.
        rules: By name of the rule: ``match``, patterns of parameter names, and what holds for them: ``lr_factor``, a
            factor on the learning rate, and any option of the optimizer. Of several rules the last one wins.
        device: Device of the parameters; fused kernels are used where the optimizer has them for it.

    Raises:
        ConfigError: A rule has no patterns or an option that the optimizer does not know, or the model has nothing to
            train.
    """
    _keep_compiler_out()
    groups = _parameter_groups(model, rules)
    factors = [group.pop("lr_factor", 1.0) for group in groups]
    optimizer = _construct(factory, groups, device)
    _check_options(optimizer, rules)
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["lr"] *= factor
    return optimizer


def _keep_compiler_out() -> None:
    """Call an optimizer's methods without the import of torch's compiler, which takes over a second.

    These methods are wrapped so that the compiler leaves them alone, and the wrapper imports it to say so. No compiled
    code calls them here.
    """
    if "torch._dynamo" in sys.modules:
        return
    for method in (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict):
        inner = getattr(method, "__wrapped__", None)
        if inner is not None:
            inner.__dynamo_disable = inner  # where the wrapper keeps what it calls


def _construct(factory: Callable[..., Optimizer], groups: list[dict[str, Any]], device: torch.device) -> Optimizer:
    given = getattr(factory, "keywords", {})
    offered = inspect.signature(getattr(factory, "func", factory)).parameters
    is_open = "fused" in offered and not {"fused", "foreach", "differentiable"} & set(given)
    # Newer versions of torch find out about other types of numbers in the first step only.
    if is_open and device.type in FUSED_DEVICES and all(_is_real(group) for group in groups):
        try:
            return factory([dict(group) for group in groups], fused=True)  # it writes its options into them
        except (RuntimeError, ValueError):  # this optimizer has no fused kernel for this device
            pass
    try:
        return factory(groups)
    except ValueError as error:  # such as a negative learning rate
        raise ConfigError(f"optimizer: {error}") from error


def _is_real(group: Mapping[str, Any]) -> bool:
    return all(parameter.is_floating_point() for _, parameter in group["params"])


def _check_options(optimizer: Optimizer, rules: ParameterRules) -> None:
    valid = {"match", "lr_factor", *optimizer.defaults}
    for rule, spec in rules.items():
        for option in spec.keys() - valid:
            name = type(optimizer).__name__
            raise ConfigError(f"trainer.parameter_rules.{rule}.{option}: {name} has none. {suggest(option, valid)}")


def _parameter_groups(model: nn.Module, rules: ParameterRules) -> list[dict[str, Any]]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not named:
        raise ConfigError("model: it has no parameter to train")
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named.items():
        applied = [rule for rule, spec in rules.items() if _matches(name, rule, spec)]
        options = {key: value for rule in applied for key, value in rules[rule].items() if key != "match"}
        label = "+".join(applied) or "default"
        group = groups.setdefault(label, {"params": [], "name": label, **options})
        group["params"].append((name, parameter))
    return list(groups.values())


def _matches(name: str, rule: str, spec: Mapping[str, Any]) -> bool:
    patterns = spec.get("match")
    if not isinstance(patterns, Sequence) or isinstance(patterns, str):
        hint = "" if patterns else f" ({suggest('match', spec)})"
        raise ConfigError(f"trainer.parameter_rules.{rule}.match: a list of patterns of names is needed{hint}")
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state by parameter name and the options by group name, as plain values and tensors."""
    parameters = {
        name: optimizer.state[parameter]
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        if parameter in optimizer.state
    }
    groups = {
        group["name"]: {key: value for key, value in group.items() if key not in KERNEL_OPTIONS}
        for group in optimizer.param_groups
    }
    return {"parameters": {name: dict(state) for name, state in parameters.items()}, "groups": groups}


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any], with_options: bool = True) -> None:
    """Take up a stored state by parameter name.

    Args:
        optimizer: Optimizer over the same parameters, in any order and grouping.
        state: What ``optimizer_state`` returned.
        with_options: Also take up the groups' options, such as the learning rate; not for a run with others.

    Raises:
        CheckpointError: The state belongs to other parameters.
    """
    template = optimizer.state_dict()
    names = [name for group in template["param_groups"] for name in group["param_names"]]
    unknown = sorted(set(state["parameters"]) - set(names))
    if unknown:
        raise CheckpointError(
            f"optimizer: stored for the parameter '{unknown[0]}', which is not there. " + suggest(unknown[0], names)
        )
    for group in template["param_groups"]:
        if with_options:
            group.update(state["groups"].get(group["name"], {}))
    # Torch would change the types of values on the way: tensors to the parameter's, text and arrays to nonsense.
    optimizer.load_state_dict({**template, "state": {}})
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in state["parameters"]:
                values = state["parameters"][name].items()
                optimizer.state[parameter] = {key: _placed(value, parameter, group, key) for key, value in values}


def _placed(value: Any, parameter: Tensor, group: Mapping[str, Any], key: str = "") -> Any:
    """Move the tensors of a parameter's state to where it is; numbers of steps only if the kernels read them there."""
    if isinstance(value, Tensor):
        stays = key == "step" and not (group.get("fused") or group.get("capturable"))
        return value if stays else value.to(parameter.device)
    if type(value) is dict:
        return {name: _placed(item, parameter, group) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_placed(item, parameter, group) for item in value)
    return value
