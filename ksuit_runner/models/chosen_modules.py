"""The modules of a model that a callback watches: chosen by patterns of their names, or by their depth."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ksuit_runner.errors import ConfigError
from ksuit_runner.tensors.name_patterns import matching_modules

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


def check_depth(depth: int | None, path: str) -> None:
    """Check a depth, in levels below the model.

    Raises:
        ConfigError: It is no positive whole number.
    """
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 1):
        raise ConfigError(f"a whole number of at least 1 is needed, or null, not {depth!r}", path=f"{path}.depth")


def chosen_modules(model: nn.Module, match: Sequence[str] | None, depth: int | None, path: str) -> dict[str, nn.Module]:
    """Return the modules to watch while they compute, by name.

    Args:
        model: The model, which is not one of them.
        match: Patterns of their names; ``{}`` stands for the number of a layer. None chooses by depth.
        depth: How many levels below the model they are; those without children also higher. None chooses the latter.
        path: Config path of what asks for them, for messages.

    Raises:
        ConfigError: A pattern matches nothing, or a list of modules, which is never called; the depth is no positive
            whole number; or the model is compiled, so that nobody can watch its modules.
    """
    check_depth(depth, path)
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        raise ConfigError("nothing inside of a compiled model can be watched: set trainer.compile=false", path=path)
    named = {name: module for name, module in model.named_modules() if name}
    if match is not None:
        found = matching_modules(match, named, f"{path}.match")
        for name in found:
            if isinstance(named[name], _NEVER_CALLED):
                raise ConfigError(
                    f"'{name}' is a {type(named[name]).__name__}, which is never called; write '{name}.{{}}'",
                    path=f"{path}.match",
                )
        return {name: named[name] for name in found}
    return {
        name: module
        for name, module in named.items()
        if not isinstance(module, _NEVER_CALLED)
        and (_level(name) == depth or (not any(module.children()) and (depth is None or _level(name) < depth)))
    }


def by_module(
    names: Sequence[str], model: nn.Module, match: Sequence[str] | None, depth: int | None, path: str
) -> dict[str, list[str]]:
    """Return the names of parameters by the module that they are in.

    Args:
        names: Names of the parameters, ``blocks.0.mlp.weight``.
        model: The model.
        match: Patterns of the names of modules: a parameter belongs to the innermost of these that it is in. What is in
            none of them is left out. None goes by depth.
        depth: How many parts of its name say which module a parameter belongs to: 2 are ``blocks.0``. None takes the
            module that has it. A parameter of the model itself is by itself.
        path: Config path of what asks for them, for messages.

    Raises:
        ConfigError: A pattern matches no module, or only some without parameters; or the depth is no positive whole
            number.
    """
    check_depth(depth, path)
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
