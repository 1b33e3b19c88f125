"""The step of a fused Adam without what torch puts around it: the same kernels on the same tensors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ksuit_runner.trainer.optimizer import lay_out_for_fused_kernels


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
    they are gathered once, and again when others have a gradient than before. Whatever is not the plain case (another
    optimizer, a step that somebody has replaced, hooks, several devices, AMSGrad, a learning rate that is a tensor ...)
    is left to the optimizer.

    The optimizer's own first step also imports torch's compiler, over a second; so the state is made here as it would.

    Args:
        optimizer: The optimizer; a state that is loaded into it is noticed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._is_first = True
        self._groups: list[_Group] = []
        self._idle: list[Tensor] = []
        self._steps = torch.empty(0)
        self._seen: tuple[Any, ...] = ()
        groups = [group["params"] for group in optimizer.param_groups if group.get("fused")]
        self._shaped = [parameter for parameters in groups for parameter in parameters if parameter.ndim > 1]
        self._strides = self._strides_now()
        optimizer.register_load_state_dict_post_hook(lambda _: self._forget())

    def __call__(self) -> None:
        """Change the weights by their gradients."""
        optimizer = self._optimizer
        if self._strides_now() != self._strides:
            lay_out_for_fused_kernels(optimizer)
            self._forget()
            self._strides = self._strides_now()
        gradients = [[parameter.grad for parameter in group.parameters] for group in self._groups]
        if (
            not gradients
            or self._seen != self._look()
            or any(gradient is None for found in gradients for gradient in found)
            or (self._idle and any(parameter.grad is not None for parameter in self._idle))
        ):
            self._gather()
            gradients = [[parameter.grad for parameter in group.parameters] for group in self._groups]
        hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        if not gradients or hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
            optimizer.step()
            return
        with torch.no_grad():
            self._steps.add_(1)
            for group, found in zip(self._groups, gradients, strict=True):
                _apply(group, found)

    def _look(self) -> tuple[Any, ...]:
        """Return what is another one when somebody else has had a hand in the optimizer."""
        optimizer = self._optimizer
        return optimizer.step, id(optimizer.state), len(optimizer.state), len(optimizer.param_groups)

    def _gather(self) -> None:
        """Gather the tensors that the kernels work on; none if the optimizer is not of the plain kind."""
        if self._is_first:
            self._is_first = False
            _leave_sparse_to_torch(self._optimizer)
        self._groups = _gather(self._optimizer)
        self._idle = [item for group in self._optimizer.param_groups for item in group["params"] if item.grad is None]
        if self._groups:
            self._steps = _join_steps(self._optimizer, self._groups)
            self._seen = self._look()

    def _strides_now(self) -> list[tuple[int, ...]]:
        return [parameter.stride() for parameter in self._shaped]

    def _forget(self) -> None:
        self._groups = []


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
    """Return what has a gradient of all groups; nothing if some of it is not of the plain kind."""
    if type(optimizer) not in (Adam, AdamW) or not _is_torchs(optimizer.step):
        return []
    active = [(group, [item for item in group["params"] if item.grad is not None]) for group in optimizer.param_groups]
    active = [(options, parameters) for options, parameters in active if parameters]
    devices = {parameter.device for _, parameters in active for parameter in parameters}
    if len(devices) != 1 or not all(_is_plain(options, parameters) for options, parameters in active):
        return []
    return [_group(optimizer, options, parameters) for options, parameters in active]


def _is_torchs(step: Any) -> bool:
    """Whether nothing but torch's own code is called: neither the class nor the object has another step."""
    step = getattr(step, "__func__", step)
    while step is not None:
        if not getattr(step, "__globals__", {}).get("__name__", "").startswith("torch.optim"):
            return False
        step = getattr(step, "__wrapped__", None)
    return True


def _leave_sparse_to_torch(optimizer: Optimizer) -> None:
    """Choose the kernels that take sparse gradients where there are some; the fused ones do not."""
    for group in optimizer.param_groups:
        sparse = any(item.grad is not None and item.grad.is_sparse for item in group["params"])
        if sparse and group.get("fused"):
            group["fused"] = False


def _is_plain(options: dict[str, Any], parameters: list[Tensor]) -> bool:
    return (
        bool(options.get("fused"))
        and not (options["amsgrad"] or options["capturable"] or options["differentiable"])
        and not any(isinstance(value, Tensor) for value in (options["lr"], *options["betas"]))
        and len({parameter.dtype for parameter in parameters}) == 1
        and all(item.is_floating_point() and item.grad.layout == torch.strided for item in parameters)  # type: ignore[union-attr]
    )


def _group(optimizer: Optimizer, options: dict[str, Any], parameters: list[Tensor]) -> _Group:
    states = [optimizer.state[parameter] or _begin(optimizer, parameter) for parameter in parameters]
    averages, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    is_decoupled = isinstance(optimizer, AdamW) or bool(options.get("decoupled_weight_decay"))
    return _Group(options, parameters, averages, squares, steps, is_decoupled)


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
