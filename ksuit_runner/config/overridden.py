"""Checks the methods of a class of the user's own when it is defined: whether anything calls them, and how."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from inspect import Parameter, Signature, signature, unwrap
from types import CodeType, FunctionType
from typing import Any

HOOKS_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("on_train_start", "on_train_begin", "on_fit_start", "before_train"), "_before_training"),
    **dict.fromkeys(("on_train_end", "on_fit_end", "after_train"), "_after_training"),
    **dict.fromkeys(("on_batch_begin", "on_train_batch_begin", "on_step_begin"), "_before_every_update"),
    **dict.fromkeys(("on_train_batch_start", "on_batch_start", "before_update"), "_before_every_update"),
    **dict.fromkeys(("on_train_batch_end", "on_batch_end", "on_step_end", "after_step"), "_track_after_update_step"),
    **dict.fromkeys(("on_epoch_end", "on_train_epoch_end", "on_validation_epoch_end"), "_after_epoch"),
    **dict.fromkeys(("on_validation_end", "on_evaluate", "after_epoch_end"), "_after_epoch"),
    **dict.fromkeys(("on_before_backward", "before_backward"), "_before_every_backward"),
    **dict.fromkeys(("on_before_optimizer_step", "on_pre_optimizer_step"), "_before_every_optimizer_step"),
    "on_log": "_after_log",
    **dict.fromkeys(("on_save_checkpoint", "on_save"), "state_dict"),
    "on_load_checkpoint": "load_state_dict",
}
"""Names in other frameworks, and near ones -> what overrides the same here."""
_LOOKS_LIKE_A_HOOK = re.compile(r"_*(on|before|after|track)_")
_NEAR = 0.85


def check_overridden(
    cls: type,
    hooks: Collection[str],
    extra: Mapping[str, int] | None = None,
    others: Collection[str] = (),
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Check the methods of a class that has just been defined.

    Args:
        cls: The class.
        hooks: Names of the methods that are called with their arguments by name. All others are called by position.
        extra: How many more arguments a method may take than the one that it overrides.
        others: Names of public methods that are called, too. A method with nearly such a name is misspelt, unless the
            class has the right one as well.
        elsewhere: Names of methods that other frameworks call, and what to do here instead.

    Raises:
        TypeError: A method is named like one that is called, and nothing calls it; or it cannot be called as the one is
            that it overrides. The message has the name or signature to write.
    """
    public = {hook.removeprefix("_") for hook in hooks}
    others = [name for name in others if name not in vars(cls)]
    for name, method in vars(cls).items():
        if not isinstance(method, FunctionType):
            continue
        declared = _declared(cls, name)
        if declared is not None:
            _check_signature(cls, method, signature(declared), name in hooks, (extra or {}).get(name, 0))
        elif name not in hooks and name not in public and not any(name in vars(base) for base in cls.__mro__[1:]):
            meant, what, instead = _meant(name, hooks), "is no hook", None
            if meant is None and not name.startswith("_"):  # a private one is the class's own to call
                meant, what = next(iter(get_close_matches(name, others, 1, _NEAR)), None), "overrides no method"
                instead = (elsewhere or {}).get(name)
            if (meant is not None or instead is not None) and name not in _used(cls):
                hint = f". Did you mean '{meant}'?" if instead is None else f": {instead}"
                raise TypeError(f"{cls.__name__}.{name} {what}, and nothing calls it{hint}")


def _declared(cls: type, name: str) -> FunctionType | None:
    """Return the method of the framework that one of a class overrides."""
    of_framework = [base for base in cls.__mro__[1:] if base.__module__.startswith("ksuit_runner.")]
    declared = next((vars(base)[name] for base in reversed(of_framework) if name in vars(base)), None)
    is_special = name.startswith("__")
    return declared if isinstance(declared, FunctionType) and not is_special else None


def _check_signature(cls: type, method: FunctionType, declared: Signature, by_name: bool, extra: int) -> None:
    own = signature(method)
    _, *arguments = [item for item in declared.parameters.values() if item.kind is Parameter.POSITIONAL_OR_KEYWORD]
    names = [item.name for item in arguments]
    by_position = [(None,) * (len(names) + more) for more in range(extra + 1)]
    if _takes(own, named=names) if by_name else any(_takes(own, given) for given in by_position):
        return
    given = f"{', '.join(names) or 'nothing'}" + (" by name" if by_name and names else "")
    raise TypeError(
        f"{cls.__name__}.{method.__name__} is called with {given}, which does not fit {_text(own)}. "
        f"Write: def {method.__name__}{_text(declared)}"
    )


def _takes(own: Signature, positional: Sequence[Any] = (), named: Sequence[str] = ()) -> bool:
    try:
        own.bind(None, *positional, **dict.fromkeys(named))
    except TypeError:
        return False
    return True


def _text(item: Signature) -> str:
    """Return a signature without annotations."""
    bare = [parameter.replace(annotation=Parameter.empty) for parameter in item.parameters.values()]
    return str(item.replace(parameters=bare, return_annotation=Signature.empty))


def _meant(name: str, hooks: Collection[str]) -> str | None:
    """Return the hook that a name may be meant to be; None if it does not look like one."""
    bare = name.strip("_")
    if hooks and bare in HOOKS_ELSEWHERE:
        return HOOKS_ELSEWHERE[bare]
    by_bare = {hook.lstrip("_"): hook for hook in hooks}
    cutoff = 0.0 if _LOOKS_LIKE_A_HOOK.match(name) else _NEAR
    near = get_close_matches(bare, by_bare, 1, cutoff)
    return by_bare[near[0]] if near else None


def _used(cls: type) -> set[str]:
    """Return the names that the methods of a class and its bases use."""
    functions = {function for base in cls.__mro__ for item in vars(base).values() for function in _functions(item)}
    return {name for function in functions for name in _names(function.__code__)}


def _functions(item: Any) -> Iterator[FunctionType]:
    """Yield the functions behind a member of a class: what a decorator, or a property, has been given."""
    within: list[Any] = [item]
    if isinstance(item, property):
        within = [item.fget, item.fset]
    elif isinstance(item, cached_property):
        within = [item.func]
    elif isinstance(item, (classmethod, staticmethod)):
        within = [item.__func__]
    for function in within:
        yield from (one for one in (function, unwrap(function)) if isinstance(one, FunctionType))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
