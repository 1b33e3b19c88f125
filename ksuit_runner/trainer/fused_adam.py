"""The step of a fused Adam or AdamW: torch's kernels on the same tensors, without its overhead around them."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim import optimizer as optimizer_module

from ksuit_runner.trainer.fused_kernels import lay_out_for_fused_kernels

Local = Callable[[list[Any]], list[Any]]


class _Group(NamedTuple):
    options: dict[str, Any]
    parameters: list[Tensor]
    weights: list[Tensor]  # what this rank holds of the parameters
    averages: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]
    is_decoupled: bool


class FusedStep:
    """Does ``optimizer.step()``; for a fused Adam or AdamW by calling its kernels directly.

    Torch gathers and sorts all tensors at every step, which for a small model takes longer than the kernels: 55 us for
    a step over four parameters that takes 16 us here. They are gathered once, and again when others have a gradient
    than before. Everything else (another optimizer, a replaced ``step``, hooks, several devices, AMSGrad, a learning
    rate that is a tensor, a torch whose private parts are not those known here) is left to the optimizer.

    The optimizer's own first step also imports torch's compiler, over a second; so the first state is created here.

    Of parameters that are spread over ranks, the kernels work on what this rank holds: 145 us instead of 1,550 for 148
    of them. The state of the optimizer is spread in the same way.

    Args:
        optimizer: The optimizer; loading a state into it is noticed.
        local: Returns what this rank holds of tensors, see ``Strategy.local``.
    """

    def __init__(self, optimizer: Optimizer, local: Local = lambda tensors: tensors) -> None:
        self._optimizer = optimizer
        self._local = local
        self._no_grad = torch.no_grad()  # to make one takes longer than to enter it
        hooks = _hooks(optimizer)
        self._hooks = hooks or []
        self._can_call_kernels = hooks is not None and _has_known_kernels()
        self._is_first = True
        self._groups: list[_Group] = []
        self._idle: list[Tensor] = []
        self._steps, self._one = torch.empty(0), torch.ones(())  # to add a number takes four times as long
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
            or self._seen != self._fingerprint()
            or any(gradient is None for found in gradients for gradient in found)
            or (self._idle and any(parameter.grad is not None for parameter in self._idle))
        ):
            self._gather()
            gradients = [[parameter.grad for parameter in group.parameters] for group in self._groups]
        if not gradients or any(self._hooks):
            optimizer.step()
            return
        with self._no_grad:
            self._steps.add_(self._one)
            for group, found in zip(self._groups, gradients, strict=True):
                _apply(group, self._local(found))

    def _fingerprint(self) -> tuple[Any, ...]:
        """Return what changes when other code replaces the step or the state of the optimizer."""
        optimizer = self._optimizer
        return optimizer.step, id(optimizer.state), len(optimizer.state), len(optimizer.param_groups)

    def _gather(self) -> None:
        """Gather the tensors that the kernels work on; none if the optimizer has to do its step itself."""
        if self._is_first:
            self._is_first = False
            _leave_sparse_to_torch(self._optimizer)
        self._groups = _gather(self._optimizer, self._local) if self._can_call_kernels else []
        self._idle = [item for group in self._optimizer.param_groups for item in group["params"] if item.grad is None]
        if self._groups:
            self._steps = _join_steps(self._optimizer, self._groups)
            self._one = self._steps.new_ones(())
            self._seen = self._fingerprint()

    def _strides_now(self) -> list[tuple[int, ...]]:
        return [parameter.stride() for parameter in self._shaped]

    def _forget(self) -> None:
        self._groups = []


def _hooks(optimizer: Optimizer) -> list[Mapping[Any, Any]] | None:
    """Return the dicts in which torch holds the hooks of a step, or None if this version holds them elsewhere."""
    found = [
        getattr(optimizer, "_optimizer_step_pre_hooks", None),
        getattr(optimizer, "_optimizer_step_post_hooks", None),
        getattr(optimizer_module, "_global_optimizer_pre_hooks", None),
        getattr(optimizer_module, "_global_optimizer_post_hooks", None),
    ]
    return found if all(isinstance(hooks, Mapping) for hooks in found) else None  # type: ignore[return-value]


@lru_cache
def _has_known_kernels() -> bool:
    """Whether this version of torch has the private kernels, with the arguments that they are called with here."""
    options = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-8, "maximize": False}
    try:
        for is_decoupled in (False, True):
            weights, averages, squares, steps, gradients = ([torch.ones(1)] for _ in range(5))
            _apply(_Group(options, weights, weights, averages, squares, steps, is_decoupled), gradients)
    except Exception:
        return False
    return True


def _apply(group: _Group, gradients: list[Any]) -> None:
    options = group.options
    beta1, beta2 = options["betas"]
    kernel = torch._fused_adamw_ if group.is_decoupled else torch._fused_adam_
    kernel(
        group.weights,
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


def _gather(optimizer: Optimizer, local: Local) -> list[_Group]:
    """Return the parameters with a gradient, by group; none if one of them is not of the plain kind."""
    if type(optimizer) not in (Adam, AdamW) or not _is_from_torch(optimizer.step):
        return []
    active = [(group, [item for item in group["params"] if item.grad is not None]) for group in optimizer.param_groups]
    active = [(options, parameters) for options, parameters in active if parameters]
    devices = {parameter.device for _, parameters in active for parameter in parameters}
    if len(devices) != 1 or not all(_is_plain(options, parameters) for options, parameters in active):
        return []
    return [_group(optimizer, options, parameters, local) for options, parameters in active]


def _is_from_torch(step: Any) -> bool:
    """Whether only torch's own code would be called: neither the class nor the object has another step."""
    step = getattr(step, "__func__", step)
    while step is not None:
        if not getattr(step, "__globals__", {}).get("__name__", "").startswith("torch.optim"):
            return False
        step = getattr(step, "__wrapped__", None)
    return True


def _leave_sparse_to_torch(optimizer: Optimizer) -> None:
    """Switch off fused kernels, which take no sparse gradients, where there are some."""
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


def _group(optimizer: Optimizer, options: dict[str, Any], parameters: list[Tensor], local: Local) -> _Group:
    states = [optimizer.state[parameter] or _first_state(optimizer, parameter) for parameter in parameters]
    averages, squares = (local([state[key] for state in states]) for key in ("exp_avg", "exp_avg_sq"))
    steps = [state["step"] for state in states]
    is_decoupled = isinstance(optimizer, AdamW) or bool(options.get("decoupled_weight_decay"))
    return _Group(options, parameters, local(parameters), averages, squares, steps, is_decoupled)


def _join_steps(optimizer: Optimizer, groups: list[_Group]) -> Tensor:
    """Make the step counts views of one tensor, so that one addition counts all of them."""
    joined = torch.stack([step for group in groups for step in group.steps])
    parts = iter(joined)
    for group in groups:
        group.steps[:] = [next(parts) for _ in group.steps]
        for parameter, step in zip(group.parameters, group.steps, strict=True):
            optimizer.state[parameter]["step"] = step
    return joined


def _first_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Create the state that a parameter has before the first step."""
    state: dict[str, Any] = optimizer.state[parameter]
    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
