"""The step of a fused Adam without what torch puts around it: the same kernels on the same tensors."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer


class _Group(NamedTuple):
    options: dict[str, Any]
    parameters: list[Tensor]
    averages: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]
    is_decoupled: bool


class FusedStep:
    """Does ``optimizer.step()``; for a fused Adam or AdamW by calling its kernels directly.

    Torch gathers and sorts all tensors anew at every step, which for a small model takes longer than the kernels. Here
    they are gathered once. Whatever is not the plain case (another optimizer, hooks, a parameter without a gradient,
    several devices, AMSGrad, a learning rate that is a tensor ...) is left to the optimizer.

    The optimizer's own first step also imports torch's compiler, over a second; so the state is made here as it would.

    Args:
        optimizer: The optimizer; a state that is loaded into it is noticed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: list[_Group] = []
        self._steps = torch.empty(0)
        optimizer.register_load_state_dict_post_hook(lambda _: self._forget())

    def __call__(self) -> None:
        """Change the weights by their gradients."""
        if not self._groups and (groups := _gather(self._optimizer)):
            self._groups, self._steps = groups, _join_steps(self._optimizer, groups)
        gradients = [[parameter.grad for parameter in group.parameters] for group in self._groups]
        hooks = self._optimizer._optimizer_step_pre_hooks or self._optimizer._optimizer_step_post_hooks
        if not gradients or hooks or any(gradient is None for found in gradients for gradient in found):
            self._optimizer.step()
            return
        with torch.no_grad():
            self._steps.add_(1)
            for group, found in zip(self._groups, gradients, strict=True):
                _apply(group, found)

    def _forget(self) -> None:
        self._groups = []


def forget_gradients(parameters: Iterable[Tensor]) -> None:
    """Do what ``optimizer.zero_grad()`` does."""
    for parameter in parameters:
        parameter.grad = None


def _apply(group: _Group, gradients: list[Any]) -> None:
    options = group.options
    beta1, beta2 = options["betas"]
    kernel = torch._fused_adamw_ if group.is_decoupled else torch._fused_adam_
    kernel(
        group.parameters,
        gradients,
        group.averages,
        group.squares,
        [],
        group.steps,
        amsgrad=False,
        lr=options["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        maximize=options["maximize"],
    )


def _gather(optimizer: Optimizer) -> list[_Group]:
    """Return the tensors of all groups; nothing if they are not of the plain kind."""
    if type(optimizer) not in (Adam, AdamW):
        return []
    groups = [_group(optimizer, options) for options in optimizer.param_groups]
    plain = [group for group in groups if group is not None]
    is_on_one_device = len({group.parameters[0].device for group in plain}) == 1
    return plain if len(plain) == len(groups) and is_on_one_device else []


def _group(optimizer: Optimizer, options: dict[str, Any]) -> _Group | None:
    parameters = options["params"]
    kinds = {(parameter.device, parameter.dtype, parameter.grad is None) for parameter in parameters}
    is_plain = (
        options.get("fused")
        and not (options["amsgrad"] or options["capturable"] or options["differentiable"])
        and not any(isinstance(value, Tensor) for value in (options["lr"], *options["betas"]))
        and len(kinds) == 1
        and not next(iter(kinds))[2]
        and all(parameter.is_floating_point() and parameter.grad.layout == torch.strided for parameter in parameters)
    )
    if not is_plain:
        return None
    states = [optimizer.state[parameter] or _begin(optimizer, parameter) for parameter in parameters]
    averages, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    is_decoupled = isinstance(optimizer, AdamW) or bool(options.get("decoupled_weight_decay"))
    return _Group(options, list(parameters), averages, squares, steps, is_decoupled)


def _join_steps(optimizer: Optimizer, groups: list[_Group]) -> Tensor:
    """Let the numbers of steps be parts of one tensor, so that one addition counts all of them."""
    joined = torch.stack([step for group in groups for step in group.steps])
    parts = iter(joined)
    for group in groups:
        group.steps[:] = [next(parts) for _ in group.steps]
        for parameter, step in zip(group.parameters, group.steps, strict=True):
            optimizer.state[parameter]["step"] = step
    return joined


def _begin(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Give a parameter the state that it has before the first step."""
    state: dict[str, Any] = optimizer.state[parameter]
    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
