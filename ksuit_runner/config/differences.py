"""The differences of two configs, as plain values, and their transfer into a third one."""

from collections.abc import Iterator, Mapping
from typing import Any

REMOVED: Any = object()
"""Stands for the new value of a key that was removed."""


def is_same(one: Any, other: Any) -> bool:
    """Whether two plain values are equal; unlike for ``==``, NaN is equal to itself, at any depth."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other) or (one != one and other != other)


def differences(old: Mapping[Any, Any], new: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the config paths where two configs differ with their new values, as deep as both are mappings."""
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, REMOVED), new.get(key, REMOVED)
        if isinstance(before, dict) and isinstance(after, dict) and before and after:
            yield from differences(before, after, f"{prefix}{key}.")
        elif not is_same(before, after):
            yield f"{prefix}{key}", after


def put_differences(target: dict[Any, Any], old: Mapping[Any, Any], new: Mapping[Any, Any]) -> None:
    """Change a config where two others differ, to the newer value; everything else in it stays."""
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, REMOVED), new.get(key, REMOVED)
        if isinstance(before, dict) and isinstance(after, dict) and isinstance(target.get(key), dict):
            put_differences(target[key], before, after)
        elif not is_same(before, after):
            if after is REMOVED:
                target.pop(key, None)
            else:
                target[key] = after
