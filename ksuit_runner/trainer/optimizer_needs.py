"""What an optimizer needs of a run: a closure, evaluation with weights of its own, dense gradients."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from ksuit_runner.errors import ConfigError

_TAKE_SPARSE = (SGD, Adagrad, SparseAdam)


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


def switches_weights(optimizer: Optimizer) -> bool:
    """Whether an optimizer evaluates other weights than it trains, as schedule-free ones do."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def sparse_names(model: nn.Module, named: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names of the modules with some of the parameters that declare sparse gradients, as an embedding."""
    held = set(map(id, named.values()))
    return [
        name
        for name, module in model.named_modules()
        if getattr(module, "sparse", False) is True and not held.isdisjoint(map(id, module.parameters()))
    ]


def check_step(optimizer: Optimizer, sparse: list[str], path: str) -> None:
    """Refuse an optimizer that would fail in the first step."""
    kind, name = type(optimizer), type(optimizer).__name__
    needed = [argument for argument in _needed(kind.step) if argument != "closure"]
    if needed:
        raise ConfigError(f"{name} does not fit: its step() needs {needed[0]}", path=path)
    if sparse and kind.__module__.startswith("torch.optim") and kind not in _TAKE_SPARSE:
        takes = ", ".join(item.__name__ for item in _TAKE_SPARSE)
        raise ConfigError(f"{name} takes no sparse gradients, as '{sparse[0]}' has them; {takes} do", path=path)


def _needed(step: Callable[..., Any]) -> list[str]:
    """Return the arguments that a step needs."""
    _, *arguments = inspect.signature(step).parameters.values()
    any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [item.name for item in arguments if item.default is item.empty and item.kind not in any_number]
