"""Builds an optimizer of torch over named parameter groups, with fused kernels where possible."""

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from ksuit_runner.config.construct import constructing
from ksuit_runner.errors import ConfigError, did_you_mean
from ksuit_runner.trainer.fused_kernels import FUSED_DEVICES, fits_kernels, may_fuse
from ksuit_runner.trainer.optimizer_needs import check_step, sparse_names
from ksuit_runner.trainer.parameter_rules import (
    FACTORS,
    SELECTORS,
    ParameterRules,
    named_parameters,
    parameter_groups,
    select_parameters,
)


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
    sparse = sparse_names(model, own)
    optimizer = _construct(factory, groups, device, not sparse and may_fuse(factory, own.values()), path)
    _check_options(optimizer, rules, own, path)
    check_step(optimizer, sparse, path)
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
    if is_open and device.type in FUSED_DEVICES and all(fits_kernels(group) for group in groups):
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
