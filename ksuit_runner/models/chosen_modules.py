"""The modules of a model that a callback watches: chosen by patterns of their names, or by their depth."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ksuit_runner.config.types import check_numbers
from ksuit_runner.errors import ConfigError
from ksuit_runner.tensors.name_patterns import matching_modules

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


def chosen_modules(model: nn.Module, match: Sequence[str] | None, depth: int | None, path: str) -> dict[str, nn.Module]:
    """Return the modules to watch while they compute, by name.

    Args:
        model: The model, which is one of them only if it has no modules; its name is empty.
        match: Patterns of their names; ``{}`` stands for the number of a layer. None chooses by depth.
        depth: How many levels below the model they are; modules without children count at higher levels as well. None
            chooses all modules without children.
        path: Config path of what asks for them, for messages.

    Raises:
        ConfigError: A pattern matches nothing, or a list of modules, which is never called; there is no pattern; or the
            depth is no positive whole number.
    """
    _check(match, depth, path)
    named = {name: module for name, module in model.named_modules() if name} or {"": model}
    called = {name: module for name, module in named.items() if not isinstance(module, _NEVER_CALLED)}
    if match is not None:
        for pattern in match:
            first, *rest = matching_modules([pattern], named, f"{path}.match")
            if called.keys().isdisjoint([first, *rest]):
                kind = type(named[first]).__name__
                raise ConfigError(
                    f"'{first}' is a {kind}, which is never called; write '{first}.{{}}'", path=f"{path}.match"
                )
        chosen = set(matching_modules(match, called, f"{path}.match"))
        return {name: module for name, module in called.items() if name in chosen}
    return {
        name: module
        for name, module in called.items()
        if (_level(name) == depth or (not any(module.children()) and (depth is None or _level(name) < depth)))
    }


def check_not_compiled(model: nn.Module, path: str) -> None:
    """Check that modules can be watched in the forward pass of training.

    Raises:
        ConfigError: The model is compiled, or a part of it, which may know nothing of hooks.
    """
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        raise ConfigError("nothing inside of a compiled model can be watched: set trainer.compile=false", path=path)


def by_module(
    names: Sequence[str], model: nn.Module, match: Sequence[str] | None, depth: int | None, path: str
) -> dict[str, list[str]]:
    """Return the names of parameters by the module that they are in.

    Args:
        names: Names of the parameters, ``blocks.0.mlp.weight``.
        model: The model.
        match: Patterns of the names of modules: a parameter belongs to the innermost of these that it is in. What is in
            none of them is left out. None goes by depth.
        depth: How many parts of its name say which module a parameter belongs to: with 2, ``blocks.0.norm.weight``
            belongs to ``blocks.0``. None takes the module that has the parameter itself. A parameter of the model
            itself is a group of its own.
        path: Config path of what asks for them, for messages.

    Raises:
        ConfigError: A pattern matches no module, or only some without parameters; there is no pattern; or the depth is
            no positive whole number.
    """
    _check(match, depth, path)
    groups: dict[str, list[str]] = {}
    if match is None:
        for name in names:
            holder = name.split(".")[:-1][:depth]
            groups.setdefault(".".join(holder) or name, []).append(name)
        return groups
    holders = {name for name, module in model.named_modules() if name and any(True for _ in module.parameters())}
    chosen = matching_modules(match, sorted(holders), f"{path}.match", "module with parameters")
    for name in names:
        inside = [module for module in chosen if name.startswith(f"{module}.")]
        if inside:
            groups.setdefault(max(inside, key=len), []).append(name)
    return groups


@contextmanager
def tapped(modules: Mapping[str, nn.Module], tap: Callable[[str, Any], None]) -> Iterator[None]:
    """Have a function called with the name of a module and its outputs, whenever one computes while the block runs.

    Args:
        modules: The modules by name.
        tap: Called with both. It must not change the outputs.
    """
    is_open = True  # a copy of the model made meanwhile keeps the hooks

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, outputs: Any) -> None:
            if is_open:
                tap(name, outputs)

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        is_open = False
        for handle in handles:
            handle.remove()


def _level(name: str) -> int:
    return name.count(".") + 1


def _check(match: Sequence[str] | None, depth: int | None, path: str) -> None:
    if match is not None and not match:
        raise ConfigError("at least one pattern is needed, or null to go by depth", path=f"{path}.match")
    check_numbers("PositiveInt", path, depth=depth)
