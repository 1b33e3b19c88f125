"""Optimizers: built over named parameter groups, with fused kernels where possible; their state is stored by name."""

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, SparseAdam

from ksuit_runner.config.construct import constructing
from ksuit_runner.distributed.pieces import is_sharded, place_all
from ksuit_runner.errors import CheckpointError, ConfigError, did_you_mean
from ksuit_runner.trainer.parameter_rules import (
    FACTORS,
    LOSS,
    SELECTORS,
    ParameterRules,
    named_parameters,
    parameter_groups,
    select_parameters,
)

FUSED_DEVICES = ("cpu", "cuda", "mps")
# How a step is computed, not what: a run may resume with other kernels on another device.
KERNEL_OPTIONS = ("params", "param_names", "name", "fused", "foreach", "capturable", "differentiable")
_TAKE_SPARSE = (SGD, Adagrad, SparseAdam)


def build_optimizer(
    factory: Callable[..., Optimizer],
    model: nn.Module,
    rules: ParameterRules,
    device: torch.device,
    loss: nn.Module | None = None,
    trains: bool = True,
    lr_scale: float = 1.0,
    only: Sequence[str] | None = None,
    path: str = "optimizer",
) -> Optimizer:
    """Build an optimizer over all parameters, or some of them, in groups of those that share all options.

    It has the frozen ones as well: without a gradient a parameter costs nothing, and once it thaws it is trained.

    Args:
        factory: The optimizer's class with its arguments, but without parameters.
        model: The module to train.
        rules: By name of the rule: which parameters it applies to, ``match`` (patterns of names), ``min_ndim`` and
            ``max_ndim`` (numbers of dimensions); and their options: ``lr_factor``, a factor on the learning rate, and
            any option of the optimizer. Of several rules the last one wins. A rule with ``layers`` (patterns from the
            input on, in which ``{}`` stands for a layer's number) and ``decay`` multiplies the learning rate of the
            last layer by ``decay`` and that of each one before it by ``decay`` once more (Bao et al., BEiT, 2021,
            https://arxiv.org/abs/2106.08254). A rule that matches no parameter is an error unless it is ``optional``.
        device: Device of the parameters; fused kernels are used where the optimizer has them for it.
        loss: The loss module, whose parameters are trained as well, under names that begin with ``loss.``.
        trains: Whether there are any updates, so that some parameter has to be trainable.
        lr_scale: Factor on all learning rates, such as that of the batch size.
        only: Names of its parameters, where there are other optimizers; None for all.
        path: Config path of the optimizer, for messages.

    Raises:
        ConfigError: A rule has no ``match`` or ``max_ndim``, matches nothing or has an option that is unknown to the
            optimizer; the model has nothing to train; or the optimizer does not fit.
    """
    _keep_compiler_out()
    named = named_parameters(model, loss)
    if trains and not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError("it has no parameter to train", path="model")
    own = named if only is None else {name: named[name] for name in only}
    groups = parameter_groups(own, rules, named)
    factors = [math.prod(group.pop(key, 1.0) for key in FACTORS) for group in groups]
    sparse = _sparse_names(model, own)
    optimizer = _construct(factory, groups, device, not sparse and may_fuse(factory, own.values()), path)
    _check_options(optimizer, rules, own, path)
    _check_step(optimizer, sparse, path)
    for options in (*optimizer.param_groups, optimizer.defaults) if lr_scale != 1.0 else ():
        options["lr"] *= lr_scale
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        group["lr"] *= factor
    if type(optimizer) is SGD:
        optimizer.register_step_pre_hook(_admit_to_momentum)
    return optimizer


def _admit_to_momentum(optimizer: Optimizer, *_: Any) -> None:
    """Let parameters join that have their first gradient later than others, such as those that thaw.

    The fused kernel of SGD takes momentum buffers of all parameters or of none. From zero, a buffer becomes the first
    gradient, as torch has it. Where float16 is scaled, all begin with zero: in a step that is left out because of an
    infinite gradient, torch would leave them as whatever was in the memory.
    """
    if len(optimizer.state) == sum(len(group["params"]) for group in optimizer.param_groups):
        return
    for group in optimizer.param_groups:
        if not (group["momentum"] and group["fused"]):
            continue
        states = [(item, optimizer.state.get(item, {})) for item in group["params"] if item.grad is not None]
        is_scaled = getattr(optimizer, "found_inf", None) is not None
        if is_scaled or any(state.get("momentum_buffer") is not None for _, state in states):
            for item, state in states:
                if state.get("momentum_buffer") is None:
                    optimizer.state[item]["momentum_buffer"] = torch.zeros_like(
                        item, memory_format=torch.preserve_format
                    )


def _keep_compiler_out() -> None:
    """Keep an optimizer's methods from importing torch's compiler, which takes over a second.

    They are wrapped so that the compiler skips them, and the wrapper imports it for that. No compiled code calls them
    here. A version of torch that caches the wrapped method elsewhere imports the compiler, and works.
    """
    if "torch._dynamo" in sys.modules:
        return
    for method in (Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict):
        inner = getattr(method, "__wrapped__", None)
        if inner is not None:
            inner.__dynamo_disable = inner  # where the wrapper caches what it calls


def _construct(
    factory: Callable[..., Optimizer], groups: list[dict[str, Any]], device: torch.device, fuses: bool, path: str
) -> Optimizer:
    given = getattr(factory, "keywords", {})
    offered = inspect.signature(getattr(factory, "func", factory)).parameters
    is_open = fuses and "fused" in offered and not {"fused", "foreach", "differentiable"} & set(given)
    is_open = is_open and not given.get("dampening")  # which a momentum that begins later could not be given
    # Newer versions of torch refuse other dtypes in the first step only.
    if is_open and device.type in FUSED_DEVICES and all(_fits_kernels(group) for group in groups):
        try:
            return factory([dict(group) for group in groups], fused=True)  # copies, as torch adds its options to them
        except (RuntimeError, ValueError):  # this optimizer has no fused kernel for this device
            pass
    with constructing(path):
        try:
            return factory(groups)
        except ValueError as error:  # such as a negative learning rate
            several = "; trainer.parameter_rules=null makes one of them" if "parameter groups" in str(error) else ""
            raise ConfigError(f"{error}{several}", path=path) from error


def may_fuse(factory: Callable[..., Optimizer], parameters: Iterable[Tensor]) -> bool:
    """Whether torch knows the fused kernel of an optimizer for such parameters: spread over ranks only that of Adam."""
    kind = getattr(factory, "func", factory)
    return (isinstance(kind, type) and issubclass(kind, Adam | AdamW)) or not any(map(is_sharded, parameters))


def _fits_kernels(group: Mapping[str, Any]) -> bool:
    """Whether fused kernels, which go through memory from end to end, can work on the parameters."""
    parameters = [parameter for _, parameter in group["params"]]
    return all(parameter.is_floating_point() and _lie_alike(parameter, parameter) for parameter in parameters)


def _sparse_names(model: nn.Module, named: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names of the modules with some of the parameters that declare sparse gradients, as an embedding."""
    held = set(map(id, named.values()))
    return [
        name
        for name, module in model.named_modules()
        if getattr(module, "sparse", False) is True and not held.isdisjoint(map(id, module.parameters()))
    ]


def _check_options(optimizer: Optimizer, rules: ParameterRules, named: Mapping[str, nn.Parameter], path: str) -> None:
    valid = {*SELECTORS, "lr_factor", *optimizer.defaults}
    for rule, spec in rules.items():
        # Of several optimizers, only those with some of its parameters have to know its options.
        concerns = path == "optimizer" or select_parameters(spec, named, path)
        for option in spec.keys() - valid if concerns else ():
            name = type(optimizer).__name__
            raise ConfigError(
                f"{name} has no such option. {did_you_mean(option, valid)}",
                path=f"trainer.parameter_rules.{rule}.{option}",
            )


def _check_step(optimizer: Optimizer, sparse: list[str], path: str) -> None:
    """Refuse an optimizer that would fail in the first step."""
    kind, name = type(optimizer), type(optimizer).__name__
    needed = [argument for argument in _needed(kind.step) if argument != "closure"]
    if needed:
        raise ConfigError(f"{name} does not fit: its step() needs {needed[0]}", path=path)
    if sparse and kind.__module__.startswith("torch.optim") and kind not in _TAKE_SPARSE:
        takes = ", ".join(item.__name__ for item in _TAKE_SPARSE)
        raise ConfigError(f"{name} takes no sparse gradients, as '{sparse[0]}' has them; {takes} do", path=path)


def needs_closure(factory: Callable[..., Optimizer], optimizer: Optimizer) -> bool:
    """Whether the step of an optimizer asks for a closure that evaluates the loss again, as that of LBFGS does.

    Some report that only when they step; so a step with a small matrix is tried out.
    """
    if "closure" in _needed(type(optimizer).step):
        return True
    if type(optimizer).__module__.startswith("torch.optim"):
        return False
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.zeros(2, 2)
    try:
        other = factory([{"params": [("parameter", parameter)], "name": "default"}])
        if switches_weights(other):
            other.train()  # type: ignore[attr-defined]
        other.step()
    except Exception as error:  # any other error may be due to the small matrix
        return "closure" in str(error).lower() or "'NoneType' object is not callable" in str(error)
    return False


def _needed(step: Callable[..., Any]) -> list[str]:
    """Return the arguments that a step needs."""
    _, *arguments = inspect.signature(step).parameters.values()
    any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [item.name for item in arguments if item.default is item.empty and item.kind not in any_number]


def switches_weights(optimizer: Optimizer) -> bool:
    """Whether an optimizer evaluates other weights than it trains, as schedule-free ones do."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


# State


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


def lay_out_for_fused_kernels(optimizer: Optimizer) -> None:
    """Give state the memory layout of its parameter where fused kernels pair the two by their offset in memory.

    They differ if the parameter's layout was changed, or if the state was stored without its layout.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and not _lie_alike(value, parameter):
                    state[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    return one.layout != torch.strided or one.stride() == torch.empty_like(other).stride()


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
