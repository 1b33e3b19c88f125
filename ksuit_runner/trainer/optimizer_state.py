"""The state of an optimizer, stored by the names of its parameters and groups."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ksuit_runner.distributed.pieces import place_all
from ksuit_runner.errors import CheckpointError, did_you_mean
from ksuit_runner.trainer.fused_kernels import lay_out_for_fused_kernels
from ksuit_runner.trainer.parameter_rules import LOSS

# How a step is computed, not what: a run may resume with other kernels on another device.
KERNEL_OPTIONS = ("params", "param_names", "name", "fused", "foreach", "capturable", "differentiable")


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return ``optimizer.state_dict()`` by the names of parameters and groups instead of their numbers.

    Returns:
        ``parameters`` and ``groups``. What an optimizer adds to the state is in ``own``, with the names of the
        parameters in their ``order``, as it may refer to their numbers.
    """
    state, names = optimizer.state_dict(), _names(optimizer)
    if not _has_torch_structure(optimizer, state):
        return {"parameters": {}, "groups": {}, "own": dict(state), "order": names}
    values = {names[key] if isinstance(key, int) else key: value for key, value in state["state"].items()}
    stored: dict[str, Any] = {
        "parameters": {name: dict(values[name]) for name in names if name in values},
        "groups": {
            group["name"]: {key: value for key, value in stored.items() if key not in KERNEL_OPTIONS}
            for group, stored in zip(optimizer.param_groups, state["param_groups"], strict=True)
        },
    }
    own = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
    if shared := {key: value for key, value in values.items() if key not in stored["parameters"]}:
        own["state"] = shared
    return {**stored, "own": own, "order": names} if own else stored


def load_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any], with_options: bool = True) -> None:
    """Load a stored state by parameter name, with ``optimizer.load_state_dict()``.

    Args:
        optimizer: Optimizer over the same parameters, in any order and grouping.
        state: What ``optimizer_state`` returned.
        with_options: Whether to load the groups' options, such as the learning rate; not for a run with others. What is
            not an option, such as a count that the optimizer has in its groups, is always loaded.

    Raises:
        CheckpointError: The state belongs to other parameters, or to other groups where the optimizer counts by group.
    """
    names = _names(optimizer)
    unknown = sorted(set(state["parameters"]) - set(names))
    if unknown:
        raise CheckpointError(
            f"the checkpoint has a state for the parameter '{unknown[0]}', which the model does not have. "
            + did_you_mean(unknown[0], names),
            path="optimizer",
        )
    options = _options(optimizer)
    counted = optimizer.defaults.keys() - options
    has_counted = any(counted & group.keys() for group in state["groups"].values())
    has_other_groups = state["groups"].keys() != {group["name"] for group in optimizer.param_groups}
    if state.get("order", names) != names or (has_counted and has_other_groups):
        name = type(optimizer).__name__
        raise CheckpointError(
            f"{name} counts by group, and the groups have changed: keep trainer.parameter_rules as they were",
            path="optimizer",
        )
    own_options = [{key: group[key] for key in options & group.keys()} for group in optimizer.param_groups]
    _load(optimizer, state, names)
    lay_out_for_fused_kernels(optimizer)
    if not with_options:
        for group, own in zip(optimizer.param_groups, own_options, strict=True):
            group.update(own)


def without_loss(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored state without the parameters of the loss."""
    parameters = {name: values for name, values in state["parameters"].items() if not name.startswith(LOSS)}
    return {**state, "parameters": parameters}


def _load(optimizer: Optimizer, state: Mapping[str, Any], names: list[str]) -> None:
    template, own = optimizer.state_dict(), place_all(dict(state.get("own", {})))
    if not _has_torch_structure(optimizer, template):
        optimizer.load_state_dict(own)
        return
    for group in template["param_groups"]:
        group.update(state["groups"].get(group["name"], {}))
    parameters = dict(zip(names, (item for group in optimizer.param_groups for item in group["params"]), strict=True))
    values = {name: place_all(values, parameters[name]) for name, values in state["parameters"].items()}
    others = own.pop("state", {})
    if type(optimizer).load_state_dict is not Optimizer.load_state_dict:
        index = {name: i for i, name in enumerate(names)}
        numbered = {index[name]: dict(values) for name, values in values.items()}
        optimizer.load_state_dict({**template, **own, "state": numbered | others})
        return
    # Torch would convert values: tensors to the dtype of the parameter, text and arrays to nonsense.
    optimizer.load_state_dict({**template, **own, "state": others})
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if name in values:
                optimizer.state[parameter] = {
                    key: _moved(value, parameter, group, key) for key, value in values[name].items()
                }


def _moved(value: Any, parameter: Tensor, group: Mapping[str, Any], key: str = "") -> Any:
    """Move the tensors of a parameter's state to its device; step counts only if the kernels read them there."""
    if isinstance(value, Tensor):
        stays = key == "step" and not (group.get("fused") or group.get("capturable"))
        return value if stays else value.to(parameter.device)
    if type(value) is dict:
        return {name: _moved(item, parameter, group) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, parameter, group) for item in value)
    return value


def _has_torch_structure(optimizer: Optimizer, state: Mapping[str, Any]) -> bool:
    """Whether a state has the structure of those of torch's optimizers, whatever else is in it."""
    groups = state.get("param_groups")
    return (
        isinstance(state.get("state"), Mapping)
        and isinstance(groups, list)
        and len(groups) == len(optimizer.param_groups)
    )


def _names(optimizer: Optimizer) -> list[str]:
    """Return the names of all parameters in the order in which torch numbers them."""
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def _options(optimizer: Optimizer) -> set[str]:
    """Return the options of a group, which are not counts: what the constructor takes, what a schedule sets."""
    bases = [vars(base)["__init__"] for base in type(optimizer).__mro__ if "__init__" in vars(base)]
    taken = {name for base in bases if base is not object.__init__ for name in inspect.signature(base).parameters}
    of_schedules = {key for group in optimizer.param_groups for key in group} - optimizer.defaults.keys()
    return taken | of_schedules
