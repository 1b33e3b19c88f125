"""The values of a nested config by their config paths."""

from collections.abc import Iterator, Mapping
from typing import Any


def nodes(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is in nested mappings by its config path, each mapping before what is in it.

    Config paths are unique: a dot or backslash that is part of a name comes after a backslash.
    """
    for key, value in tree.items():
        name = str(key).replace("\\", "\\\\").replace(".", "\\.")
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from nodes(value, f"{prefix}{name}.")


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values in nested mappings by their config paths; lists and empty mappings are values."""
    return {path: value for path, value in nodes(tree) if not (value and isinstance(value, Mapping))}
