"""The differences of two configs, as plain values, and their transfer into a third one."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

ABSENT: Any = object()
"""Stands for the value of a key that a config does not have."""


class Difference(NamedTuple):
    """Where two configs differ: the config path, the value in the old one, and the value in the new one."""

    path: str
    old: Any
    new: Any


def is_same(one: Any, other: Any) -> bool:
    """Whether two plain values are equal; unlike for ``==``, NaN is equal to itself, at any depth."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other) or (one != one and other != other)


def differences(old: Mapping[Any, Any], new: Mapping[Any, Any], prefix: str = "") -> Iterator[Difference]:
    """Yield where two configs differ, as deep as both are mappings."""
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, dict) and isinstance(after, dict) and before and after:
            yield from differences(before, after, f"{prefix}{key}.")
        elif not is_same(before, after):
            yield Difference(f"{prefix}{key}", before, after)


def put_differences(target: dict[Any, Any], old: Mapping[Any, Any], new: Mapping[Any, Any]) -> None:
    """Change a config where two others differ, to the newer value; everything else in it stays."""
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if isinstance(before, dict) and isinstance(after, dict) and isinstance(target.get(key), dict):
            put_differences(target[key], before, after)
        elif not is_same(before, after):
            if after is ABSENT:
                target.pop(key, None)
            else:
                target[key] = after
